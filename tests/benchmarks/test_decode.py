"""`bench.py decode` on a model of a few seconds, and what it makes of its samples."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

TOOLS = Path(__file__).parent.parent.parent / "tools"
NEEDS_CTRANSLATE2 = pytest.mark.skipif(not find_spec("ctranslate2"), reason="needs requirements-bench.txt")
TINY = [
    "decode", "--rounds", "1", "--new-tokens", "24", "--threads", "1", "--batch", "1", "--batch", "2",
    *(word for field in ("n_layer=2", "n_head=2", "n_embd=64", "block_size=64") for word in ("--model", field)),
]  # fmt: skip


@pytest.fixture
def bench_decode(bench):
    return bench.bench_decode


def samples(*speeds, first=0.1):
    return [{"tokens_per_second": speed, "seconds_to_first_token": first} for speed in speeds]


def made_document(bench, ours=(200, 300, 100), start=2.0, device="cpu"):
    """A document of three rounds in which the machine became slower, then much slower."""
    read = 10**9
    taken = {"ours": samples(*ours), "transformers": samples(50, 100, 40), "ctranslate2": samples(100, 100, 100)}
    taken["memory"] = [{"gb_per_second": speed} for speed in (400, 400, 200)]
    if device == "cuda":
        taken = {
            "ours": samples(*ours),
            "ours, compiled": samples(9e4, 9e4, 9e4),
            "transformers": samples(5e3, 5e3, 5e3),
        }
    decode = bench.bench_decode
    document = {
        **bench.provenance("decode"),
        "settings": {
            "device": device,
            "prompt_tokens": 16,
            "new_tokens": 128,
            "top_k": 50,
            "threads": 2,
            "rounds": 3,
        },
        "model": {"parameters": 124_439_808},
        "memory_reader": "C" if device == "cpu" else None,
        "absent": {"ctranslate2 bf16": "not installed"},
        "decode": [decode.result((kind, batch), taken, read) for kind in ("fp32", "bf16") for batch in (1, 8)],
        "start": {"seconds_to_first_token": decode.spread([start]), "seconds_import_torch": decode.spread([1.0])},
    }
    return {**document, "bars": decode.bars(document)}


def test_ratios_are_of_the_same_round(bench_decode) -> None:
    taken = {"ours": samples(200, 300, 100), "transformers": samples(50, 100, 40)}
    taken["memory"] = [{"gb_per_second": speed} for speed in (400, 400, 200)]
    row = bench_decode.result(("bf16", 1), taken, 10**9)
    assert row["ratios"]["transformers"]["rounds"] == [4, 3, 2.5]
    assert row["ratios"]["transformers"]["median"] == 3  # of the medians it would be 4
    assert row["first_token_ratios"]["transformers"]["median"] == 1
    assert row["ceiling_tokens_per_second"]["rounds"] == [200, 200, 100]  # two bytes a weight
    assert row["share_of_ceiling"]["rounds"] == [1, 1.5, 1]
    assert "share_of_ceiling" not in bench_decode.result(("bf16", 8), taken, 10**9)  # eight rows share a read


def test_bars_that_do_not_hold_are_named(bench) -> None:
    assert all(bar["holds"] for bar in made_document(bench)["bars"])
    slow = [bar["bar"] for bar in made_document(bench, ours=(99, 99, 99), start=3.1)["bars"] if not bar["holds"]]
    assert [bar.split(",")[0] for bar in slow] == [
        "fp32 batch 1", "fp32 batch 8", "bf16 batch 1", "bf16 batch 1", "bf16 batch 8",
        "seconds from start to first token",
    ]  # fmt: skip
    assert sum("transformers" in bar for bar in slow) == 1  # 99 over 40 is ahead, and not by 2.5


def test_check_exits_1_with_a_line_for_each_bar(bench, monkeypatch) -> None:
    for start, code in ((2.9, 0), (3.1, 1)):
        document = made_document(bench, start=start)
        monkeypatch.setattr(bench.bench_decode, "measure", lambda *_, document=document: document)
        result = CliRunner().invoke(bench.main, ["decode", "--check"])
        assert result.exit_code == code, result.output
        lines = result.stderr.splitlines()
        assert lines[0] == "not checked: ctranslate2 bf16: not installed"
        assert len(lines) == 1 + code


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_table_fits_100_columns(bench, device) -> None:
    text = bench.bench_decode.table(made_document(bench, ours=(12345, 12345, 12345), device=device))
    assert max(map(len, text.splitlines())) <= 100
    assert ("memory read" in text) == (device == "cpu")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--model", "n_layers=2"], 2), (["--check", "-d", "cuda"], 2), (["--new-tokens", "1009"], 1)],
)
def test_wrong_settings_are_refused_before_work(bench, arguments, code) -> None:
    result = CliRunner().invoke(bench.main, ["decode", *arguments])
    assert result.exit_code == code
    assert "Traceback" not in result.output


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_memory_reader_reads_every_byte(bench_decode, tmp_path) -> None:
    read_all = bench_decode.contenders._compile_reader(tmp_path, ["cc"])
    room = np.arange(4096 + 8, dtype=np.uint64)
    words = room[-room.ctypes.data % 64 // 8 :][:4096]
    assert read_all(words.ctypes.data, 4096 // 8) == words.sum()


@pytest.mark.parametrize("path", [None, "/nowhere"])
def test_memory_is_read_with_a_compiler_or_without(bench_decode, tmp_path, monkeypatch, path) -> None:
    contenders = bench_decode.contenders
    monkeypatch.setattr(contenders, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(contenders, "_readers", [])
    monkeypatch.delenv("CC", raising=False)
    if path:
        monkeypatch.setenv("PATH", path)
    assert contenders.open_memory(tmp_path, 2).startswith("PyTorch" if path or not shutil.which("cc") else "C, ")
    assert contenders.read_memory() > 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("hidden", [pytest.param(False, marks=NEEDS_CTRANSLATE2), True])
def test_all_contenders_are_measured_and_absent_ones_named(tmp_path, hidden) -> None:
    environment = dict(os.environ)
    if hidden:  # as where it is not installed
        (tmp_path / "ctranslate2.py").write_text("raise ImportError")
        environment["PYTHONPATH"] = str(tmp_path)
    precisions = ["--precision", "fp32"] if hidden else []
    command = [sys.executable, TOOLS / "bench.py", *TINY, *precisions, "--json", "--out", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == document

    kinds = ["fp32"] if hidden else ["fp32", "bf16", "int8"]
    assert [(row["precision"], row["batch"]) for row in document["decode"]] == [
        (k, b) for k in kinds for b in (1, 2)
    ]
    assert document["absent"].get("ctranslate2 fp32") == "ctranslate2 is not installed" or not hidden
    for row in document["decode"]:
        assert len(row["memory"]["gb_per_second"]["rounds"]) == 1
        for peer in ("transformers", "ctranslate2"):
            assert (peer in row) != (f"{peer} {row['precision']}" in document["absent"])
            if peer in row:
                pairs = zip(*(row[name]["tokens_per_second"]["rounds"] for name in ("ours", peer)), strict=True)
                assert row["ratios"][peer]["median"] == statistics.median(ours / theirs for ours, theirs in pairs)
    assert document["start"]["seconds_to_first_token"]["min"] > 0
    assert {"date", "command", "machine", "versions", "definitions", "bars"} <= document.keys()
