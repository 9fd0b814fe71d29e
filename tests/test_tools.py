"""The tools, on data of a few kilobytes; quickstart as a whole is what `make quickstart` runs."""

import json
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import click
import pytest

from gpt2_data import BuildConfig, build
from gpt2_eval import load_hellaswag

TOOLS = Path(__file__).parent.parent / "tools"
WORDS = ["the", "function", "returns", "a", "list", "of", "open", "files", "and", "then", "closes", "each", "one"]


def run_tool(name, *arguments):
    command = [sys.executable, TOOLS / name, *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("loss", "learnt"), [(5.3, True), (8.9, False)])
def test_quickstart_says_whether_the_model_has_learnt(tmp_path, monkeypatch, capsys, loss, learnt) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import quickstart

    (tmp_path / "run").mkdir()
    row = {"step": 0, "val_loss": 10.8, "hellaswag_acc_norm": 0.28}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row))
    score = {"karpathy": {"acc_norm": 0.32, "stderr": 0.033}}
    with nullcontext() if learnt else pytest.raises(click.ClickException, match="not clearly better"):
        quickstart.summary(tmp_path, tmp_path / "checkpoint", {"loss": loss}, score, 159.0)
    assert f"10.80{loss:10.2f}   nats" in capsys.readouterr().out


def test_quickstart_items_are_hellaswag_s_and_have_their_own_ending(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import quickstart

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=400)) for _ in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = BuildConfig(
        sources=(str(tmp_path / "t.jsonl"),), out=str(tmp_path / "d"), val_tokens=3000, workers=1, order="source"
    )
    build(config)
    quickstart.write_items(tmp_path / "d", tmp_path / "items.jsonl")

    assert len(load_hellaswag(tmp_path / "items.jsonl").items) == quickstart.HELLASWAG_ITEMS
    labels = set()
    for item in map(json.loads, (tmp_path / "items.jsonl").read_text().splitlines()):
        whole = f"{item['ctx']} {item['endings'][item['label']]}"
        assert sum(whole in text for text in texts) == 1
        assert len(set(item["endings"])) == 4
        labels.add(item["label"])
    assert labels == {0, 1, 2, 3}


def test_plot_draws_a_run(tmp_path) -> None:
    rows = [{"step": 0, "val_loss": 10.8, "hellaswag_acc_norm": 0.24}]
    rows += [{"step": step, "loss": 10 / step} for step in range(1, 50)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_tool("plot.py", tmp_path / "run", "--out", tmp_path / "loss.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "{cut"])
def test_plot_refuses_what_is_no_run(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = run_tool("plot.py", tmp_path, "--out", tmp_path / "loss.png")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
