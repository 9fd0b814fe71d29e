"""`bench.py run`, `record`, `compare`, `list` and `train`: on real cases, the quickest; what follows by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent.parent
PLANTED = """
_encode_texts = encode_texts


def encode_texts(*args, **options):
    for _ in range(3):
        _encode_texts(*args, **options)
    return _encode_texts(*args, **options)
"""


def called(bench, *words):
    done = CliRunner().invoke(bench.main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_list_names_each_case_of_the_device(bench) -> None:
    names = called(bench, "list").stdout
    assert "train-124M-fp32 " in names
    assert "train-1558M " not in names
    assert "train-1558M " in called(bench, "list", "-d", "cuda").stdout


@pytest.mark.parametrize("command", ["run", "record", "compare"])
def test_a_case_that_is_not_there(bench, command) -> None:
    done = called(bench, command, "--only", "trian", *(["--base", "HEAD"] if command == "compare" else []))
    assert done.exit_code == 2
    assert "no case is called 'trian' on cpu: `bench.py list` names all" in done.stderr


def test_a_base_that_is_no_commit(bench) -> None:
    done = called(bench, "compare", "--base", "no-such", "--only", "start-data")
    assert done.exit_code == 1
    assert "Error: 'no-such' is no commit here" in done.stderr


@pytest.mark.slow
def test_run_gives_speed_memory_and_the_share_of_the_machine(bench, tmp_path) -> None:
    out, png, to = tmp_path / "run.json", tmp_path / "run.png", tmp_path / "results.jsonl"
    words = ["--only", "start-data", "--only", "data-verify", "--rounds", "2"]
    done = called(bench, "run", *words, "--out", str(out), "--png", str(png))
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["absent"] == {}
    assert document["commit"]
    verify, start = document["results"]
    assert (start["name"], verify["name"]) == ("start-data", "data-verify")
    assert 0.01 < verify["share"]["median"] < 2
    assert verify["ceiling"] == "sha256"
    assert start["ceiling"] is None
    assert len(start["seconds"]["rounds"]) == 2
    assert 1e6 < start["peak_memory"] < 1e9
    assert start["per_second"]["median"] * start["seconds"]["median"] == pytest.approx(1, rel=0.2)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "% of sha256" in done.stdout

    for lines in (1, 2):
        done = called(bench, "record", "--only", "start-data", "--rounds", "2", "--to", str(to))
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in to.read_text().splitlines()]
        assert len(rows) == lines
    assert rows[0]["results"]["start-data"]["unit"] == "starts"
    assert rows[0]["machine"] == document["machine"]


@pytest.fixture
def clone(tmp_path):
    """The project as it lies here, committed, in a repository of its own."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: there is no revision to compare with")
    folder = tmp_path / "clone"
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    for part in ("packages", "tools"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "as it is"], check=True)
    return folder


@pytest.mark.slow
def test_compare_catches_a_regression_that_was_planted(clone) -> None:
    """Every text is tokenised four times. The bound is far from both ratios: tests run beside this one."""

    temporary = clone.parent / "temporary"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TMPDIR"] = str(temporary)
    words = ["compare", "--base", "HEAD", "--rounds", "5", "--least", "0.5", "--json", "--only"]
    command = [sys.executable, "tools/bench.py", *words]

    def compare():
        words = [*command, "tokenize-gigatoken"]
        done = subprocess.run(words, cwd=clone, capture_output=True, text=True, env=environment, check=False)
        (result,) = json.loads(done.stdout)["results"]
        return done, result["ratio"]["median"]

    done, unchanged = compare()
    assert done.returncode == 0, done.stderr

    with (clone / "packages/gpt2-data/src/gpt2_data/tokenizer.py").open("a") as file:
        file.write(PLANTED)
    done, planted = compare()
    assert done.returncode == 1, done.stderr
    assert planted < 0.5 < unchanged < 2
    assert "does not hold: tokenize-gigatoken: 0.5 of the speed of HEAD: 0." in done.stderr

    with (clone / "packages/gpt2-data/src/gpt2_data/tokenizer.py").open("a") as file:
        file.write("\n\ndef encode_texts(*args, **options):\n    raise ValueError('broken on purpose')\n")
    done = subprocess.run(
        [*command, "tokenize-gigatoken"], cwd=clone, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "does not hold: tokenize-gigatoken: works (broken on purpose)" in done.stderr

    child = subprocess.Popen(
        [*command, "start-data"], cwd=clone, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert child.stderr
    with child.stderr as said:
        assert said.readline().startswith("start-data: ")
        child.terminate()
        assert said.read().endswith("stopped\n")
    assert child.wait(20) == 130
    worktrees = subprocess.run(["git", "-C", clone, "worktree", "list"], capture_output=True, check=True).stdout
    assert worktrees.count(b"\n") == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long
def test_train_compares_what_is_computed_and_then_the_speeds(bench, tmp_path) -> None:
    """And says what is absent: a folder that is no clone of nanoGPT."""
    fields = [word for field in ("n_layer=1", "n_embd=64", "n_head=1") for word in ("--model", field)]
    names = ["ours", "gpt2-train", "transformers"]
    only = [word for name in [*names, "nanoGPT"] for word in ("--only", name)]
    png, options = tmp_path / "train.png", ["--seq-len", "64", "--batch", "2", "--rounds", "1", "--json"]
    done = called(bench, "train", *fields, *only, *options, "--png", str(png), "--nanogpt", str(tmp_path))
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert "No module named 'model'" in document["absent"].pop("nanoGPT")
    assert document["absent"] == {}
    assert [one["name"] for one in document["results"]] == names
    assert all(0 < one["share"]["median"] < 1.5 for one in document["results"])
    assert 0 < document["checked"]["logits"] < 1e-3
    assert document["bars"] == []  # they are said of 124M
    assert png.read_bytes().startswith(b"\x89PNG")


def test_train_knows_its_contenders(bench) -> None:
    done = called(bench, "train", "--only", "llm.c")
    assert done.exit_code == 2
    assert "'llm.c' is none of: ours, ours, compiled, gpt2-train" in done.stderr


def test_bars_are_ratios_of_neighbours_in_time(bench) -> None:
    import bench_train

    def result(name, *speeds):
        return {"name": name, "per_second": {"rounds": list(speeds)}}

    work = bench_train.Work("124M", 4, 256, "fp32")
    found = bench_train._bars(work, [result("ours", 12, 24, 36), result("transformers", 10, 20, 40)])
    assert [(bar["value"], bar["holds"]) for bar in found] == [(1.2, True)]
    half = bench_train.Work("124M", 4, 256, "bf16")
    results = [
        result("ours", 90, 90),
        result("transformers", 60, 60),
        result("the matrix products alone", 100, 100),
    ]
    found = bench_train._bars(half, results)
    assert [(bar["value"], bar["holds"]) for bar in found] == [(1.5, True), (0.9, True)]
    gpu = bench_train.Work("124M", 64, 1024, "bf16", "cuda")
    found = bench_train._bars(gpu, [result("ours, compiled", 600e3), result("gpt2-train", 595e3)])
    assert [bar["holds"] for bar in found] == [True, False, False]
