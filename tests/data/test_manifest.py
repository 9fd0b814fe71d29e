"""dataset.json, and what verify finds."""

import hashlib
import json
import os
import random
import re
import shutil
import struct
from pathlib import Path

import pytest

from gpt2_data import BuildConfig, build, open_dataset, verify
from gpt2_data.formats import manifest, verification


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    rng = random.Random(7)
    lines = [json.dumps({"text": "naïve <|endoftext|> 🙂 " * rng.choice([1, 3, 10, 40])}) for _ in range(90)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    build(BuildConfig([folder / "texts.jsonl"], folder / "made", workers=1, val_tokens=500, shard_size=3000))
    return folder / "made"


@pytest.fixture
def folder(built, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(built, tmp_path / "dataset"))


def test_written_the_same_way_and_named_by_its_hash(folder):
    data = (folder / "dataset.json").read_bytes()
    dataset = manifest.load(folder)
    assert dataset.to_bytes() == data
    assert dataset.hash == hashlib.sha256(data).hexdigest()
    content = json.loads(data)
    assert content["format_version"] == 1
    assert content["tokenizer"]["name"] == "gpt2"
    assert content["tokenizer"]["vocabulary_sha256"]["encoder.json"].startswith("19613966")
    for shard in content["shards"]:
        payload = (folder / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(payload).hexdigest()
        assert shard["tokens_sha256"] == hashlib.sha256(payload[1024:]).hexdigest()
        assert shard["bytes"] == len(payload)


def test_nothing_wrong(folder):
    for level in "fast", "full":
        report = verify(folder, level)
        assert report.ok
        assert report.files == 2 * len(manifest.load(folder).shards)
    with pytest.raises(ValueError, match="must be fast or full"):
        verify(folder, "slow")


def test_a_flipped_bit_is_found_by_the_full_level(folder):
    for name in "train_000002.bin", "val_000000.docs":
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 64]))
        assert verify(folder, "fast").ok
        problems = verify(folder, "full").problems
        assert f"{name}: damaged: its SHA-256 is not the one in dataset.json" in problems
        (folder / name).write_bytes(data)


def test_files_cut_missing_extra_and_swapped(folder):
    first, second = folder / "train_000001.bin", folder / "train_000002.bin"
    whole = first.read_bytes()
    os.truncate(first, 2000)
    assert verify(folder).problems == (
        "train_000001.bin: cut short: header says 3,000 tokens = 7,024 bytes, file has 2,000",
    )
    first.unlink()
    assert verify(folder).problems == ("train_000001.bin: missing",)
    with pytest.raises(FileNotFoundError):
        open_dataset(folder).read("train", 0, 1)
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)
    assert verify(folder, "fast").ok
    assert len([p for p in verify(folder, "full").problems if "SHA-256" in p]) == 2
    first.write_bytes(whole)  # and so the second is there twice
    assert len([p for p in verify(folder, "full").problems if "SHA-256" in p]) == 1
    (folder / "train_000099.bin").touch()
    assert "train_000099.bin: not part of this dataset; delete it" in verify(folder).problems


def test_a_shard_with_another_count_is_found(folder):
    name = "train_000001.bin"
    (folder / name).write_bytes(struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + b"\0\0")
    assert verify(folder).problems == (f"{name}: 1 tokens, dataset.json says 3,000",)
    with pytest.raises(ValueError, match=r"train_000001\.bin: 1 tokens, dataset\.json says 3,000"):
        open_dataset(folder).read("train", 0, 1)


def rewritten(folder, name, change):
    """Change a file and dataset.json's hashes of it, as a faulty builder would have written both."""
    data = change((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    content = json.loads((folder / "dataset.json").read_bytes())
    for shard in content["shards"]:
        for entry in shard, shard["docs"]:
            if entry["file"] == name:
                entry["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train_000001.docs", lambda data: data[:32] + bytes([data[32] ^ 1]) + data[33:]),
        ("train_000001.docs", lambda data: data[:32] + struct.pack("<Q", 2**63 + 5) + data[40:]),
        ("train_000001.docs", lambda data: data[:-8] + struct.pack("<Q", 3000)),
        ("train_000001.docs", lambda data: data[:24] + data[32:40] + data[24:32] + data[40:]),
        ("train_000001.docs", lambda data: data[:32] + data[24:32] + data[40:]),
        ("train_000001.bin", lambda data: data[:1030] + b"P\xc4" + data[1032:]),
        ("train_000001.bin", lambda data: data[:1024] + data[1024:].replace(b"P\xc4", b"P\x00")),
    ],
    ids=["moved", "far outside", "behind the end", "out of order", "twice", "an EOT more", "no EOTs"],
)
def test_documents_that_do_not_fit_are_found_though_the_hashes_do(folder, name, change):
    rewritten(folder, name, change)
    assert verify(folder, "fast").ok
    message = "train_000001.docs: document offsets do not fit the tokens of train_000001.bin"
    assert verify(folder, "full").problems == (message,)


