"""`bench.py data` on a few megabytes, and what it makes of its samples."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

TOOLS = Path(__file__).parent.parent.parent / "tools"
COMMAND = [sys.executable, TOOLS / "bench.py", "data"]
GIGATOKEN, TIKTOKEN, POOL, HALF = "ours, gigatoken", "ours, tiktoken", "build-nanogpt", "build-nanogpt, half"


def made_document(bench, gigatoken=(160, 90, 80), loader=200e6, verify=(1.2, 2.4, 2.6), missing=()):
    """A document of three rounds, in the second and third of which the machine was slower."""
    data = bench.bench_data
    speeds = {
        GIGATOKEN: gigatoken, TIKTOKEN: (30, 30, 30), POOL: (10, 10, 8), HALF: (20, 8, 8),
        "datasets.map": (2, 2, 2), "gigatoken alone": (320, 100, 100), "tiktoken alone": (30, 30, 30),
    }  # fmt: skip
    samples = {}
    for name, rounds in speeds.items():
        samples[name] = [{"mb_per_second": speed, "seconds": 1.0} for speed in rounds]
        if name.startswith("ours"):
            samples[name] = [
                {**sample, "verified_mb_per_second": sample["mb_per_second"] / 2, "verified_seconds": 2.0}
                for sample in samples[name]
            ]
    for name in missing:
        del samples[name]
    document = {
        **bench.provenance("data"),
        "settings": {"rounds": 3, "cores": 2},
        "source": {"name": "s", "text_bytes": 10**9, "bytes": 10**9, "documents": 10**6, "tokens": 10**9},
        "absent": dict.fromkeys(missing, "not installed"),
        **data.results(samples),
        "dataset": {"bytes": 2 * 10**9, "tokens": 10**9},
        **data.read_results(
            {"copies": [1e9] * 3, "plain": [loader] * 3, "prefetch": [300e6] * 3},
            {"gpt2-data verify": list(verify), "sha256sum": [1, 2, 2], "one worker": [3, 3, 3]},
        ),
    }
    return {**document, "bars": data.bars(document)}


def test_ratios_are_of_the_same_round_and_of_the_better_pool(bench) -> None:
    document = made_document(bench)
    ratios = document["ratios"][GIGATOKEN]
    assert ratios["build-nanogpt, the better"]["rounds"] == [8, 9, 10]
    assert ratios["gigatoken alone"]["rounds"] == [0.5, 0.9, 0.8]
    assert document["ratios"][f"{GIGATOKEN}, verified"]["datasets.map"]["rounds"] == [40, 22.5, 20]
    assert document["loader_shares"]["plain"]["median"] == 0.2
    assert document["verify_ratios"]["sha256sum"]["rounds"] == [1.2, 1.2, 1.3]


def test_bars_that_do_not_hold_are_named(bench) -> None:
    assert all(bar["holds"] for bar in made_document(bench)["bars"])
    slow = made_document(bench, gigatoken=(50, 40, 40), loader=149e6, verify=(1.4, 2.8, 2.6))["bars"]
    named = [bar["bar"].split(":")[0] for bar in slow if not bar["holds"]]
    assert named == [GIGATOKEN, GIGATOKEN, "loader, plain", "verify --level full"]
    assert len(slow) == 6


@pytest.mark.parametrize("missing", [(), (GIGATOKEN, "gigatoken alone"), ("datasets.map", HALF)])
def test_table_fits_100_columns_whoever_is_missing(bench, missing) -> None:
    text = bench.bench_data.table(made_document(bench, gigatoken=(12345, 12345, 12345), missing=missing))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("absent: ") == len(missing)


def test_streams_are_read_with_eot_in_front(bench, tmp_path) -> None:
    np.array([7, 8, 50256, 9, 50256], np.uint16).tofile(tmp_path / "train.bin")
    assert bench.bench_data._nanogpt(tmp_path).tolist() == [50256, 7, 8, 50256, 9]
    for number, split in enumerate(["val", "train"]):
        np.save(tmp_path / f"edufineweb_{split}_{number:06d}.npy", np.array([number], np.uint16))
    assert bench.bench_data._npy(tmp_path).tolist() == [0, 1]


def test_other_tokens_are_refused_before_any_speed(bench, tmp_path, monkeypatch) -> None:
    streams = iter([(3, "a"), (3, "b")])
    monkeypatch.setattr(bench.bench_data, "_time", lambda *_: ({"mb_per_second": 1.0}, next(streams)))
    monkeypatch.setattr(bench.bench_data, "_contenders", lambda *_: {"one": None, "other": None})
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    result = CliRunner().invoke(bench.main, ["data", "--source", str(tmp_path / "a.parquet")])
    assert result.exit_code == 1
    assert "Error: the tokens of other are not those of the others" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("column", [None, "words"])
def test_sources_without_text_are_refused(bench, tmp_path, column) -> None:
    if column:
        pq.write_table(pa.table({column: ["a"]}), tmp_path / "a.parquet")
    result = CliRunner().invoke(bench.main, ["data", "--source", str(tmp_path / "*.parquet")])
    assert result.exit_code == 1
    assert ("has no column text" if column else "no file matches") in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.long
def test_all_contenders_are_measured_and_write_the_same_tokens(tmp_path) -> None:
    options = ["--megabytes", "4", "--dataset-megabytes", "4", "--rounds", "1", "--work", tmp_path / "work"]
    command = [*COMMAND, *options, "--json", "--out", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == document
    assert list((tmp_path / "work").iterdir()) == []

    contenders = [GIGATOKEN, TIKTOKEN, POOL, HALF, "datasets.map"]
    contenders = [name for name in contenders if name in document["build"]]
    absent = {GIGATOKEN, HALF} if document["settings"]["cores"] == 1 else {GIGATOKEN}
    assert {TIKTOKEN, POOL, "datasets.map"} <= set(contenders)
    assert document["streams"]["equal"] == contenders
    assert document["streams"]["tokens"] == document["source"]["tokens"] > 1_000_000
    assert 4e6 <= document["source"]["text_bytes"] < 6e6
    assert set(document["absent"]) <= absent | {"sha256sum", "openssl"}
    for name in contenders:
        fields = document["build"][name]
        speed, seconds = fields["mb_per_second"]["median"], fields["seconds"]["median"]
        assert speed == pytest.approx(document["source"]["text_bytes"] / seconds / 1e6)
        assert ("verified_seconds" in fields) == name.startswith("ours")
    best = max(document["build"][name]["mb_per_second"]["median"] for name in (POOL, HALF) if name in contenders)
    tiktoken = document["build"][TIKTOKEN]["mb_per_second"]["median"]
    assert document["ratios"][TIKTOKEN]["build-nanogpt, the better"]["median"] == pytest.approx(tiktoken / best)
    assert set(document["loader"]) == {"copies", "plain", "prefetch"}
    made = document["dataset"]
    assert made["copies_of_source"] >= 2  # 4 MB of text are fewer than 2 million tokens
    assert made["tokens"] == made["copies_of_source"] * document["source"]["tokens"] >= 2_000_000
    assert made["bytes"] > 2 * made["tokens"]
    if shutil.which("sha256sum"):
        assert document["verify_ratios"]["sha256sum"]["median"] > 0
    assert {"date", "command", "machine", "versions", "definitions", "bars"} <= document.keys()
