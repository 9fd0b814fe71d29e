"""OpenAI's TensorFlow checkpoints of GPT-2, without TensorFlow.

A folder as github.com/openai/gpt-2 downloads it: hparams.json, `checkpoint`, model.ckpt.index and
model.ckpt.data-00000-of-00001. The two are TensorFlow's "tensor bundle" (tensorflow/core/util/tensor_bundle): the
data file holds the tensors' raw bytes, the index says where, as a LevelDB table (github.com/google/leveldb,
doc/table_format.md) of protocol buffers. Every checksum in them, CRC-32C, is verified.
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2_model.config import GPTConfig
from gpt2_model.tensor_files import map_file, piece, read_json, short

_MAGIC = 0xDB4775248B80FB57  # the last 8 bytes of a table
_MAX_INDEX = 1_000_000  # that of 124M has 5 kB
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}  # tensorflow/core/framework/types.proto
_HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "block_size"} | {n: n for n in ("n_embd", "n_head", "n_layer")}
_NAMES = [  # model/h0/ln_1/g -> h.0.ln_1.weight
    (re.compile(r"^model/"), ""),
    (re.compile(r"^h(\d+)/"), r"h.\1."),
    (re.compile(r"^(wte|wpe)$"), r"\1.weight"),
    (re.compile(r"/"), "."),
    (re.compile(r"\.[gw]$"), ".weight"),
    (re.compile(r"\.b$"), ".bias"),
]


class _Entry(NamedTuple):
    """Where a tensor lies: a BundleEntryProto."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def read_openai(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the tensors, mapped, under our names; projections lie (in, out).

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part is damaged, or holds something else than a GPT-2.
    """
    hparams = read_json(folder / "hparams.json")
    if hparams.keys() != _HPARAMS.keys():
        odd = sorted(hparams.keys() ^ _HPARAMS.keys())[0]
        raise ValueError(f"{folder}/hparams.json should hold {', '.join(_HPARAMS)} and no more: see {short(odd)}")
    try:
        config = GPTConfig(**{_HPARAMS[name]: value for name, value in hparams.items()})
    except ValueError as error:
        raise ValueError(f"{folder}/hparams.json: {error}") from None
    tensors = {}
    for name, tensor in read_bundle(_prefix(folder)).items():
        for pattern, ours in _NAMES:
            name = pattern.sub(ours, name)
        # Their projections are convolutions of width 1, (1, in, out).
        tensors[name] = tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
    return config, tensors


def _prefix(folder: Path) -> Path:
    """The part of the file names before ".index": what `checkpoint` calls the latest one."""
    state = folder / "checkpoint"
    if not state.is_file():
        return folder / "model.ckpt"
    with state.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r'^model_checkpoint_path: "([^"]*)"', file.read(100_000), re.MULTILINE)
    # A path may stand there, of the machine that wrote it: the files lie here.
    name = re.split(r"[/\\]", found[1])[-1] if found else ""
    if name in ("", ".", ".."):
        raise ValueError(f"{state} names no checkpoint")
    return folder / name


def read_bundle(prefix: Path) -> dict[str, Tensor]:
    """The tensors of a TensorFlow checkpoint by name, mapped, checksums verified.

    Raises:
        FileNotFoundError: no index or data of that prefix.
        ValueError: damaged, or tensors that are not whole floating-point ones.
    """
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise FileNotFoundError(f"{prefix.parent} holds no weights: no {index.name} in it")
    if index.stat().st_size > _MAX_INDEX:
        raise ValueError(f"{index} is larger than any of a GPT-2 ({_MAX_INDEX:,} bytes)")
    try:
        table = dict(_table(index.read_bytes()))
        header = dict(_fields(table.pop(b"")))
        entries = {name.decode(): _entry(value) for name, value in table.items()}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{index} is damaged or no TensorFlow index: {error}") from None
    count = header.get(1, 1)
    if header.get(2, 0) != 0 or not isinstance(count, int) or count > 1000:
        raise ValueError(f"{index}: a big-endian checkpoint, or one in {count!r} files")

    data = {}
    for shard in {entry.shard for entry in entries.values()}:
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{count:05d}")
        if not path.is_file():
            raise FileNotFoundError(f"{index} names {path.name}, which is not beside it")
        data[shard] = map_file(path)
    end = dict.fromkeys(data, 0)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        raw = data[entry.shard]
        if entry.size != entry.dtype.itemsize * math.prod(entry.shape) or entry.offset < end[entry.shard]:
            raise ValueError(
                f"{index}: {short(name)} has a size that does not fit its shape, or overlaps another tensor"
            )
        end[entry.shard] = entry.offset + entry.size
        if end[entry.shard] > len(raw):
            raise ValueError(f"{index}: {short(name)} ends behind the end of its data file")
        if masked(crc32c(raw[entry.offset : end[entry.shard]].numpy())) != entry.crc:
            raise ValueError(
                f"{prefix.name}.data: {short(name)} has changed since it was written (its checksum differs)"
            )
        tensors[name] = piece(raw, entry.offset, entry.dtype, entry.shape)
    return tensors


def _entry(message: bytes) -> _Entry:
    values = dict(_fields(message))
    if 7 in values or values.get(1) not in _DTYPES:
        raise ValueError(f"a tensor in slices, or of type {short(values.get(1))}, not float")
    shape = []
    for number, dimension in _fields(_bytes(values.get(2, b""))):
        if number != 2:
            raise ValueError("a tensor of unknown shape")
        shape.append(_size(dict(_fields(_bytes(dimension))).get(1, 0)))
    shard, offset, size, crc = (_size(values.get(number, 0)) for number in (3, 4, 5, 6))
    if len(shape) > 8:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    return _Entry(_DTYPES[_size(values[1])], tuple(shape), shard, offset, size, crc)


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should be")
    return value


def _size(value: int | bytes) -> int:
    if not isinstance(value, int) or value >= 2**48:
        raise ValueError(f"{short(value)} where a size should be")
    return value


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a LevelDB table, in order."""
    if len(data) < 48 or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise ValueError("it has not the end of one")
    footer = data[-48:]
    position = 0
    handle = []
    for _ in range(4):  # offset and size of the block of other facts, then of the index block
        value, position = _varint(footer, position)
        handle.append(value)
    for _, where in _block(data, handle[2], handle[3]):
        offset, position = _varint(where, 0)
        yield from _block(data, offset, _varint(where, position)[0])


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries (shared, unshared, length of the value, rest of the key, value); behind them, restart points."""
    end = offset + size
    if size < 4 or end + 5 > len(data):
        raise ValueError("a block lies outside of it")
    if data[end] != 0:
        raise ValueError("it is compressed, which TensorFlow has never written")
    stored = int.from_bytes(data[end + 1 : end + 5], "little")
    if masked(crc32c(np.frombuffer(data, np.uint8)[offset : end + 1])) != stored:
        raise ValueError("its checksum differs")
    end -= 4 + 4 * int.from_bytes(data[end - 4 : end], "little")
    key = b""
    while offset < end:
        shared, offset = _varint(data, offset)
        unshared, offset = _varint(data, offset)
        length, offset = _varint(data, offset)
        if shared > len(key) or offset + unshared + length > end:
            raise ValueError("an entry lies outside of its block")
        key = key[:shared] + data[offset : offset + unshared]
        offset += unshared + length
        yield key, data[offset - length : offset]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, position = _varint(message, position)
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
        else:
            raise ValueError(f"wire type {tag & 7}")
        part = message[position : position + length]
        if len(part) != length:
            raise ValueError("a message ends early")
        position += length
        yield tag >> 3, part if tag & 7 == 2 else int.from_bytes(part, "little")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, least first, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number longer than 64 bits")


def masked(crc: int) -> int:
    """A checksum as both formats store it (leveldb, util/crc32c.h)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: NDArray[np.uint8]) -> int:
    """CRC-32C (RFC 3720, B.4) of bytes, 200 MB a second: 8,192 registers, each of every 8,192nd word.

    The register is linear in the bits: that of A followed by B is that of A, advanced by the length of B in zero
    bytes, xor that of B. So parts can be joined afterwards, and zeros in front change nothing.
    """
    register = np.array([0xFFFFFFFF], np.uint32)
    for start in range(0, len(data), 2**24):
        part = data[start : start + 2**24]
        lanes = 2**13 if len(part) >= 2**20 else 2**6
        low, high = _tables(4 * lanes)
        steps = -(-len(part) // (4 * lanes))
        padded = np.zeros(4 * lanes * steps, np.uint8)
        padded[len(padded) - len(part) :] = part
        lane = np.zeros(lanes, np.uint32)
        for words in padded.view("<u4").reshape(steps, lanes):
            lane = low[lane & 0xFFFF] ^ high[lane >> 16] ^ words
        distance = 4
        while len(lane) > 1:
            lane = _times(_advance(distance), lane[0::2]) ^ lane[1::2]
            distance *= 2
        register = _times(_advance(len(part)), register) ^ _times(_advance(4), lane)
    return int(register[0]) ^ 0xFFFFFFFF


def _times(matrix: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A linear map, given as the image of each of the 32 bits, applied to each register."""
    product = np.zeros_like(registers)
    for bit in range(32):
        product ^= ((registers >> np.uint32(bit)) & np.uint32(1)) * matrix[bit]
    return product


@cache
def _advance(count: int) -> NDArray[np.uint32]:
    """What `count` zero bytes do to the register."""
    if count == 1:
        registers = np.uint32(1) << np.arange(32, dtype=np.uint32)
        for _ in range(8):
            registers = (registers >> np.uint32(1)) ^ (registers & np.uint32(1)) * np.uint32(0x82F63B78)
        return registers
    half = _advance(count // 2)
    twice = _times(half, half)
    return _times(_advance(1), twice) if count % 2 else twice


@cache
def _tables(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """What `count` zero bytes do to each lower and to each upper half of the register."""
    halves = np.arange(65536, dtype=np.uint32)
    return _times(_advance(count), halves), _times(_advance(count), halves << np.uint32(16))
