"""Byte layouts."""

import contextlib
import io
import struct

import numpy as np
import pytest

from gpt2_data.disk import write_whole
from gpt2_data.formats import uint16


def shard(count, tokens=(), magic=20240520, version=1):
    return struct.pack("<256i", magic, version, count, *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def test_a_shard_is_these_bytes():
    file = io.BytesIO()
    written = uint16.write_shard(file, 3, [np.array([50256, 1], np.uint16), np.array([256], np.uint16)])
    assert file.getvalue() == shard(3, [50256, 1, 256])
    assert file.getvalue()[:12].hex() == "88d834010100000003000000"
    assert file.getvalue()[1024:].hex() == "50c401000001"
    assert (written.bytes, written.max_token) == (1030, 50256)


def test_a_sidecar_is_these_bytes(tmp_path):
    path = tmp_path / "a.docs"
    with path.open("wb") as file:
        uint16.write_docs(file, np.array([0, 7], np.int64))
    assert path.read_bytes() == b"GPT2DOCS" + struct.pack("<4Q", 1, 2, 0, 7)
    offsets = uint16.check_docs(path)
    assert offsets.count == 2
    assert offsets.read().tolist() == [0, 7]
    assert offsets.read(1, 2).tolist() == [7]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short: a shard has a header of 1024 bytes, file has 0"),
        (shard(3)[:1000], "cut short"),
        (shard(3, [1, 2]), "cut short: header says 3 tokens = 1,030 bytes, file has 1,028"),
        (shard(3, [1, 2, 3, 4]), "bytes after its end"),
        (shard(2**31 - 1, [1]), "cut short: header says 2,147,483,647 tokens"),
        (shard(-1), "header says -1 tokens"),
        (shard(0), "header says 0 tokens"),
        (shard(1, [1], magic=20240801), "not a GPT-2 token shard"),
        (shard(1, [1], version=7), "shard version 7"),
        (struct.pack(">256i", 20240520, 1, 1, *[0] * 253) + b"\0\1", "not a GPT-2 token shard"),
        (b"GPT2", "not a sidecar"),
        (b"GPT2DOC!" + struct.pack("<2Q", 1, 0), "not a sidecar"),
        (b"GPT2DOCS" + struct.pack("<2Q", 2, 0), "sidecar version 2"),
        (b"GPT2DOCS" + struct.pack("<2Q", 1, 2**61), "cut short: header says 2,305,843,009,213,693,952 documents"),
        (b"GPT2DOCS" + struct.pack("<3Q", 1, 0, 0), "bytes after its end: header says 0 documents"),
    ],
)
def test_a_faulty_file_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "train_000001.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        (uint16.check_docs if data.startswith(b"GPT2") else uint16.check_shard)(path)
    assert str(path) in str(error.value)


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(uint16, "_MAX_OPEN", 2)
    paths = [tmp_path / f"{i}.bin" for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(shard(1, [i]))
    files = uint16.TokenFiles([uint16.TokenFile(path, 1) for path in paths])
    out = np.empty(1, np.uint16)
    for i in [*range(9), 0, 8, 7]:
        files.read_into(out, i, 0)
        assert out[0] == i
        assert len(files._open) <= 2


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with contextlib.suppress(KeyboardInterrupt), write_whole(path, tmp_path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with write_whole(path, tmp_path) as file:
        file.write(b"after")
    assert path.read_text() == "after"
