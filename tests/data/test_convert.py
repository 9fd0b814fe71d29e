"""Every format into every other, by bytes; and what must not be converted."""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from gpt2_data import BuildConfig, build, convert, open_dataset, verify
from gpt2_data.cli import main
from gpt2_data.formats import manifest

FORMATS = ("npy", "llmc", "nanogpt", "megatron", "arrow")
SHARDED = ("npy", "llmc", "arrow")
OPTIONS = {"order": "shuffled", "seed": 9, "shard_size": 900, "val_tokens": 1000, "workers": 1}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One dataset in our two formats, and each of these in every format."""
    folder = tmp_path_factory.mktemp("convert")
    rng = random.Random(3)
    lines = [json.dumps({"text": "a naïve 🙂 " * rng.choice([0, 1, 5, 30, 200])}) + "\n" for _ in range(100)]
    (folder / "texts.jsonl").write_text("".join(lines))
    for form in "uint16", "arrow":
        build(BuildConfig([folder / "texts.jsonl"], folder / form, **OPTIONS, format=form))
    for to in FORMATS:
        convert(folder / "uint16", folder / f"from-uint16-{to}", to)
    return folder


def stream(folder, split):
    dataset = open_dataset(folder)
    return dataset.read(split, 0, dataset.tokens(split)).tobytes()


def payloads(folder, split):
    """The tokens of each file, read without any of our readers; one piece a file."""
    pieces = []
    for path in sorted(folder.glob(f"{split}*")):
        data = path.read_bytes()
        if path.suffix == ".npy":
            pieces.append(np.load(path).tobytes())
        elif path.suffix == ".arrow":
            tokens = pa.ipc.open_stream(data).read_all()["tokens"].combine_chunks().values
            pieces.append(tokens.to_numpy().tobytes())
        elif path.suffix == ".bin":
            if data[:4] == b"\x88\xd8\x34\x01":  # llm.c's dataloader.h: 256 ints, then tokens to the end
                header, data = struct.unpack("<256i", data[:1024]), data[1024:]
                assert header == (20240520, 1, len(data) // 2, *[0] * 253)
            pieces.append(data)
    return pieces


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_into_every_other(built, tmp_path, first, to):
    source = built / f"from-uint16-{first}"
    result = convert(source, tmp_path / "out", to)
    for split in "train", "val":
        wanted = stream(built / "uint16", split)
        pieces = payloads(tmp_path / "out", split)
        assert b"".join(pieces) == wanted == stream(tmp_path / "out", split)
        if to in SHARDED and first in SHARDED:
            assert pieces == payloads(built / "uint16", split)
        if to not in SHARDED:
            assert len(pieces) == 1
        ours, original = open_dataset(tmp_path / "out"), open_dataset(built / "uint16")
        assert list(ours.document_starts(split)) == list(original.document_starts(split))
        assert ours.num_documents(split) == original.num_documents(split)
    assert result.files == len(list((tmp_path / "out").iterdir()))
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    if to in ("llmc", "arrow"):
        assert verify(tmp_path / "out", "full").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("source", "to"), [("uint16", "arrow"), ("arrow", "llmc"), ("arrow", "arrow")])
def test_ours_become_what_a_build_would_have_made(built, tmp_path, source, to):
    """The same files, ids and all; dataset.json says where they come from."""
    convert(built / source, tmp_path / "out", to)
    wanted = built / ("arrow" if to == "arrow" else "uint16")
    names = {path.name for path in wanted.iterdir()} - {"build.jsonl", "dataset.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"dataset.json"} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (wanted / name).read_bytes(), name
    converted, origin = manifest.load(tmp_path / "out"), manifest.load(built / source)
    assert converted.shards == manifest.load(wanted).shards
    assert converted.source["converted_from"] == {"format": source, "dataset": origin.hash}
    assert converted.source["plan_sha256"] == origin.source["plan_sha256"]
    assert converted.options == manifest.load(wanted).options


def test_megatrons_index_as_megatron_reads_it(built):
    folder = built / "from-uint16-megatron"
    data = (folder / "train_text_document.idx").read_bytes()
    tokens = (folder / "train_text_document.bin").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", data[9:34])
    assert (version, code, documents) == (1, 8, sequences + 1)
    lengths = np.frombuffer(data, "<i4", sequences, 34)
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    indices = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    assert len(data) == 34 + 12 * sequences + 8 * documents
    assert indices.tolist() == list(range(sequences + 1))
    assert sum(lengths.tolist()) * 2 == len(tokens)
    documents = list(open_dataset(built / "uint16").documents("train"))
    for document, length, pointer in zip(documents, lengths.tolist(), pointers.tolist(), strict=True):
        assert np.array_equal(np.frombuffer(tokens, "<u2", length, pointer), document)


def test_others_become_ours(tmp_path):
    """A stream whose documents end with their EOT: in ours they begin with it."""
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "train.bin").write_bytes(struct.pack("<6H", 1, 2, 50256, 3, 50256, 4))
    (tmp_path / "nano" / "val.bin").write_bytes(struct.pack("<2H", 5, 50256))
    for to in "llmc", "arrow":
        convert(tmp_path / "nano", tmp_path / to, to)
        dataset = open_dataset(tmp_path / to)
        documents = [document.tolist() for document in dataset.documents("train")]
        assert documents == [[50256, 1, 2], [50256, 3], [50256, 4]]
        assert verify(tmp_path / to, "full").ok
        source, data = manifest.load(tmp_path / to).source, (tmp_path / "nano" / "train.bin").read_bytes()
        assert source["inputs"][1]["sha256"] == hashlib.sha256(data).hexdigest()
        assert source["converted_from"]["format"] == "nanogpt"
    convert(tmp_path / "arrow", tmp_path / "again", "arrow")
    for folder in "arrow", "again":
        for name, ids in ("val_000000.arrow", [0]), ("train_000001.arrow", [1, 2, 3]):
            table = pa.ipc.open_stream((tmp_path / folder / name).read_bytes()).read_all()
            assert table["id"].to_pylist() == ids
    convert(tmp_path / "nano", tmp_path / "megatron", "megatron")
    pieces = [document.tolist() for document in open_dataset(tmp_path / "megatron").documents("train")]
    assert pieces == [[1, 2, 50256], [3, 50256], [4]]


def test_a_stream_without_shards_is_cut(tmp_path, built, monkeypatch):
    monkeypatch.setattr(sys.modules["gpt2_data.conversion"], "SHARD_TOKENS", 1000)
    convert(built / "from-uint16-nanogpt", tmp_path / "out", "llmc")
    sizes = [shard.tokens for shard in manifest.load(tmp_path / "out").split("train")]
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000
    assert verify(tmp_path / "out", "full").ok


@pytest.mark.parametrize("chunk", [1, 7, 900])
def test_chunks_do_not_matter(tmp_path, built, monkeypatch, chunk):
    for module in "conversion", "formats.foreign":
        monkeypatch.setattr(sys.modules[f"gpt2_data.{module}"], "_CHUNK", chunk)
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(built / "from-uint16-npy" / "val_000001.npy", small / "train_000000.npy")
    for to in FORMATS:
        convert(small, tmp_path / to, to)
        assert b"".join(payloads(tmp_path / to, "train")) == (small / "train_000000.npy").read_bytes()[128:]
    convert(tmp_path / "megatron", tmp_path / "again", "megatron")
    index, again = ((tmp_path / name / "train_text_document.idx").read_bytes() for name in ("megatron", "again"))
    assert index == again


# --- what must not be converted


@pytest.mark.parametrize("form", ["uint16", "arrow"])
@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_source_is_refused_and_nothing_left(built, tmp_path, form, to):
    source = Path(shutil.copytree(built / form, tmp_path / "source"))
    paths = sorted(path for path in source.iterdir() if manifest.is_shard_name(path.name))
    for path in random.Random(to).sample(paths, 4):
        whole = path.read_bytes()
        at = random.Random(path.name).randrange(len(whole) // 2, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=path.stem):
            convert(source, tmp_path / "out", to)
        path.write_bytes(whole)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]
    (source / "train_000003.docs").unlink(missing_ok=True)
    (source / "train_000003.arrow").unlink(missing_ok=True)
    with pytest.raises(OSError, match="train_000003"):
        convert(source, tmp_path / "out", to)


def test_an_id_outside_the_vocabulary_is_not_converted(tmp_path):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "train.bin").write_bytes(struct.pack("<3H", 1, 2, 60000))
    with pytest.raises(ValueError, match=r"train\.bin: token 2 is 60000"):
        convert(tmp_path / "nano", tmp_path / "out", "npy")


@pytest.mark.parametrize("to", FORMATS)
def test_a_source_that_changes_meanwhile(built, tmp_path, to):
    source = Path(shutil.copytree(built / "from-uint16-npy", tmp_path / "source"))

    def change(what, done, total):
        data = (built / "from-uint16-npy" / "val_000000.npy").read_bytes()
        (source / "val_000000.npy").write_bytes(data[:-2] + b"\x07\x00")

    with pytest.raises(ValueError, match="was changed while it was read"):
        convert(source, tmp_path / "out", to, change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_where_it_cannot_be_written(built, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name in "file", "full":
        with pytest.raises(ValueError, match=f"{name} exists and is not empty: choose another"):
            convert(built / "uint16", tmp_path / name, "npy")
    with pytest.raises(ValueError, match="cannot convert to 'csv': choose one of npy, llmc"):
        convert(built / "uint16", tmp_path / "out", "csv")
    (tmp_path / "out.converting").mkdir()
    (tmp_path / "out.converting" / "mine.txt").touch()
    with pytest.raises(ValueError, match="was not made by gpt2-data"):
        convert(built / "uint16", tmp_path / "out", "npy")
    assert (tmp_path / "out.converting" / "mine.txt").exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB are needed, 0.0 GB are free"):
        convert(built / "uint16", tmp_path / "elsewhere", "npy")
    assert not (tmp_path / "elsewhere.converting").exists()


def test_into_an_empty_folder_and_a_new_one(built, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, folder in ("link", "empty"), ("a/b", "a/b"):
        convert(built / "uint16", tmp_path / out, "nanogpt")
        assert stream(tmp_path / folder, "val") == stream(built / "uint16", "val")


def test_killed_it_leaves_no_dataset_and_can_be_run_again(built, tmp_path):
    code = (
        "import os, signal, sys\nfrom gpt2_data import convert\n"
        "def kill(what, done, total):\n    if done > total / 2:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert({str(built / 'uint16')!r}, {str(tmp_path / 'out')!r}, 'nanogpt', kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.converting"]
    (tmp_path / "out.converting" / ".begins").touch()
    convert(built / "uint16", tmp_path / "out", "nanogpt")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["train.bin", "val.bin"]
    assert stream(tmp_path / "out", "train") == stream(built / "uint16", "train")


def test_two_at_once(built, tmp_path):
    def again(what, done, total):
        with pytest.raises(ValueError, match=r"another conversion is running in .*out\.converting"):
            convert(built / "uint16", tmp_path / "out", "npy")

    convert(built / "uint16", tmp_path / "out", "npy", again)
    assert os.listdir(tmp_path) == ["out"]


# --- the command


def test_the_command(built, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["convert", str(built / "from-uint16-nanogpt"), str(out), "--to", "uint16"])
    assert done.exit_code == 0, done.output
    tokens = len(stream(built / "uint16", "train") + stream(built / "uint16", "val")) // 2
    assert done.stdout.startswith(f"{out}: {tokens:,} tokens in 5 files (llmc), ")
    assert done.stdout.count("\n") == 1
    done = CliRunner().invoke(main, ["info", str(out)])
    assert "converted  from nanogpt" in done.output
    done = CliRunner().invoke(main, ["verify", str(out), "--level", "full"])
    assert "nothing wrong" in done.output
    done = CliRunner().invoke(main, ["convert", str(out), str(tmp_path / "b"), "--to", "npy", "--json"])
    facts = json.loads(done.stdout)
    assert facts | {"bytes": 0} == {
        "out": str(tmp_path / "b"), "format": "npy", "tokens": tokens, "files": 2, "bytes": 0
    }  # fmt: skip
    for arguments, code, message in [
        (["convert", str(tmp_path), str(tmp_path / "c"), "--to", "npy"], 1, "is not a dataset"),
        (["convert", str(out), str(tmp_path / "c"), "--to", "mds"], 2, "--to"),
        (["verify", str(tmp_path / "b")], 1, "is build-nanogpt's, with nothing to verify it against"),
    ]:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == code
        assert message in done.output
