"""`bench.py eval` on a model of a second, and what it makes of its samples."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

TOOLS = Path(__file__).parent.parent.parent / "tools"
RAW, PLAIN, CLEAN, HARNESS = "ours, karpathy", "build-nanogpt's method", "ours, lm-eval", "lm-eval"


@pytest.fixture
def items_file(tmp_path):
    draw = random.Random(0)
    words = ["person", "then", "takes", "a", "red", "ball", "and", "throws", "over", "the", "high", "wall"]
    path = tmp_path / "items.jsonl"

    def say(length):
        return " ".join(draw.choices(words, k=length))

    with path.open("w") as file:
        for ind in range(30):
            context = say(12)
            record = {
                "ind": ind, "label": ind % 4, "activity_label": "Games",
                "ctx": f"{context} They", "ctx_a": context, "ctx_b": "they",
                "endings": [say(draw.randint(3, 20)) for _ in range(4)],
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.long
def test_all_contenders_give_the_same_scores(items_file, tmp_path):
    tiny = [f"--model={field}" for field in ("n_layer=1", "n_head=2", "n_embd=16")]
    command = [sys.executable, TOOLS / "bench.py", "eval", "--data", items_file, *tiny, "--threads", "1", "--json"]
    done = subprocess.run([*command, "--out", tmp_path / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == document
    peers = {PLAIN: RAW, HARNESS: CLEAN}
    assert document["items"] == 30
    assert document["items_per_second"].keys() == {RAW, CLEAN, *peers}
    assert document["ratios"].keys() == peers.keys()
    assert document["largest_difference"].keys() == {f"{ours} and {peer}" for peer, ours in peers.items()}
    assert all(0 < value < 1e-3 for value in document["largest_difference"].values())
    assert document["absent"] == {}
    assert {"date", "command", "machine", "versions", "data_sha256", "bars"} <= document.keys()


def test_a_peer_that_is_not_installed_is_absent(bench, monkeypatch, items_file, tmp_path):
    def missing(*arguments):
        raise ImportError("no lm_eval here")

    monkeypatch.setitem(bench.bench_eval.CONTENDERS, HARNESS, missing)
    settings, said = SimpleNamespace(data=items_file, items=3, threads=torch.get_num_threads()), []
    bench.bench_eval._contend(HARNESS, settings, tmp_path, SimpleNamespace(send=said.append))
    assert said == [("absent", 0.0, "no lm_eval here")]


def made_document(bench, ratio, difference):
    document = {
        "settings": {"dtype": "fp32", "threads": 2, "device": "cpu", "harness_batch": 16},
        "machine": {"cpu": "a processor", "cores": 2}, "model": {"parameters": 124_439_808}, "items": 500,
        "items_per_second": {RAW: 3.0, PLAIN: 1.0}, "absent": {HARNESS: "not installed"},
        "ratios": {PLAIN: ratio},
        "largest_difference": {f"{RAW} and {PLAIN}": difference},
    }  # fmt: skip
    return document | {"bars": bench.bench_eval._bars(document)}


@pytest.mark.parametrize(
    ("ratio", "difference", "broken"),
    [(3.2, 1e-3, []), (2.9, 1e-3, ["at least 3 times"]), (3.2, 0.5, ["the same scores"])],
)
def test_bars(bench, monkeypatch, tmp_path, ratio, difference, broken):
    document = made_document(bench, ratio, difference)
    monkeypatch.setattr(bench.bench_eval, "measure", lambda *_: document)
    result = CliRunner().invoke(bench.main, ["eval", "--check"])
    assert result.exit_code == (1 if broken else 0), result.output
    assert f"{ratio:.2f} times" in result.stdout
    assert "absent: lm-eval: not installed" in result.stdout
    assert "not checked: lm-eval: not installed" in result.stderr
    failed = [line for line in result.stderr.splitlines() if "does not hold" in line]
    assert len(failed) == len(broken)
    for line, words in zip(failed, broken, strict=True):
        assert words in line
