"""How much memory a build takes: the figures that the README states, whatever the source."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_data import gigatoken as fast
from gpt2_data.sources import pydocs

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")

PARENT = 150  # MB
WORKER = {"tiktoken": 350, "gigatoken": 800}  # MB, for documents of ordinary length

SCRIPT = """
import json, multiprocessing, re, resource, sys, time
from gpt2_data import BuildConfig, build

if __name__ == "__main__":
    result = build(BuildConfig(**json.loads(sys.argv[1])))
    parent = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    while multiprocessing.active_children():  # only one that was waited for is counted
        time.sleep(0.01)
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([int(parent) * 1024 / 1e6, worker * 1024 / 1e6, result.tokens, result.documents]))
"""


def peaks(tmp_path, sources, workers, **options):
    """Build in processes of its own: MB of the parent at its peak, of the largest worker, tokens, documents."""
    script = tmp_path / "script.py"  # a file, for the workers are spawned
    script.write_text(SCRIPT)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    config = {"sources": [str(path) for path in sources], "out": str(out), "workers": workers, "val_tokens": 0}
    command = [sys.executable, str(script), json.dumps(config | options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    print(sources, options, done.stdout)
    return json.loads(done.stdout)


def write_corpus(path, megabytes, row_group):
    """Python's own text again and again, each document with words of its own."""
    rng = random.Random(megabytes)
    documents = [text for _, text in pydocs.documents()]
    written = 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while written < megabytes * 1e6:
            texts = [f"{rng.getrandbits(64):x} {rng.choice(documents)}" for _ in range(row_group)]
            writer.write_table(pa.table({"text": texts}))
            written += sum(map(len, texts))
    return path


LIBRARIES = pytest.mark.parametrize("library", [pytest.param("tiktoken", marks=pytest.mark.long), "gigatoken"])


@pytest.mark.slow
@LIBRARIES
def test_eight_times_the_source_takes_no_more(tmp_path, library):
    small, large = (16, 128) if library == "gigatoken" else (2, 16)
    options = {"workers": 2, "tokenizer": library, "order": "shuffled", "shard_size": 5_000_000}
    files = [write_corpus(tmp_path / f"{i}.parquet", small, 1000) for i in range(large // small)]
    few = peaks(tmp_path, files[:2], **options)  # two, so that there are workers
    many = peaks(tmp_path, files, **options)
    assert many[2] > 3 * few[2]
    assert many[0] < PARENT
    assert many[0] - few[0] < 20
    assert many[1] < WORKER[library]
    assert many[1] - few[1] < (100 if library == "tiktoken" else 300)  # gigatoken's cache may grow to its bound


@pytest.mark.slow
@LIBRARIES
def test_many_small_documents_and_row_groups(tmp_path, library):
    lines = (f'{{"text": "{"" if i % 9 == 0 else i}"}}\n' for i in range(200_000))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    found = peaks(tmp_path, [tmp_path / "a.jsonl"], 1, tokenizer=library, order="shuffled")
    assert found[3] == 200_000
    assert found[0] < WORKER[library]
    pq.write_table(pa.table({"text": list(map(str, range(2000)))}), tmp_path / "a.parquet", row_group_size=2)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1000
    assert peaks(tmp_path, [tmp_path / "a.parquet"], 1, tokenizer=library)[0] < WORKER[library]


@pytest.mark.slow
def test_a_hundred_megabytes_on_a_line(tmp_path):
    """A text file is read in parts; of JSON and Parquet a document is held, a few times over."""
    fast.find_proof()
    words = ("the quick brown fox, jumps over 1234 dogs. " * 2_400_000)[:100_000_000]
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": words}) + "\n")
    text = peaks(tmp_path, [tmp_path / "a.txt"], 1)
    line = peaks(tmp_path, [tmp_path / "a.jsonl"], 1)
    assert text[2] == line[2] > 25_000_000
    assert text[0] < WORKER["tiktoken"]
    assert line[0] < 200 + 6 * 100


@pytest.mark.slow
def test_a_small_parquet_file_that_stands_for_much(tmp_path):
    """A page of 100 MB is read bit by bit."""
    fast.find_proof()
    table = pa.table({"text": ["word " * 20_000] * 1000})
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "b.parquet").stat().st_size < 100_000
    found = peaks(tmp_path, [tmp_path / "b.parquet"], 1)
    assert found[3] == 1000
    assert found[0] < 200 + 6 * 100
