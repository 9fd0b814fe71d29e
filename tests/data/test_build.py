"""A build's result, compared with one worked out by hand here."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_data import BuildConfig, build, get_tokenizer, open_dataset, tokenizer, verify
from gpt2_data import gigatoken as fast
from gpt2_data.building import estimate, plan
from gpt2_data.order import permute
from gpt2_data.sources import files as readers


def expected_splits(documents, val_tokens, seed=None):
    """{split: tokens} by the words of the design."""
    encode = get_tokenizer().encode_ordinary
    ids = [[50256, *encode(text or "")] for text in documents]
    if seed is not None:
        ids = [ids[i] for i in permute(np.arange(len(ids)), len(ids), seed).tolist()]
    val = 0
    while sum(map(len, ids[:val])) < val_tokens:
        val += 1
    return {"val": list(itertools.chain(*ids[:val])), "train": list(itertools.chain(*ids[val:]))}


def stored(folder, split):
    """The tokens in a split's shards, read without our reader, and where documents start by the sidecars."""
    tokens, starts = [], []
    for shard in json.loads((folder / "dataset.json").read_bytes())["shards"]:
        if shard["split"] == split:
            data, docs = (folder / shard["file"]).read_bytes(), (folder / shard["docs"]["file"]).read_bytes()
            magic, version, count = struct.unpack("<3i", data[:12])
            assert (magic, version) == (20240520, 1)
            offsets = struct.unpack(f"<{(len(docs) - 24) // 8}Q", docs[24:])
            starts += [len(tokens) + offset for offset in offsets]
            tokens += struct.unpack(f"<{count}H", data[1024:])
            assert len(offsets) == shard["documents"]
            assert count == shard["tokens"]
    return tokens, starts


@pytest.mark.parametrize("order", ["source", "shuffled"])
@pytest.mark.parametrize(("val_tokens", "shard_size"), [(0, 10**6), (500, 700), (1, 640), (3000, 1000)])
def test_tokens_splits_and_documents(make, texts, order, val_tokens, shard_size):
    texts = ["", *texts, ""]
    folder = make(texts, order=order, seed=5, val_tokens=val_tokens, shard_size=shard_size)
    for split, tokens in expected_splits(texts, val_tokens, 5 if order == "shuffled" else None).items():
        there, starts = stored(folder, split)
        assert there == tokens
        assert starts == [i for i, token in enumerate(tokens) if token == 50256]
    assert max(shard.tokens for shard in open_dataset(folder).manifest.shards) <= shard_size
    assert verify(folder, "full").ok


def test_files_and_their_names(make):
    folder = make(["Hello world"] * 10, val_tokens=4, shard_size=10)
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.jsonl",
        "dataset.json",
        *[f"train_{i:06d}.{ending}" for i in (1, 2, 3) for ending in ("bin", "docs")],
        "val_000000.bin",
        "val_000000.docs",
    ]
    header, tokens = struct.pack("<256i", 20240520, 1, 10, *[0] * 253), [50256, 15496, 995] * 4
    assert (folder / "train_000001.bin").read_bytes() == header + struct.pack("<10H", *tokens[:10])
    assert (folder / "train_000001.docs").read_bytes() == b"GPT2DOCS" + struct.pack("<6Q", 1, 4, 0, 3, 6, 9)
    # The fourth document goes on here: none starts at 0.
    assert (folder / "train_000002.docs").read_bytes() == b"GPT2DOCS" + struct.pack("<5Q", 1, 3, 2, 5, 8)


def test_documents_that_fill_or_exceed_a_shard(make):
    hello = "Hello world"  # three tokens with its EOT
    for documents, size, counts in [
        ([hello, hello], 3, [1, 1]),  # each fills one exactly
        ([hello * 50, hello], 10, None),  # longer than ten shards
        ([hello] * 2, 6, [2]),
        ([hello], 1, [1, 0, 0]),
    ]:
        folder = make(documents, shard_size=size)
        tokens, starts = stored(folder, "train")
        assert (tokens, len(starts)) == (expected_splits(documents, 0)["train"], len(documents))
        if counts is not None:
            assert [shard.documents for shard in open_dataset(folder).manifest.shards] == counts


