"""The notebooks: committed with their figures, and executed offline from start to end."""

import base64
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import plot
from gpt2_model import PRESETS

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# Cells that draw one picture each.
FIGURES = {
    "fineweb": "lengths compression zipf order batch permutation mixing",
    "play": "shares positions norms map attention heads grow lens temperature repetition logprobs run against",
}


def execute(name, folder) -> dict:
    """Return the cells of the executed notebook by id."""
    place = folder / "notebooks"  # `../data` is then inside the test's folder too
    place.mkdir()
    # Every connection goes to a closed port.
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    offline = dict.fromkeys(proxies, "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": "1"}
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": place}})
    before = os.times()
    # With one thread, waiting for other programs' threads does not count as processor time.
    client.execute(env={**os.environ, **offline, "NO_PROXY": "", "no_proxy": "", "OMP_NUM_THREADS": "1"})
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 120
    return {cell.id: cell for cell in notebook.cells}


def printed(cell) -> str:
    """Return what a cell wrote to stdout."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def check_figures(name, cells) -> None:
    outputs = [(cell.id, output.get("data", {})) for cell in cells for output in cell.get("outputs", [])]
    drawn = [(id_, base64.b64decode(data["image/png"])) for id_, data in outputs if "image/png" in data]
    assert [id_ for id_, _ in drawn] == [f"{figure}-figure" for figure in FIGURES[name].split()]
    # Axes of this size with nothing in them are 4,000 bytes.
    assert [id_ for id_, picture in drawn if len(picture) <= 8000] == []


@pytest.mark.parametrize("name", NAMES)
def test_committed_with_figures_and_as_the_newest_format(name) -> None:
    """GitHub shows the outputs as they are committed; another machine's may differ."""
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 1_500_000
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    check_figures(name, notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # executed once, in order
    assert {output.output_type for cell in code for output in cell.outputs} <= {"stream", "display_data"}
    assert not re.search(r"/(home|root|tmp|Users|work)/", path.read_text(encoding="utf-8"))  # nobody's own paths


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_offline_in_two_minutes_draws_every_figure_and_what_it_prints_holds(name, tmp_path) -> None:
    cells = execute(name, tmp_path)
    check_figures(name, cells.values())
    for id_, cell in cells.items():
        said = [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        assert not any("warning" in text.lower() for text in said), (id_, said)
    {"play": check_play, "fineweb": check_fineweb}[name](cells)


def check_play(cells) -> None:
    for size in PRESETS.values():
        assert f"{size.num_parameters:,}" in printed(cells["sizes"])
    # The parameters in the table of shapes add up to the model's.
    table = re.findall(r"(\(.*\)) +([\d,]+)(?: x (\d+))?", printed(cells["shapes-code"]))
    total = sum(int(count.replace(",", "")) * int(times or 1) for _, count, times in table)
    assert f"{total:,} parameters" in printed(cells["load"])
    losses = [float(loss) for loss in re.findall(r"validation loss (\S+)", printed(cells["train-code"]))]
    assert losses[0] == pytest.approx(10.82, abs=0.15)  # ln 50,257
    assert losses[-1] < 6  # 5.2; it would be 10.9 if the small vocabulary's loss were not the whole one's
    assert float(re.search(r"norm of a gradient: (\d+)", printed(cells["train-code"]))[1]) < 50  # 10; it was 4,000
    first, last = re.search(r"loss (\S+) at first, (\S+) at the end", printed(cells["grow-code"])).groups()
    assert float(first) > 4
    assert float(last) < 0.5  # 0.1: its second head copies
    # The published results are those that tools/plot.py draws.
    for size, reference in zip(PRESETS.values(), plot.REFERENCES.values(), strict=True):
        assert plot.REFERENCES[size.n_layer, size.n_embd] is reference
        for value in (reference.val_loss, reference.hellaswag, reference.gpt3_hellaswag):
            assert re.search(rf": {value}0?[,}}]", cells["against-figure"].source), value
    options = dict(line.split("|", 1) for line in printed(cells["options-code"]).splitlines())
    assert len(options) == len(set(options.values())) == 8  # each option gives another text


def check_fineweb(cells) -> None:
    tokens, documents = map(int, re.findall(r"[\d]+", printed(cells["build-code"]).replace(",", ""))[:2])
    rows = re.findall(r"(\d+) documents +(\d+) tokens", printed(cells["split-code"]).replace(",", ""))
    assert [sum(int(row[i]) for row in rows) for i in (0, 1)] == [documents, tokens]
    # Another Python may have a file twice.
    assert re.search(r"in train too: \d$", printed(cells["split-code"]))
    for line in printed(cells["permutation-figure"]).splitlines():
        came, of = re.search(r"([\d,]+) of ([\d,]+) samples", line).groups()
        assert came == of
    same = printed(cells["same-bytes-code"])
    assert same.count("the same bytes") == same.count(".bin") + same.count(".docs") + 1  # dataset.json
    assert "now by tiktoken" in same
    assert re.search(r"as built: +\(\)", printed(cells["damage-code"]))
    assert "train_000001.bin: damaged" in printed(cells["damage-code"])
