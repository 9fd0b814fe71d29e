"""The byte layouts of shards and their sidecars, read and written here and nowhere else. All little-endian.

A shard (`train_000001.bin`) is llm.c's and modded-nanogpt's: 256 int32 of header (20240520, 1, number of tokens,
zeros), then the tokens as uint16. https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py

Its sidecar (`train_000001.docs`) is ours: the 8 bytes GPT2DOCS, u64 version 1, u64 count, then for each document
that starts in the shard the offset of its first token, u64. Arrow shards have their own module, arrow.py.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARD_MAGIC = 20240520
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
_DOCS_MAGIC = b"GPT2DOCS"
_VERSION = 1  # of both
_SHARD_HEADER, _DOCS_HEADER = struct.Struct("<3i 1012x"), struct.Struct("<8s 2Q")
TOKEN = np.dtype("<u2")
OFFSET = np.dtype("<u8")
_MAX_OPEN = 64  # files that a reader holds open


@dataclass(frozen=True)
class TokenFile:
    """A file of `tokens` uint16 tokens in one piece that begins at byte `start`."""

    path: Path
    tokens: int
    start: int = _SHARD_HEADER.size


@dataclass(frozen=True)
class Numbers:
    """`count` numbers in one piece of a file that begins at byte `start`."""

    path: Path
    count: int
    start: int
    dtype: "np.dtype[Any]"

    def read(self, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Return numbers [first, last). Raises ValueError if the file has become shorter."""
        last = self.count if last is None else last
        numbers = np.fromfile(self.path, self.dtype, last - first, offset=self.start + self.dtype.itemsize * first)
        if len(numbers) != last - first:
            raise ValueError(f"{self.path}: cut short while it was read")
        return numbers.astype(np.int64)


@dataclass(frozen=True)
class Written:
    """Facts of a written file: its size, its largest number, the SHA-256 of the numbers alone and of the file."""

    bytes: int
    max_token: int
    tokens_sha256: str
    sha256: str


def write_shard(file: BinaryIO, num_tokens: int, chunks: Iterable[NDArray[np.uint16]]) -> Written:
    """Write a shard of exactly `num_tokens`, which come in `chunks`."""
    assert 0 < num_tokens <= MAX_SHARD_TOKENS
    written = write(file, _SHARD_HEADER.pack(SHARD_MAGIC, _VERSION, num_tokens), chunks)
    assert written.bytes == shard_bytes(num_tokens), (written.bytes, num_tokens)
    return written


def write_docs(file: BinaryIO, offsets: NDArray[np.integer]) -> Written:
    """Write a sidecar: the token offsets, in the shard, of the documents that start in it."""
    return write(file, _DOCS_HEADER.pack(_DOCS_MAGIC, _VERSION, len(offsets)), [offsets], dtype=OFFSET)


def write(
    file: BinaryIO,
    header: bytes,
    chunks: Iterable[NDArray[np.integer]],
    trailer: bytes = b"",
    dtype: "np.dtype[Any]" = TOKEN,
) -> Written:
    """Write a header, the numbers of `chunks` as `dtype` and a trailer, hashed as they go by.

    Most of the time goes into the two hashes: 350 MB/s each without SHA instructions. Two threads were no faster
    on two busy cores, and a build keeps all cores busy anyway.
    """
    payload, whole = hashlib.sha256(), hashlib.sha256(header)
    size, maximum = len(header) + len(trailer), 0
    file.write(header)
    for chunk in chunks:
        data = np.ascontiguousarray(chunk, dtype).data
        file.write(data)
        payload.update(data)
        whole.update(data)
        size += data.nbytes
        maximum = max(maximum, int(chunk.max(initial=0)))
    file.write(trailer)
    whole.update(trailer)
    return Written(size, maximum, payload.hexdigest(), whole.hexdigest())


def shard_bytes(num_tokens: int) -> int:
    """Return the size of a shard's file in bytes."""
    return _SHARD_HEADER.size + TOKEN.itemsize * num_tokens


def docs_bytes(num_documents: int) -> int:
    """Return the size of a sidecar's file in bytes."""
    return _DOCS_HEADER.size + OFFSET.itemsize * num_documents


