"""tools/bench.py: its commands on cases of a second, and by hand what follows from samples."""

import json
import os
import random
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import bench
from benchmarks import data, harness, peers, report
from benchmarks.harness import Bench, Case, Ready
from gpt2_data import TokenLoader

ROOT = Path(__file__).parent.parent.parent
TINY = "--model n_layer=1 --model n_embd=64 --model n_head=1"
QUICK = ["--rounds", "1", "--threads", "1", "--json"]
PLANTED = """
_encode_texts = encode_texts
def encode_texts(*args, **options):
    return [_encode_texts(*args, **options) for _ in range(4)][0]
"""
BROKEN = """
def encode_texts(*args, **options):
    raise ValueError('broken on purpose')
"""


def called(*words, code=0):
    done = CliRunner().invoke(bench.main, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def document_of(*words) -> dict:
    return json.loads(called(words[0], *QUICK, *words[1:]).stdout)


def result(name, *speeds, **more) -> dict:
    shown = {"unit": "tokens", "ceiling": None, "peak_memory": 10**9}
    return {"name": name, "per_second": report.spread(speeds), **shown, **more}


# What follows from samples.


def test_bars_are_medians_of_ratios_of_the_same_round() -> None:
    results = [result("ours", 12, 24, 36), result("peer", 10, 20, 40)]  # 1.2, 1.2, 0.9
    checks = [("ours", "peer", 1.2), ("ours", "peer", 1.21), ("ours", "", 24), ("ours", "", 25)]
    bars = report.bars_of([*checks, ("ours", "absent", 1), ("absent", "peer", 1)], results)
    assert [(bar["value"], bar["holds"]) for bar in bars] == [(1.2, True), (1.2, False), (24, True), (24, False)]


def test_answers_that_differ_are_refused_before_any_speed() -> None:
    samples = {
        "ours": [{"answer": {"score": [1.0, 2.0]}}] * 2,
        "peer": [{"answer": {"score": [1.0, 2.01]}}],
        "none": [{"seconds": 1.0}],
    }
    harness.same_answers(samples, 0.05)
    with pytest.raises(ValueError, match="peer gives another score than the others: its speed means nothing"):
        harness.same_answers(samples, 0.005)


def test_table_and_brief() -> None:
    of_machine = {"share": report.spread([0.5, 0.6]), "machine": report.spread([2.0, 2.0]), "ceiling": "read"}
    rows = [
        result("ours", 12_345, 23_456, seconds=report.spread([1.0, 1.1]), **of_machine),
        result("peer", 6_000, 7_000, seconds=report.spread([2.0, 2.2]), ratio=report.spread([2.1, 3.4])),
    ]
    settings = {"threads": 2, "rounds": 2, "device": "cpu", "folder": ""}
    document = {"benchmark": "run", "title": "a title", **report.provenance("cpu"), "settings": settings}
    document |= {"results": rows, "absent": {"nanoGPT": "not installed"}, "bars": [report.bar("a bar", 2.7, 3.0)]}
    ours, peer, *rest = report.table(document).splitlines()[4:]
    assert "17.9k (12.3k..23.5k) tokens" in ours
    assert "55% of read" in ours
    assert "2.75 (2.1..3.4)" in peer
    assert rest == ["absent: nanoGPT: not installed", "DOES NOT HOLD: a bar: 2.7"]
    brief = report.brief(document)
    assert brief["results"]["ours"] == {
        "per_second": 17900, "unit": "tokens", "spread": 0.095, "peak_memory": 10**9, "share": 0.55, "of": "read",
    }  # fmt: skip
    assert {"date", "commit", "machine", "versions"} <= brief.keys()


@pytest.mark.parametrize("name", ["read", "copy", "sha256", "matrix fp32"])
def test_rates_of_the_machine(monkeypatch, name) -> None:
    for size in ("READ_BYTES", "COPY_BYTES", "HASH_BYTES"):
        monkeypatch.setattr(harness, size, 1 << 20)
    assert 1e8 < harness.rate(name, 2, "cpu") < 1e14
    harness._machine.cache_clear()


def test_the_loader_is_not_slow(tmp_path) -> None:
    """A quiet core of 2.5 GHz gives 200 to 300 million tokens a second; a loaded machine must not fail."""
    folder = data.dataset(Bench(str(tmp_path), 1, "cpu", 1))
    options = {"batch_size": 64, "seq_len": 1024}
    loaders = [
        TokenLoader(folder, order=order, **options) for order in ("shuffled", "sequential", "build-nanogpt")
    ]
    with TokenLoader(folder, **options).prefetch() as prefetched:
        for batches in (*loaders, prefetched):
            code = "for _ in range(20): next(batches)"
            seconds = min(timeit.repeat(code, globals={"batches": batches}, number=1, repeat=9))
            assert 20 * 64 * 1024 / seconds > 20e6


# The commands.


def test_list_names_each_case_of_the_device_and_help_needs_no_torch() -> None:
    names = called("list").stdout
    assert "train-124M-fp32 " in names
    assert "train-1558M " not in names
    code = "import sys, bench; assert not {'torch', 'numpy', 'pyarrow'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("run --only trian", 2, "no case is called 'trian' on cpu: there are train-7M-fp32; "),
        ("compare --base HEAD --only trian", 2, "no case is called 'trian' on cpu"),
        ("compare --base no-such --only start-data", 1, "'no-such' is no commit of "),
        ("train --only llm.c", 2, "no case is called 'llm.c' on cpu: there are ours; ours, compiled; gpt2-"),
        ("train --model n_layer=x", 2, "give a field of the model and its number: n_layer=2"),
        ("record --to /nowhere/a.json", 2, "'/nowhere/a.json': No such file or directory"),
        ("data --source /nowhere/*.parquet", 2, "no file matches '/nowhere/*.parquet'"),
        ("decode -d cuda", 2, "this torch sees no GPU"),
        ("decode --rounds 0", 2, "Invalid value for '--rounds'"),
    ],
)
def test_wrong_words_are_refused_before_work(words, code, message) -> None:
    assert message in " ".join(called(*words.split(), code=code).stderr.split())


