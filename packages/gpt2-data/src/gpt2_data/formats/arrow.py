"""Arrow shards (`train_000001.arrow`): one row a document, `id` int64 and `tokens` list<uint16>.

A shard is an Arrow IPC stream (https://arrow.apache.org/docs/format/Columnar.html) of one record batch, so that
`datasets` maps it into memory, and its tokens lie in the file without a gap, as in a uint16 shard: after the
header, the ids (int64 each) and where each row begins (int32, and at the end their number); each part starts at a
multiple of 64 bytes. A document cut by the shard's end goes on in the next shard as a row with the same id.

The header is laid out here, not by pyarrow: the file is the same whatever its version, no more than a chunk of
tokens is held while writing, and a reader who knows the counts knows every byte of the header: none is trusted.
"""

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data.formats import uint16 as formats

ENDING = ".arrow"
_ALIGN = 64
_END_OF_STREAM = struct.pack("<2I", 0xFFFFFFFF, 0)
_V5, _SCHEMA, _RECORD_BATCH, _INT, _LIST = 4, 1, 3, 2, 12  # numbers of Arrow's Message.fbs and Schema.fbs


def header(num_tokens: int, num_rows: int) -> bytes:
    """The bytes in front of the ids: the schema, and the record batch's description."""
    assert 0 < num_rows <= num_tokens <= formats.MAX_SHARD_TOKENS  # an offset is an int32
    schema = _message(_schema(), 0, 0)
    ids, offsets, tokens = _parts(num_tokens, num_rows)
    buffers = [0, 0, 0, ids[1], offsets[0], 0, *offsets, tokens[0], 0, *tokens]  # no validity: nothing is null
    batch = _Table(
        ("q", num_rows),
        _Structs(16, struct.pack("<6q", num_rows, 0, num_rows, 0, num_tokens, 0)),  # length, nulls of each field
        _Structs(16, struct.pack("<12q", *buffers)),  # position, length of each buffer
    )
    body = _up(sum(tokens), 8)
    return schema + _message(_Table(("h", _V5), ("B", _RECORD_BATCH), batch, ("q", body)), len(schema), _ALIGN)


def token_start(num_tokens: int, num_rows: int) -> int:
    """Where in the file the tokens begin, in bytes."""
    return len(header(num_tokens, num_rows)) + _parts(num_tokens, num_rows)[2][0]


def shard_bytes(num_tokens: int, num_rows: int) -> int:
    """Size of a shard's file in bytes."""
    return token_start(num_tokens, num_rows) + _up(2 * num_tokens, 8) + len(_END_OF_STREAM)


def write_shard(
    file: BinaryIO,
    num_tokens: int,
    chunks: Iterable[NDArray[np.uint16]],
    starts: NDArray[np.integer],
    ids: NDArray[np.integer],
) -> formats.Written:
    """Write `num_tokens`, which come in `chunks`, in rows that begin at the tokens `starts`, the first at 0.

    Memory: a chunk and 12 bytes a row. The payload that is hashed is the tokens.
    """
    rows = len(starts)
    assert starts[0] == 0
    assert len(ids) == rows
    head = header(num_tokens, rows)
    offsets = np.append(starts, num_tokens).astype("<i4").tobytes()
    front = head + _padded(ids.astype("<i8").tobytes(), _ALIGN) + _padded(offsets, _ALIGN)
    trailer = bytes(_up(2 * num_tokens, 8) - 2 * num_tokens) + _END_OF_STREAM
    written = formats.write(file, front, chunks, trailer)
    assert written.bytes == shard_bytes(num_tokens, rows), (written.bytes, num_tokens, rows)
    return written


@dataclass(frozen=True)
class ArrowShard:
    """A shard that has the size and the header of its counts."""

    file: formats.TokenFile
    rows: int

    def row_starts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Where rows [start, stop) begin, in tokens."""
        place = self._rows_at() + _parts(self.file.tokens, self.rows)[1][0]
        return self._read(place, "<i4", start, self.rows if stop is None else stop)

    def ids(self) -> NDArray[np.int64]:
        """The id of each row."""
        return self._read(self._rows_at(), "<i8", 0, self.rows)

    def _rows_at(self) -> int:
        return self.file.start - _parts(self.file.tokens, self.rows)[2][0]

    def _read(self, place: int, kind: str, start: int, stop: int) -> NDArray[np.int64]:
        dtype = np.dtype(kind)
        with self.file.path.open("rb") as file:
            file.seek(place + dtype.itemsize * start)
            data = file.read(dtype.itemsize * (stop - start))
        if len(data) != dtype.itemsize * (stop - start):
            raise ValueError(f"{self.file.path}: cut short while it was read")
        return np.frombuffer(data, dtype).astype(np.int64)


def check_shard(path: Path, num_tokens: int, num_documents: int) -> ArrowShard:
    """Open a shard of that many tokens, with that many documents that start in it.

    The first row may go on with a document from the shard before. Raises ValueError or OSError, naming the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for rows in num_documents, num_documents + 1:
            if not 0 < rows <= num_tokens or size != shard_bytes(num_tokens, rows):
                continue  # both may have the same size, because of the padding
            file.seek(0)
            wanted = header(num_tokens, rows)
            if file.read(len(wanted)) == wanted:
                start = token_start(num_tokens, rows)
                return ArrowShard(formats.TokenFile(path, num_tokens, start), rows)
    least = shard_bytes(num_tokens, max(num_documents, 1))
    if size < least:
        raise ValueError(
            f"{path}: cut short: {num_tokens:,} tokens are {least:,} bytes or more, file has {size:,}"
        )
    raise ValueError(
        f"{path}: not an Arrow shard of {num_tokens:,} tokens, {num_documents:,} documents as gpt2-data writes it"
    )