def test_documents_in_parts_are_one_document(tmp_path, monkeypatch):
    text = "One line.\nTwo lines.\n\n  Three.\n" * 300
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    monkeypatch.setattr(readers, "BLOCK", 200)
    build(BuildConfig([tmp_path / "*.txt"], tmp_path / "out", val_tokens=0, workers=1, order="source"))
    tokens, starts = stored(tmp_path / "out", "train")
    assert (tokens, len(starts)) == (expected_splits([text, "short"], 0)["train"], 2)


def test_source_counts_are_recorded(make, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": ""}\n\n{"text": null}\n{"text": "caf\xe9"}\n')
    pq.ParquetWriter(folder / "b.parquet", pa.schema([("text", pa.string())])).close()  # not a row group
    sources = [folder / "a.jsonl", folder / "b.parquet"]
    result = build(BuildConfig(sources, tmp_path / "out", val_tokens=0, workers=1))
    assert (result.documents, result.documents_empty, result.documents_replaced) == (4, 2, 1)
    source = open_dataset(tmp_path / "out").manifest.source
    assert source["text_bytes"] == 3 + 6
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    assert {item["name"]: item["sha256"] for item in source["inputs"]} == hashes
    assert str(tmp_path) not in (tmp_path / "out" / "dataset.json").read_text()
    line = json.loads((tmp_path / "out" / "build.jsonl").read_bytes())
    assert (line["workers"], "tiktoken" in line["versions"]) == (1, True)


def test_a_finished_dataset_is_left_alone(make, texts, tmp_path, files_of):
    folder = make(texts, shard_size=1000)
    before = files_of(folder), (folder / "build.jsonl").read_bytes()
    source = tmp_path / "source1" / "*.jsonl"
    config = {"val_tokens": 0, "shard_size": 1000, "workers": 1, "order": "source"}
    (tmp_path / "other.jsonl").write_text('{"text": "other"}\n')
    (folder / ".build").mkdir()  # as a kill in the last moment leaves it
    (folder / ".build" / "unit-00000.u16").touch()
    result = build(BuildConfig([source], folder, **config))
    assert result.already_built
    assert result.tokens == len(stored(folder, "train")[0])
    with pytest.raises(ValueError, match="its shard_size is 1000, 900 is wanted"):
        build(BuildConfig([source], folder, **(config | {"shard_size": 900})))
    message = "its order is source, shuffled is wanted.: add --order source to keep it"
    with pytest.raises(ValueError, match=message):  # as a command of version 0.1, repeated
        build(BuildConfig([source], folder, **(config | {"order": None})))
    with pytest.raises(ValueError, match="its source differs"):
        build(BuildConfig([tmp_path / "other.jsonl"], folder, **config))
    assert (files_of(folder), (folder / "build.jsonl").read_bytes()) == before
    (folder / "train_000000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged: train_000000\.bin: cut short.*delete it and build again"):
        build(BuildConfig([source], folder, **config))


def test_nothing_left_for_training(make, write_jsonl, tmp_path, texts):
    config = BuildConfig([write_jsonl(texts) / "*.jsonl"], tmp_path / "out", val_tokens=10**8, workers=1)
    message = r"the source has 2\d,\d{3} tokens in 120 documents.*try --val-tokens (\d+)"
    with pytest.raises(ValueError, match=message) as error:
        build(config)
    assert not (tmp_path / "out" / "dataset.json").exists()
    proposal = int(re.search(message, str(error.value))[1])
    result = build(dataclasses.replace(config, val_tokens=proposal))
    assert 0 < result.val_tokens < result.tokens
    assert result.text_mb_per_second == 0  # what was tokenized before was used
    with pytest.raises(ValueError, match="try --val-tokens 0 or more documents"):
        make(["only one"], val_tokens=1)
    text = "a document of more than ten tokens, alone in its source: none is left for validation"
    assert open_dataset(make([text], val_tokens=None)).manifest.tokens("val") == 0
    with pytest.raises(ValueError, match="the source contains no text"):
        make(["", ""])


def test_folders_that_cannot_be_used(write_jsonl, tmp_path):
    source = write_jsonl(["a", "b"]) / "*.jsonl"
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train_000007.bin").touch()
    (tmp_path / "swift" / ".build" / "debug").mkdir(parents=True)
    for name, message in [
        ("file", "is a file"),
        ("foreign", r"holds train_000007\.bin but no dataset\.json"),
        ("swift", "was not made by gpt2-data"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(BuildConfig([source], tmp_path / name, val_tokens=0, workers=1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.txt").write_text("mine")
    build(BuildConfig([source], tmp_path / "notes", val_tokens=0, workers=1))
    assert (tmp_path / "notes" / "README.txt").read_text() == "mine"
    assert verify(tmp_path / "notes").ok


def test_the_source_is_planned_once(write_jsonl, tmp_path, monkeypatch):
    """Whatever a build comes to, and in a dry run; not at all if the dataset is known by its files' times."""
    source = write_jsonl(["a", "b", "c"], files=3)
    plans = []

    def counting(config):
        plans.append(config)
        return plan.make_plan(config)

    monkeypatch.setattr("gpt2_data.building.build.make_plan", counting)
    config = BuildConfig([source / "*.jsonl"], tmp_path / "out", val_tokens=0, workers=1, order="source")

    def number(**changes):
        plans.clear()
        result = build(dataclasses.replace(config, **changes))
        return len(plans), result.finished, result.already_built

    assert number() == (1, True, False)
    assert number() == (0, True, True)
    os.utime(source / "000.jsonl", ns=(0, 0))
    assert number() == (1, True, True)  # known by its content
    monkeypatch.setattr(plan, "UNIT_BYTES", 1)
    assert number(out=tmp_path / "parts", part=(1, 2)) == (1, False, False)
    assert number(out=tmp_path / "parts", part=(2, 2)) == (1, True, False)
    plans.clear()
    monkeypatch.setattr(estimate, "make_plan", counting)
    estimate.print_plan(config, as_json=True)
    assert len(plans) == 1


def test_what_fails_at_once_leaves_no_folder(write_jsonl, tmp_path, monkeypatch):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "damaged.jsonl").write_text("{]")
    (tmp_path / "empty.txt").touch()
    good = write_jsonl(["a", "b"]) / "000.jsonl"
    for source, message in [
        ("missing.txt", "no file matches"),
        ("notes.docx", "unknown source"),
        ("damaged.parquet", "damaged.parquet"),
        ("damaged.jsonl", "not JSON"),
        ("empty.txt", "the source contains no text"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            build(BuildConfig([tmp_path / source], tmp_path / "data" / "x", workers=1))
        assert not (tmp_path / "data" / "x").exists()
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    for out in tmp_path / "full", tmp_path / "mine":
        # Noticed before the work starts.
        with pytest.raises(OSError, match="about .* GB are needed, 0.0 GB are free"):
            build(BuildConfig([good], out, val_tokens=0, workers=1))
    assert not (tmp_path / "full").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_input_that_changes_meanwhile_is_noticed(write_jsonl, tmp_path):
    source = write_jsonl(["a", "b"])

    def change(phase, done, *_):
        if phase == "tokenizing" and done:
            with (source / "000.jsonl").open("a") as file:
                file.write('{"text": "c"}\n')

    with pytest.raises(ValueError, match=r"000\.jsonl was changed during the build"):
        build(BuildConfig([source / "*.jsonl"], tmp_path / "out", val_tokens=0, workers=1), change)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_options_that_cannot_work_and_the_order_s_default(tmp_path):
    for options, message in [
        ({"shard_size": 0}, "shard_size is 0 tokens, must be 1 to 2,147,483,647"),
        ({"shard_size": 2**31}, "shard_size"),
        ({"val_tokens": -1}, "val_tokens is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"limit_docs": 0}, "limit_docs is 0"),
        ({"format": "csv"}, "format is 'csv', must be uint16 or arrow"),
        ({"tokenizer": "bpe"}, "must be auto or tiktoken or gigatoken"),
        ({"order": "random"}, "must be shuffled or source"),
        ({"engine": "dask"}, "must be local or ray"),
        ({"part": (3, 2)}, "part 3/2: parts are counted from 1"),
        ({"part": (1, 2), "engine": "ray"}, "choose one"),
        ({"compat": "llm.c"}, "must be build-nanogpt"),
        ({"compat": "build-nanogpt", "order": "shuffled"}, "leave them out"),
    ]:
        with pytest.raises(ValueError, match=message):
            BuildConfig(["pydocs"], tmp_path, **options)
    with pytest.raises(ValueError, match="no source given: choose from fineweb-edu"):
        BuildConfig([], tmp_path)
    assert BuildConfig(["pydocs"], tmp_path).order == "shuffled"
    assert BuildConfig(["pydocs"], tmp_path, compat="build-nanogpt").order == "source"


def build_nanogpt_shards(documents, shard_size):
    """The shards that build-nanogpt's fineweb.py would write, in its own steps: the first is validation.

    It ends with an error where a document is longer than a shard.
    """
    encode = get_tokenizer().encode_ordinary
    shards, buffer = [], []
    for document in documents:
        tokens = [50256, *encode(document)]
        if len(buffer) + len(tokens) < shard_size:
            buffer += tokens
        else:
            remainder = shard_size - len(buffer)
            shards.append(buffer + tokens[:remainder])
            buffer = tokens[remainder:]
    return [*shards, buffer] if buffer else shards


def test_compat_gives_build_nanogpt_s_split_and_cut(make, texts):
    hello = "Hello world"  # three tokens with its EOT: it may fill a shard to the token, and nothing follows
    cases = [(texts, 1500), (texts, 2222), (texts, 5000), ([hello] * 4, 6), ([hello] * 2, 3), ([hello] * 5, 4)]
    for documents, size in cases:
        folder = make(documents, shard_size=size, compat="build-nanogpt", val_tokens=None)
        wanted = build_nanogpt_shards(documents, size)
        listed = json.loads((folder / "dataset.json").read_bytes())["shards"]
        assert [shard["split"] for shard in listed] == ["val"] + ["train"] * (len(wanted) - 1)
        assert [shard["tokens"] for shard in listed] == list(map(len, wanted))
        assert stored(folder, "val")[0] + stored(folder, "train")[0] == list(itertools.chain(*wanted))
        assert verify(folder, "full").ok
    with pytest.raises(ValueError, match="nothing is left for training"):
        make([hello] * 2, shard_size=6, compat="build-nanogpt", val_tokens=None)


def test_a_difference_of_the_tokenizers_ends_the_build_and_names_the_document(make, texts, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")

    def encode(self, data, offsets):
        tokens, places = real(self, data, offsets)
        tokens = tokens.copy()
        tokens[places[4]] += 1
        return tokens, places

    real = fast.Encoder.encode
    monkeypatch.setattr(fast.Encoder, "encode", encode)
    monkeypatch.setattr(tokenizer, "CHECK_EVERY", 4)
    message = r"unit 0 .*000\.jsonl\): document 4 of it, counted from 0: .*--tokenizer tiktoken"
    with pytest.raises(ValueError, match=message):
        make(texts, tokenizer="gigatoken")
    assert not (tmp_path / "dataset1" / "dataset.json").exists()