@pytest.mark.slow
def test_run_gives_speed_memory_and_the_share_of_the_machine(tmp_path) -> None:
    only = ["--only", "start-data", "--only", "data-v"]
    document = document_of("run", *only)
    assert document["absent"] == {}
    verify, start = document["results"]
    assert (start["name"], verify["name"]) == ("start-data", "data-verify")
    assert 0.01 < verify["share"]["median"] < 2
    assert (start["ceiling"], len(start["seconds"]["rounds"])) == (None, 1)
    assert 1e6 < start["peak_memory"] < 1e9
    assert start["per_second"]["median"] * start["seconds"]["median"] == pytest.approx(1)

    to = tmp_path / "results.jsonl"
    to.write_text("{}\n")
    assert "% of sha256" in called("record", *only, "--rounds", 2, "--to", to).stdout
    before, added = map(json.loads, to.read_text().splitlines())
    assert before == {}
    assert added["results"]["start-data"]["unit"] == "starts"
    assert added["machine"] == document["machine"]


def fails(bench: Bench) -> Ready:
    raise ValueError("not installed")


def counts(bench: Bench) -> Ready:
    return Ready(lambda: {"seconds": 2.0, "answer": {"count": [1]}}, 10, warm_up=0)


@pytest.mark.slow
def test_a_case_that_fails_is_absent_and_a_bar_exits_with_1(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the cases' processes find them
    groups = [[Case(name, "", "items", f"test_bench.{name}") for name in ("counts", "fails")]]
    options = {"only": (), "device": "cpu", "rounds": 2, "threads": 1, "as_json": True, "check": True}
    with click.Context(bench.main):
        document = bench.measure("eval", "title", groups, [("counts", "", 5)], **options)
        assert document["absent"] == {"fails": "not installed"}
        assert document["results"][0]["per_second"]["rounds"] == [5, 5]
        with pytest.raises(SystemExit, match="1"):
            bench.measure("eval", "title", groups, [("counts", "", 5.1)], **options)


@pytest.fixture
def clone(tmp_path):
    """The packages and the tools as they lie here, in a repository of their own."""
    for part in ("packages", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / part, tmp_path / "clone" / part, ignore=ignored)
    git = ["git", "-C", tmp_path / "clone", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in ("init --quiet", "add --all", "commit --quiet --message all"):
        subprocess.run([*git, *words.split()], check=True)
    return tmp_path / "clone"


@pytest.mark.slow
def test_compare_catches_a_regression_that_was_planted(clone) -> None:
    """Every text is tokenised four times. The bound is far from both ratios: tests run beside this one."""
    (temporary := clone.parent / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TMPDIR"] = str(temporary)
    words = ["compare", "--base", "HEAD", "--rounds", "3", "--least", "0.5", "--json", "--only"]
    command = [sys.executable, "tools/bench.py", *words]
    tokenizer = clone / "packages/gpt2-data/src/gpt2_data/tokenizer.py"

    def compare(more: str):
        with tokenizer.open("a") as file:
            file.write(more)
        words = [*command, "tokenize-gigatoken"]
        return subprocess.run(words, cwd=clone, capture_output=True, text=True, env=environment, check=False)

    planted = compare(PLANTED)
    assert planted.returncode == 1, planted.stderr
    assert json.loads(planted.stdout)["results"][0]["ratio"]["median"] < 0.5
    assert "does not hold: tokenize-gigatoken: 0.5 of the speed of HEAD: 0." in planted.stderr
    broken = compare(BROKEN)
    assert broken.returncode == 1, broken.stderr
    assert "does not hold: tokenize-gigatoken: works (broken on purpose)" in broken.stderr
    subprocess.run(["git", "-C", clone, "checkout", "--quiet", "."], check=True)
    unchanged = compare("")
    assert unchanged.returncode == 0, unchanged.stderr
    assert 0.5 < json.loads(unchanged.stdout)["results"][0]["ratio"]["median"] < 2

    words = [*command, "start-data"]
    child = subprocess.Popen(words, cwd=clone, stderr=subprocess.PIPE, text=True, env=environment)
    with child.stderr as said:
        assert said.readline() == "start-data\n"
        child.terminate()
        assert said.read().endswith("stopped\n")
    assert child.wait(20) == 130
    worktrees = subprocess.run(["git", "-C", clone, "worktree", "list"], capture_output=True, check=True).stdout
    assert worktrees.count(b"\n") == 1
    assert list(temporary.iterdir()) == []


# Each benchmark from end to end on a small model, and which cases it times; others may not be installed.
TIMED = {
    # In a folder that is no clone of nanoGPT.
    f"train {TINY} --seq-len 64 --batch 2 --nanogpt . --only ours --only gpt2-t* --only *ers --only nanoGPT": (
        ["ours", "gpt2-train", "transformers"], {"nanoGPT": "model is not installed"}, 0
    ),
    f"decode {TINY} --model block_size=64 --only *fp32?x1": (["ours fp32 x1", "transformers fp32 x1"], {}, 1),
    # Scores that differ would be refused: ours in one call, the others' a part in each round.
    f"eval {TINY} --data items.jsonl --rounds 2": (
        ["ours, karpathy", "build-nanogpt's method", "ours, lm-eval", "lm-evaluation-harness"], {}, 2
    ),
    # Tokens that differ, too.
    "data --megabytes 4": (
        ["ours, gigatoken", "ours, tiktoken", "build-nanogpt's method", "build-nanogpt's, half", "loader",
         "gpt2-data", "sha256sum"], {}, 6
    ),
    f"scaling {TINY} --only *x4": (["two alone, x4", "two ranks, x4"], {}, 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("words", TIMED)
def test_each_benchmark(tmp_path, monkeypatch, words) -> None:
    monkeypatch.chdir(tmp_path)
    draw, lines = random.Random(0), []
    vocabulary = ["person", "then", "takes", "a", "red", "ball", "and", "throws", "over", "the", "high", "wall"]
    for number in range(30):
        context, *endings = (" ".join(draw.choices(vocabulary, k=draw.randint(3, 20))) for _ in "01234")
        texts = {"ctx": f"{context} They", "ctx_a": context, "ctx_b": "they", "endings": endings}
        lines.append(json.dumps({"ind": number, "label": number % 4, "activity_label": "Games", **texts}))
    Path("items.jsonl").write_text("\n".join(lines))

    names, absent, bars = TIMED[words]
    document = document_of(*words.split())
    results = [one for one in document["results"] if "ctranslate2" not in one["name"]]
    assert [one["name"] for one in results] == names
    assert {name: why for name, why in document["absent"].items() if "ctranslate2" not in name} == absent
    assert len(document["bars"]) >= bars
    assert all(0 < one["share"]["median"] < 1.5 for one in results if one["ceiling"])
    first, peer = (one["per_second"]["rounds"] for one in results[:2])
    assert results[1]["ratio"]["rounds"] == [ours / other for ours, other in zip(first, peer, strict=True)]


def test_build_nanogpt_s_shards_hold_eot_before_each_document(tmp_path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    data.build_nanogpt([str(tmp_path / "a.parquet")], 1, str(tmp_path / "out"))
    assert np.load(tmp_path / "out" / "edufineweb_val_000000.npy").tolist() == [50256, 505, 50256, 50256, 11545]
    with pytest.raises(ValueError, match="nonsense is not installed"):
        peers.library("nonsense")