def _parts(num_tokens: int, num_rows: int) -> list[tuple[int, int]]:
    """(position, length) in bytes, behind the header, of ids, row starts and tokens."""
    lengths = 8 * num_rows, 4 * (num_rows + 1), 2 * num_tokens
    offsets = _up(lengths[0], _ALIGN)
    return [(0, lengths[0]), (offsets, lengths[1]), (_up(offsets + lengths[1], _ALIGN), lengths[2])]


# --- FlatBuffers, as much as is needed: https://flatbuffers.dev/internals


class _Table(list[object]):
    """Fields in order: None (left out), (struct format, value), or something that a 4-byte offset points at."""

    def __init__(self, *fields: object) -> None:
        super().__init__(fields)


@dataclass
class _Structs:
    """A vector of structs of `size` bytes, with 8-byte members."""

    size: int
    data: bytes


def _schema() -> _Table:
    item = _Table(b"item", ("?", True), ("B", _INT), _Table(("i", 16), ("?", False)), None, [])
    columns = [
        _Table(b"id", ("?", True), ("B", _INT), _Table(("i", 64), ("?", True)), None, []),
        _Table(b"tokens", ("?", True), ("B", _LIST), _Table(), None, [item]),
    ]
    return _Table(("h", _V5), ("B", _SCHEMA), _Table(("h", 0), columns), ("q", 0))


def _message(table: _Table, position: int, align: int) -> bytes:
    """An encapsulated message: marker, length, table; filled up so that what follows is aligned in the file."""
    data = bytearray(4)
    struct.pack_into("<I", data, 0, _append(data, table))
    length = _up(position + 8 + len(data), align or 8) - position - 8
    return struct.pack("<Ii", 0xFFFFFFFF, length) + bytes(data.ljust(length, b"\0"))


def _append(data: bytearray, node: object) -> int:
    """Append `node` and then what it points at, for offsets point forward only. Returns where it stands."""
    if isinstance(node, bytes):
        data += bytes(-len(data) % 4)
        at = len(data)
        data += struct.pack("<I", len(node)) + node + b"\0"
    elif isinstance(node, _Structs):
        data += bytes((4 - len(data)) % 8)
        at = len(data)
        data += struct.pack("<I", len(node.data) // node.size) + node.data
    elif isinstance(node, _Table):
        at = _append_table(data, node)
    else:
        assert isinstance(node, list)
        data += bytes(-len(data) % 4)
        at = len(data)
        data += struct.pack("<I", len(node)) + bytes(4 * len(node))
        for i, child in enumerate(node):
            _point(data, at + 4 + 4 * i, child)
    return at


def _append_table(data: bytearray, table: _Table) -> int:
    kinds = {
        i: field[0] if isinstance(field, tuple) else "I" for i, field in enumerate(table) if field is not None
    }
    places, size = {}, 4
    for i in sorted(kinds, key=lambda i: -struct.calcsize(kinds[i])):  # then each is aligned
        places[i], size = size, size + struct.calcsize(kinds[i])
    vtable = struct.pack(
        f"<{2 + len(table)}H", 4 + 2 * len(table), size, *(places.get(i, 0) for i in range(len(table)))
    )
    data += bytes((4 - len(data) - len(vtable)) % 8)
    data += vtable
    at = len(data)
    data += struct.pack("<i", len(vtable)) + bytes(size - 4)
    for i, field in enumerate(table):
        if isinstance(field, tuple):
            struct.pack_into("<" + kinds[i], data, at + places[i], field[1])
        elif field is not None:
            _point(data, at + places[i], field)
    return at


def _point(data: bytearray, place: int, node: object) -> None:
    struct.pack_into("<I", data, place, _append(data, node) - place)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(data: bytes, multiple: int) -> bytes:
    return data.ljust(_up(len(data), multiple), b"\0")
