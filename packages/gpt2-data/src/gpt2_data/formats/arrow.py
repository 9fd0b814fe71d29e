"""Arrow shards (`train_000001.arrow`): one row per document, `id` int64 and `tokens` list<uint16>.

A shard is an Arrow IPC stream (https://arrow.apache.org/docs/format/Columnar.html) of one record batch, which
`datasets` maps into memory: a header, the ids (int64), where each row begins and the last ends (int32), and the
tokens, each part at a multiple of 64 bytes. A document cut by the shard's end continues in the next shard as a row
with the same id.

The header is laid out here, not by pyarrow. So the file does not depend on pyarrow's version, writing keeps only a
chunk of tokens in memory, and a reader who knows the counts can compare every byte of the header.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data.formats import uint16
from gpt2_data.formats.uint16 import Numbers, TokenFile

ENDING = ".arrow"
_ALIGN = 64
_ID, _ROW = np.dtype("<i8"), np.dtype("<i4")
_END_OF_STREAM = struct.pack("<2I", 0xFFFFFFFF, 0)

# Two messages of Arrow's stream format, FlatBuffers of Message.fbs and Schema.fbs. The schema is the same in every
# shard. The batch's description has holes (q) for what depends on the counts; the rest is fixed layout.
_SCHEMA = bytes.fromhex(
    "ffffffff2801000014000000000000000c001300100012000c0004000c000000000000000000000014000000040001000000"
    "000008000a000800040008000000080000000000000002000000180000005c00000010001200040010001100080000000c00"
    "1000000010000000200000002800000001020000020000006964000000000000080009000400080008000000400000000100"
    "00000000000010001200040010001100080000000c0010000000100000002000000020000000010c000006000000746f6b65"
    "6e73000000000000040004000400000001000000180000000000000010001200040010001100080000000c00100000001000"
    "0000200000002800000001020000040000006974656d00000000080009000400080008000000100000000000000000000000"
    "00000000"
)
_BATCH = struct.Struct("<32s q 24s q 16s 6q 8s 12q 32x")
_HEADER_BYTES = len(_SCHEMA) + _BATCH.size
_TO_BODY_BYTES = bytes.fromhex("ffffffff0801000014000000000000000c001300100012000c0004000c000000")
_TO_ROWS = bytes.fromhex("140000000400030000000a00140004000c0010000a000000")
_TO_NODES = bytes.fromhex("0c000000400000000000000003000000")
_TO_BUFFERS = bytes.fromhex("0000000006000000")


def header(num_tokens: int, num_rows: int) -> bytes:
    """Return the bytes in front of the ids: the schema, and the record batch's description."""
    assert 0 < num_rows <= num_tokens <= uint16.MAX_SHARD_TOKENS  # an offset is an int32
    ids, offsets, tokens = _parts(num_tokens, num_rows)
    nodes = num_rows, 0, num_rows, 0, num_tokens, 0  # length and nulls of id, of tokens and of tokens' items
    buffers = 0, 0, 0, ids[1], offsets[0], 0, *offsets, tokens[0], 0, *tokens  # position and length; no validity
    body_bytes = _up(sum(tokens), 8)
    return _SCHEMA + _BATCH.pack(
        _TO_BODY_BYTES, body_bytes, _TO_ROWS, num_rows, _TO_NODES, *nodes, _TO_BUFFERS, *buffers
    )


def shard_bytes(num_tokens: int, num_rows: int) -> int:
    """Return the size of a shard's file in bytes."""
    tokens_from, tokens_bytes = _parts(num_tokens, num_rows)[2]
    return _HEADER_BYTES + tokens_from + _up(tokens_bytes, 8) + len(_END_OF_STREAM)


def write_shard(
    file: BinaryIO,
    num_tokens: int,
    chunks: Iterable[NDArray[np.uint16]],
    starts: NDArray[np.integer],
    ids: NDArray[np.integer],
) -> uint16.Written:
    """Write `num_tokens`, which come in `chunks`, in rows that begin at the tokens `starts`, the first at 0.

    Memory: a chunk and 12 bytes per row.
    """
    rows = len(starts)
    assert starts[0] == 0
    assert len(ids) == rows
    front = header(num_tokens, rows)
    for numbers in ids.astype(_ID), np.append(starts, num_tokens).astype(_ROW):
        front += numbers.tobytes().ljust(_up(numbers.nbytes, _ALIGN), b"\0")
    trailer = bytes(_up(2 * num_tokens, 8) - 2 * num_tokens) + _END_OF_STREAM
    written = uint16.write(file, front, chunks, trailer)
    assert written.bytes == shard_bytes(num_tokens, rows), (written.bytes, num_tokens, rows)
    return written


@dataclass(frozen=True)
class ArrowShard:
    """A shard whose size and header match its counts."""

    file: TokenFile
    rows: Numbers  # where each row begins, in tokens; the first may continue the last document of the shard before
    documents: Numbers  # of `rows`, those at which a document begins
    ids: Numbers


def check_shard(path: Path, num_tokens: int, num_documents: int) -> ArrowShard:
    """Open a shard of `num_tokens`, in which `num_documents` start. Raises ValueError or OSError."""
    front, size = uint16.read_header(path, _HEADER_BYTES)
    for rows in num_documents, num_documents + 1:  # both may have the same size, because of the padding
        if 0 < rows <= num_tokens and size == shard_bytes(num_tokens, rows) and front == header(num_tokens, rows):
            ids, offsets, tokens = (_HEADER_BYTES + start for start, _ in _parts(num_tokens, rows))
            return ArrowShard(
                TokenFile(path, num_tokens, tokens),
                Numbers(path, rows, offsets, _ROW),
                Numbers(path, num_documents, offsets + _ROW.itemsize * (rows - num_documents), _ROW),
                Numbers(path, rows, ids, _ID),
            )
    least = shard_bytes(num_tokens, max(num_documents, 1))
    problem = f"cut short: {least:,} bytes are the least, file has {size:,}: " if size < least else ""
    what = f"{num_tokens:,} tokens, {num_documents:,} documents"
    raise ValueError(f"{path}: {problem}not an Arrow shard of {what} as gpt2-data writes it")


def _parts(num_tokens: int, num_rows: int) -> list[tuple[int, int]]:
    """Return (position, length) in bytes, after the header, of ids, row starts and tokens."""
    lengths = 8 * num_rows, 4 * (num_rows + 1), 2 * num_tokens
    offsets = _up(lengths[0], _ALIGN)
    return [(0, lengths[0]), (offsets, lengths[1]), (_up(offsets + lengths[1], _ALIGN), lengths[2])]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
