"""Arrow shards: what pyarrow and datasets see in them, and that their tokens are the uint16 shards'."""

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gpt2_data import BuildConfig, TokenLoader, build, open_dataset, verify
from gpt2_data.formats import arrow, manifest, verification

SHUFFLED = {"order": "shuffled", "seed": 5, "shard_size": 700, "val_tokens": 900}


def written(tokens, starts, ids):
    file = io.BytesIO()
    facts = arrow.write_shard(file, len(tokens), [np.array(tokens, np.uint16)], np.array(starts), np.array(ids))
    assert facts.bytes == len(file.getvalue()) == arrow.shard_bytes(len(tokens), len(starts))
    assert facts.sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    assert facts.tokens_sha256 == hashlib.sha256(np.array(tokens, "<u2").tobytes()).hexdigest()
    return file.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The same documents as uint16 and as Arrow shards: .jsonl, uint16, arrow."""
    folder = tmp_path_factory.mktemp("built")
    rng = random.Random(3)
    lines = [json.dumps({"text": "a naïve 🙂 " * rng.choice([1, 5, 30, 90])}) + "\n" for _ in range(120)]
    (folder / "texts.jsonl").write_text("".join(lines))
    for form in "uint16", "arrow":
        build(BuildConfig([folder / "texts.jsonl"], folder / form, workers=1, **SHUFFLED, format=form))
    return folder


@pytest.fixture
def pair(built, tmp_path):
    """A copy of both, to break."""
    return tuple(Path(shutil.copytree(built / form, tmp_path / form)) for form in ("uint16", "arrow"))


def test_a_shard_is_these_bytes():
    data = written([50256, 1, 2, 50256, 3], [0, 3], [7, 2**40])
    start = len(data) - 24  # 10 bytes of tokens, 6 to a multiple of 8, and the end of the stream
    assert data[:8] == struct.pack("<Ii", 0xFFFFFFFF, 296)  # a message of the stream format, not the file format
    assert start % 64 == 0
    assert data[start : start + 10] == struct.pack("<5H", 50256, 1, 2, 50256, 3)
    assert data[start - 64 : start - 52] == struct.pack("<3i", 0, 3, 5)
    assert data[start - 128 : start - 112] == struct.pack("<2q", 7, 2**40)
    assert data[start + 10 :] == bytes(6) + b"\xff\xff\xff\xff" + bytes(4)
    # Pinned: another version of any library must not change a byte.
    assert hashlib.sha256(data).hexdigest() == "f69c48cd205c73ecb223fa8510e9a5271c8da2398fd8de3667ac7ba1da90521b"


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 1), (64, 3), (1000, 1000), (70_001, 513)])
def test_pyarrow_reads_it_and_says_the_same(tokens, rows):
    rng = np.random.default_rng(tokens)
    values = rng.integers(0, 50257, tokens, np.uint16)
    starts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, tokens), rows - 1, replace=False))]).astype(int)
    data = written(values, starts, np.arange(rows) * 3)
    ids, offsets = pa.array(np.arange(rows) * 3), pa.array([*starts, tokens], pa.int32())
    batch = pa.record_batch({"id": ids, "tokens": pa.ListArray.from_arrays(offsets, pa.array(values))})
    with pa.ipc.open_stream(data) as reader:
        assert reader.schema == batch.schema
        (ours,) = reader
    ours.validate(full=True)
    assert ours.equals(batch)


def test_the_tokens_lie_in_the_file_in_one_piece(pair):
    shard = manifest.load(pair[1]).shards[1]
    with pa.memory_map(str(pair[1] / shard.file)) as file:
        base = file.read_buffer(1).address
        file.seek(0)
        batch = pa.ipc.open_stream(file).read_next_batch()
        values = batch.column("tokens").values.buffers()[1]
        opened = manifest.open_shard(pair[1], shard)
        assert values.address - base == opened.start
        assert values.address % 64 == 0
        assert hashlib.sha256(memoryview(values)[: 2 * shard.tokens]).hexdigest() == shard.tokens_sha256


def test_datasets_opens_it(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    whole = open_dataset(pair[1])
    rows = datasets.Dataset.from_file(str(pair[1] / "train_000002.arrow"))
    assert list(itertools.chain(*rows["tokens"])) == whole.read("train", 0, 700).tolist()  # training's first
    files = [str(pair[1] / shard.file) for shard in whole.manifest.split("train")]
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert list(itertools.chain(*loaded["tokens"])) == whole.read("train", 0, whole.tokens("train")).tolist()


def test_the_same_tokens_and_documents_as_uint16(pair):
    manifests = [manifest.load(folder) for folder in pair]
    assert [shard.file for shard in manifests[1].shards[:2]] == ["val_000000.arrow", "val_000001.arrow"]
    assert all(shard.docs is None for shard in manifests[1].shards)
    for shards in zip(*(each.shards for each in manifests), strict=True):
        for field in "split", "tokens", "documents", "max_token", "tokens_sha256":
            assert getattr(shards[0], field) == getattr(shards[1], field)
    assert len(manifests[1].shards) > 4
    one, other = (open_dataset(folder) for folder in pair)
    for split in "train", "val":
        assert np.array_equal(one.read(split, 0, one.tokens(split)), other.read(split, 0, other.tokens(split)))
        documents = list(other.documents(split))
        assert len(documents) == other.num_documents(split) == one.num_documents(split)
        for number, (document, wanted) in enumerate(zip(documents, one.documents(split), strict=True)):
            assert np.array_equal(document, wanted)
            assert np.array_equal(other.document(split, number), wanted)
    batches = [next(TokenLoader(folder, seq_len=64, batch_size=4)) for folder in pair]
    assert np.array_equal(*batches)


def test_a_row_says_which_document_of_the_source_it_is(pair, built, tmp_path):
    """Also after a shuffle, and if it goes on in the next shard."""
    build(BuildConfig([built / "texts.jsonl"], tmp_path / "in-order", workers=1, val_tokens=0, order="source"))
    in_order = open_dataset(tmp_path / "in-order")
    by_id = {number: document.tolist() for number, document in enumerate(in_order.documents("train"))}
    pieces = {}
    for shard in manifest.load(pair[1]).shards:
        table = pa.ipc.open_stream((pair[1] / shard.file).read_bytes()).read_all()
        for row in table.to_pylist():
            pieces[row["id"]] = pieces.get(row["id"], []) + row["tokens"]
    assert pieces == by_id
    assert len(by_id) > 100


def test_a_document_over_several_shards(make):
    folder = make(["a b c d e f g h i j k l", "x"], shard_size=5, format="arrow")
    tables = [pa.ipc.open_stream(path.read_bytes()).read_all() for path in sorted(folder.glob("*.arrow"))]
    assert [table["id"].to_pylist() for table in tables] == [[0], [0], [0, 1]]
    assert [shard.documents for shard in manifest.load(folder).shards] == [1, 0, 1]
    dataset = open_dataset(folder)
    assert [len(document) for document in dataset.documents("train")] == [13, 2]
    assert dataset.document_range("train", 1) == (13, 15)
    assert verify(folder, "full").ok


# --- broken ones


def damage(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def test_verify_finds_what_is_wrong(pair):
    folder = pair[1]
    path = folder / "train_000003.arrow"
    shard = next(shard for shard in manifest.load(folder).shards if shard.file == path.name)
    whole, start = path.read_bytes(), manifest.open_shard(folder, shard).start
    assert verify(folder, "full").ok
    unfit = f"document offsets do not fit the tokens of {path.name}"
    for at, data, problem, reading in [
        (start + 18, struct.pack("<H", 60000), "token 9 is 60000, not below 50257", "token 9 is 60000"),
        (start + 18, struct.pack("<H", 50256), unfit, None),
        # Where the second row begins, and where the first does.
        (start - 60, struct.pack("<i", -1), unfit, "offsets out of order"),
        (start - 64, struct.pack("<i", 1), "impossible row starts or ids: damaged", None),
    ]:
        damage(path, at, data)
        assert verify(folder, "fast").ok
        wanted = {f"{path.name}: {line}" for line in (problem, verification._DAMAGED)}
        assert wanted <= set(verify(folder, "full").problems)
        if reading:
            with pytest.raises(ValueError, match=rf"train_000003\.arrow: {reading}"):
                list(open_dataset(folder).documents("train"))
        path.write_bytes(whole)

    os.truncate(path, len(whole) - 1)
    assert verify(folder, "fast").problems[0].startswith(f"{path.name}: cut short")
    for other in whole + b"\0", (pair[0] / "train_000003.bin").read_bytes():
        path.write_bytes(other)
        assert len(verify(folder, "fast").problems) == 1
    assert "not an Arrow shard of 700 tokens" in verify(folder, "fast").problems[0]


@pytest.mark.parametrize("at", [0, 4, 330, 400, 500, 570])
def test_a_header_that_is_not_ours_is_never_followed(pair, at):
    """Each number in it has one right value: none is used to allocate or to seek."""
    shard = manifest.load(pair[1]).shards[0]
    damage(pair[1] / shard.file, at, struct.pack("<q", 2**40))
    (problem,) = verify(pair[1], "fast").problems
    assert problem.startswith(f"{shard.file}: not an Arrow shard of 700 tokens")
    with pytest.raises(ValueError, match="not an Arrow shard"):
        open_dataset(pair[1]).read("val", 0, 1)