def check_shard(path: Path) -> TokenFile:
    """Open a shard whose header agrees with the size of its file.

    Raises ValueError or OSError, naming the file. No memory is allocated because a header claims a size.
    """
    header, size = read_header(path, _SHARD_HEADER.size)
    if size < _SHARD_HEADER.size:
        raise ValueError(f"{path}: cut short: a shard has a header of {_SHARD_HEADER.size} bytes, file has {size}")
    magic, version, count = _SHARD_HEADER.unpack(header)
    if magic != SHARD_MAGIC:
        raise ValueError(f"{path}: not a GPT-2 token shard: magic number is {magic}, not {SHARD_MAGIC}")
    if version != _VERSION:
        raise ValueError(f"{path}: shard version {version}, this program reads version {_VERSION}")
    if count <= 0:
        raise ValueError(f"{path}: header says {count} tokens")
    check_size(path, size, shard_bytes(count), f"{count:,} tokens")
    return TokenFile(path, count)


def check_docs(path: Path) -> Numbers:
    """Open a sidecar whose header agrees with the file's size. Raises the same errors as check_shard."""
    header, size = read_header(path, _DOCS_HEADER.size)
    if size < _DOCS_HEADER.size or not header.startswith(_DOCS_MAGIC):
        raise ValueError(f"{path}: not a sidecar of document offsets")
    _, version, count = _DOCS_HEADER.unpack(header)
    if version != _VERSION:
        raise ValueError(f"{path}: sidecar version {version}, this program reads version {_VERSION}")
    check_size(path, size, docs_bytes(count), f"{count:,} documents")
    return Numbers(path, count, _DOCS_HEADER.size, OFFSET)


def read_header(path: Path, count: int) -> tuple[bytes, int]:
    """Return a file's first `count` bytes, fewer if it is shorter, and its size."""
    with path.open("rb") as file:
        return file.read(count), os.fstat(file.fileno()).st_size


def check_size(path: Path, size: int, expected: int, claim: str) -> None:
    """Raise ValueError unless the file has the size that its header claims."""
    if size != expected:
        what = "cut short" if size < expected else "bytes after its end"
        raise ValueError(f"{path}: {what}: header says {claim} = {expected:,} bytes, file has {size:,}")


class TokenFiles:
    """Read tokens at any place of a list of files. It is safe across fork, but not for several threads at once.

    It uses pread, not a memory map: if a file is cut short meanwhile, a map would kill the process by SIGBUS.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._files = files
        self._open: dict[int, int] = {}  # file number -> descriptor, the longest open first

    def read_into(self, out: NDArray[np.uint16], number: int, offset: int) -> None:
        """Fill `out`, which is contiguous, with the tokens of file `number` from token `offset` on."""
        wanted, descriptor = out.view(np.uint8).data, self._descriptor(number)
        position = self._files[number].start + TOKEN.itemsize * offset
        while wanted:  # one call reads 2 GiB at most
            count = os.preadv(descriptor, [wanted], position)
            if count == 0:
                raise self._cut_short(number, offset)
            wanted, position = wanted[count:], position + count

    def read_rows(self, out: NDArray[np.uint16], numbers: list[int], offsets: list[int]) -> None:
        """Fill row i of `out`, contiguous, with the tokens of file numbers[i] from token offsets[i] on."""
        data, row_bytes, end = out.reshape(-1).view(np.uint8).data, out[0].nbytes, 0
        for number, offset in zip(numbers, offsets, strict=True):
            descriptor = self._open.get(number)
            if descriptor is None:  # asked here, since 64 calls of a method are 3 % of a batch's time
                descriptor = self._descriptor(number)
            position = self._files[number].start + TOKEN.itemsize * offset
            start, end = end, end + row_bytes
            if os.preadv(descriptor, (data[start:end],), position) != row_bytes:
                raise self._cut_short(number, offset)

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[number] = os.open(self._files[number].path, os.O_RDONLY)
        return self._open[number]

    def _cut_short(self, number: int, offset: int) -> ValueError:
        return ValueError(f"{self._files[number].path}: cut short while it was read, at token {offset:,}")

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the open files; the next read opens them again."""
        while self._open:  # `os` may be gone already when Python ends
            close(self._open.popitem()[1])

    __del__ = close

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}  # descriptors stay with their process