def test_blocks_and_threads_do_not_matter(folder, monkeypatch):
    rewritten(folder, "train_000001.bin", lambda data: data[:1624] + b"\xff\xff" + data[1626:])
    (folder / "train_000002.docs").unlink()
    problems = "train_000001.bin: token 300 is 65535, not below 50257", "train_000002.docs: missing"
    for block, workers in (2, 1), (6, None), (1024, 3), (6000, 1):
        monkeypatch.setattr(verification, "_BLOCK", block)
        assert verify(folder, "full", workers).problems == problems


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("tokenizer__vocabulary_sha256__encoder.json", "0" * 64, "vocabulary_sha256"),
        ("tokenizer__vocabulary_sha256", {}, "vocabulary_sha256"),
        ("tokenizer__vocab_size", 65536, "vocab_size"),
        ("tokenizer__eot", 0, "eot"),
    ],
)
def test_a_foreign_tokenizer_is_refused_by_name(folder, path, value, key):
    change(folder, **{path: value})
    message = f"dataset.json: foreign tokenizer: {key} of 'gpt2' is not GPT-2's: build it again from its text"
    assert message in verify(folder, "fast").problems
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(folder)


def change(folder, **changes):
    content = json.loads((folder / "dataset.json").read_bytes())
    for path, value in changes.items():
        target = content
        *keys, last = path.split("__")
        for key in keys:
            target = target[int(key) if key.isdigit() else key]
        target[last] = value
    (folder / "dataset.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "format version 2, this program reads version 1"),
        ("shards__0__file", "../../etc/passwd", "is not a plain name"),
        ("shards__0__file", "/etc/passwd", "is not a plain name"),
        ("shards__0__file", "C:\\shard", "is not a plain name"),
        ("shards__0__file", "..", "is not a plain name"),
        ("shards__0__docs__file", "a/b.docs", "is not a plain name"),
        ("shards__0__file", "train_000001.bin", "a file is listed twice"),
        ("shards__0__file", 5, "file 5"),
        ("shards__0__split", "test", "split 'test'"),
        ("shards__0__tokens", -1, "-1 tokens"),
        ("shards__0__tokens", 2**40, "tokens"),
        ("shards__0__tokens", "many", "tokens 'many'"),
        ("shards__0__tokens", True, "tokens True"),
        ("shards__0__tokens", 7, "sizes that do not fit its counts"),
        ("shards__0__max_token", 50257, "token 50257 in a vocabulary of 50257"),
        ("shards__0__sha256", "x", r"SHA-256 \['x'"),
        ("shards__0__colour", 1, "colour"),
        ("shards__0__docs", None, "sizes that do not fit its counts"),
        ("shards__0__docs", "a.docs", "not a valid dataset description"),
        ("shards__0__documents", 2**50, "documents"),
        ("shards", None, "not a valid dataset description"),
        ("tokenizer", [], "not a valid dataset description"),
        ("tokenizer__vocab_size", 10**6, "vocab_size 1000000"),
        ("tokenizer", {"vocab_size": 50257}, "eot"),
        ("tokenizer__eot", 50257, "eot 50257"),
        ("totals__train__tokens", 1, "its totals or its layout are different"),
    ],
)
def test_a_manifest_is_not_trusted(folder, path, value, message):
    change(folder, **{path: value})
    with pytest.raises(ValueError, match=message) as error:
        manifest.load(folder)
    assert str(folder / "dataset.json") in str(error.value)


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="is not a dataset"):
        open_dataset(tmp_path / "missing")
    (tmp_path / ".build").mkdir()
    with pytest.raises(ValueError, match="an unfinished build: run its command again"):
        verify(tmp_path)
    for data in b"", b"{", b"[]", b"\xff", b"[" * 10**5:
        (tmp_path / "dataset.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"dataset\.json: not a valid dataset description"):
            open_dataset(tmp_path)
