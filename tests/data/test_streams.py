"""Datasets that are not Parquet, streamed from a hub on this machine by the `datasets` library."""

import gzip
import io
import json
import re
import sys

import pyarrow as pa
import pytest
from hub_server import SECOND, Drop, Refuse

from gpt2_data.sources import hub
from gpt2_data.sources.hub import HubSource, Listing, list_files

pytestmark = pytest.mark.slow
TEXTS = [
    [f"document {i} of {shard}, naïve 日本語" if i % 5 else (None if i % 2 else "") for i in range(700)]
    for shard in range(3)
]


def jsonl(texts, **row):
    lines = [json.dumps({"id": i, "text": text} | row) + "\n" for i, text in enumerate(texts)]
    return "".join(lines).encode()


def run(server, folder, code, *arguments):
    """What a process with an empty cache prints; `datasets` reads the environment on import."""
    head = (
        "import json, sys, warnings\nwarnings.simplefilter('ignore')\n"
        "from gpt2_data.sources import hub\n"
        "def read(listing, shard, column='text'):\n"
        "    return list(hub.stream(listing, shard, column))\n"
        "def said(function, *arguments):\n"
        "    try:\n        return function(*arguments)\n"
        "    except (ValueError, OSError) as error:\n        return f'{type(error).__name__}: {error}'\n"
    )
    process = server.start(head + code, *arguments, HF_HOME=str(folder), HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


ALL = """
listings = []
import datasets
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.1  # seconds
for name in sys.argv[1:]:
    listing = hub.list_files(hub.parse(name))
    assert not listing.parquet
    listings.append([read(listing, shard) for shard in range(hub.num_shards(listing))])
print(json.dumps(listings))
"""


def test_every_kind_of_file(server, tmp_path):
    """JSON lines, CSV by the card's options, text, Arrow."""
    server.add("a/lines", {f"data/{i}.jsonl.gz": gzip.compress(jsonl(texts)) for i, texts in enumerate(TEXTS)})
    configs = [{"config_name": "de", "sep": ";", "data_files": "de/*.csv"}]
    csv = "n;text\n" + "".join(f"{i};document {i}, it is\n" for i in range(300))
    files = {"de/a.csv": csv.encode(), "fr/b.csv": b"text\nun\ndeux\n"}
    server.add("a/csv", files, configs=configs)
    server.add("a/text", {"train.txt": b"one\ntwo\n", "test.txt": b"three\n"})
    table, arrow = pa.table({"n": [1, 2], "text": ["eins", None]}), io.BytesIO()
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    server.add("a/arrow", {"data-00000-of-00001.arrow": arrow.getvalue()})

    expected = {
        "hf:a/lines": TEXTS,
        "hf:a/csv:de": [[f"document {i}, it is" for i in range(300)]],
        "hf:a/csv:fr": [["un", "deux"]],  # a folder that the card leaves out
        "hf:a/text::test": [["three"]],
        "hf:a/arrow": [["eins", None]],
    }
    server.faults = [Drop(at=1000, path="0.jsonl"), Refuse(store=False, path="0.jsonl", status=429)]
    assert run(server, tmp_path, ALL, *expected) == list(expected.values())
    assert not any(fault.times for fault in server.faults)  # a connection that breaks is tried again


def test_a_shard_is_the_same_in_another_process_and_after_main_moved(server, tmp_path):
    server.add("a/lines", {f"{i}.jsonl": jsonl(texts) for i, texts in enumerate(TEXTS)})
    listing = json.dumps(list_files(HubSource("a/lines")).to_json())
    server.add("a/lines", {f"{i}.jsonl": jsonl(["other"]) for i in range(2)}, SECOND)
    code = "print(json.dumps(read(hub.Listing.from_json(json.loads(sys.argv[1])), int(sys.argv[2]))))"
    assert [run(server, tmp_path / "2", code, listing, i) for i in (2, 0)] == [TEXTS[2], TEXTS[0]]


def test_what_is_wrong_is_said_in_one_line(server, tmp_path):
    server.add("a/lines", {"0.jsonl": jsonl(TEXTS[0])})
    server.add("a/broken", {"0.jsonl.gz": gzip.compress(jsonl(TEXTS[0]))[:500] + b"garbage" * 100})
    server.add("a/strange", {"0.unknown": b"what"})
    code = """
listings = {name: hub.list_files(hub.parse(f"hf:a/{name}")) for name in ("lines", "broken", "strange")}
print(json.dumps([
    said(read, listings["lines"], 0, "body"),
    said(read, listings["lines"], 0, "id"),
    said(read, listings["broken"], 0),
    said(hub.num_shards, listings["strange"]),
]))"""
    missing, numbers, broken, strange = run(server, tmp_path, code)
    assert missing == "ValueError: hub dataset a/lines: no column 'body'; the columns are id, text"
    assert numbers == "ValueError: hub dataset a/lines: column 'id' holds int, not strings"
    for said, name in ((broken, "broken"), (strange, "strange")):
        assert re.match(f"(OS|Value)Error: hub dataset a/{name}: .", said)
        assert "\n" not in said


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub._open.cache_clear()
    with pytest.raises(ValueError, match=r"^hub dataset a/b: it is not Parquet: pip install 'gpt2-data\[datasets"):
        hub.num_shards(Listing("a/b", SECOND, None, "train", ()))
