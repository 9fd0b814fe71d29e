"""Datasets of other projects: what a folder holds, by names and first bytes, and where the tokens are in it.

- `npy`, build-nanogpt: `edufineweb_train_000001.npy`, a NumPy file of uint16.
- `llmc`, llm.c and modded-nanogpt: `fineweb_train_000001.bin`, the layout of our own uint16 shards (uint16.py).
- `nanogpt`: `train.bin` and `val.bin`, uint16 and nothing else. No id of GPT-2's begins like llm.c's header.
- `megatron`: pairs `X.bin`, uint16 and nothing else, and `X.idx`: the 9 bytes MMIDIDX 0 0, u64 version 1, u8 kind
  of number (8: uint16), u64 sequences S, u64 D; i32 lengths[S], i64 positions[S] in bytes, i64 documents[D]: the
  first sequence of each document, and S at the end.

Nothing here is trusted: sizes are compared with the files before anything is allocated; no pickle is ever loaded.
"""

import ast
import functools
import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data.formats import uint16
from gpt2_data.formats.manifest import SPLITS, check_split
from gpt2_data.formats.uint16 import TokenFile
from gpt2_data.tokenizer import EOT, VOCAB_SIZE

NAMES = {"npy": "build-nanogpt", "llmc": "llm.c", "nanogpt": "nanoGPT", "megatron": "Megatron"}
NPY_HEADER_BYTES = 128
IDX_MAGIC = b"MMIDIDX\0\0"
IDX_HEADER_BYTES = 34
_IDX_UINT16 = 8
_SHARD = re.compile(r"(?:(.*)_)?(train|val)(?:_(\d{1,12}))?\.(npy|bin)")
_SAMPLES, _SAMPLE_BYTES = 16, 16_384
_CHUNK = 1_000_000


@dataclass(frozen=True)
class ForeignShard:
    """A file of a foreign dataset. `max_token` is the largest id that reading accepts: the file is not read."""

    split: str
    file: str
    tokens: int
    max_token: int = VOCAB_SIZE - 1


@dataclass(frozen=True)
class ForeignManifest:
    """The description of a foreign dataset, in place of a dataset.json.

    Attributes:
        files: (split, file) in order.
        indexes: Megatron's .idx, one a file.
    """

    format: str
    files: tuple[tuple[str, TokenFile], ...]
    indexes: tuple[Path, ...] = ()
    vocab_size = VOCAB_SIZE

    @property
    def shards(self) -> tuple[ForeignShard, ...]:
        """Return the files as dataset.json would list them."""
        return tuple(ForeignShard(split, file.path.name, file.tokens) for split, file in self.files)

    def split(self, split: str) -> list[TokenFile]:
        """Return the files of a split in order. Raises ValueError for a split there cannot be."""
        check_split(split)
        return [file for name, file in self.files if name == split]

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(file.tokens for file in self.split(split))

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256, in hex, of the format and each file's split, name, size and a sample; names the dataset.

        The sample is 16 pieces of 16 KiB, spread evenly from the first byte to the last: all of a small file, a
        thousandth of a shard of 100M tokens. A file that was replaced, cut or swapped is noticed; a few flipped
        bits may not be. `gpt2-data convert` makes a dataset that can be verified.
        """
        files = [[split, file.path.name, *_sampled(file.path)] for split, file in self.files]
        files += [["index", path.name, *_sampled(path)] for path in self.indexes]
        return hashlib.sha256(json.dumps([self.format, files]).encode()).hexdigest()


def _sampled(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        last = max(size - _SAMPLE_BYTES, 0)
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return size, digest.hexdigest()


# --- what a folder holds


def sniff(path: Path) -> ForeignManifest | None:
    """Return what a folder, or the common beginning of a Megatron pair's two names, holds; None if it is unknown.

    Raises ValueError or OSError in one line if it is known but damaged, or may be more than one dataset.
    """
    if not path.is_dir():
        base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        pair = Path(f"{base}.bin"), Path(f"{base}.idx")
        return _megatron([pair]) if all(file.is_file() for file in pair) else None
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".docs") for name in names):
        return None  # ours, and it has lost its dataset.json
    pairs = [name for name in names if name.endswith(".bin") and f"{name[:-4]}.idx" in names]
    matches = [match for name in names if name not in pairs and (match := _SHARD.fullmatch(name))]
    kinds = {_kind(path / match.string): match.string for match in matches}
    if pairs:
        kinds["megatron"] = pairs[0]
    if len(kinds) > 1:
        (one, file), (other, other_file) = sorted(kinds.items())[:2]
        raise ValueError(
            f"{path} may be more than one dataset: {file} is {NAMES[one]}'s and {other_file} is {NAMES[other]}'s: "
            "keep one kind in a folder"
        )
    if pairs:
        return _megatron([(path / name, path / f"{name[:-4]}.idx") for name in pairs])
    return _shards(path, next(iter(kinds)), matches) if kinds else None


def _kind(path: Path) -> str:
    if path.suffix == ".npy":
        return "npy"
    with path.open("rb") as file:
        if file.read(4) == struct.pack("<i", uint16.SHARD_MAGIC):
            return "llmc"
    if path.name in ("train.bin", "val.bin"):
        return "nanogpt"
    raise ValueError(f"{path}: a name as llm.c's shards have, but not their header: what it holds is not known")


def _shards(folder: Path, kind: str, matches: list[re.Match[str]]) -> ForeignManifest:
    """Put the files of each split in the order of their numbers, which must be of one series without a gap."""
    openers: dict[str, Callable[[Path], TokenFile]] = {
        "npy": check_npy,
        "llmc": lambda path: TokenFile(path, uint16.check_shard(path)),
        "nanogpt": _check_raw,
    }
    files: list[tuple[str, TokenFile]] = []
    for split in SPLITS:
        here = sorted((match for match in matches if match[2] == split), key=lambda match: int(match[3] or 0))
        prefixes = sorted({match[1] or "" for match in here})
        if len(prefixes) > 1:
            raise ValueError(
                f"{folder} may be more than one dataset: its {split} files begin with {prefixes[0]!r} and "
                f"{prefixes[1]!r}: keep one in a folder"
            )
        for before, after in itertools.pairwise(here):
            if int(after[3] or 0) != int(before[3] or 0) + 1:
                raise ValueError(f"{folder}: {after.string} does not follow {before.string}: a shard is missing")
        files += [(split, openers[kind](folder / match.string)) for match in here]
    return ForeignManifest(kind, tuple(files))


def _check_raw(path: Path) -> TokenFile:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size:,} bytes are not a file of uint16 tokens")
    return TokenFile(path, size // 2, 0)


# --- build-nanogpt


def check_npy(path: Path) -> TokenFile:
    """Open a NumPy file of one row of uint16. Raises ValueError or OSError naming it.

    Not by numpy.lib.format, which allocates what the header's length claims, up to 4 GB.

    Layout: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(8)
        version = magic[6] if len(magic) == 8 else 0
        if magic[:6] != b"\x93NUMPY" or version not in (1, 2, 3):
            raise ValueError(f"{path}: not a NumPy file (some projects give raw tokens that name)")
        length = int.from_bytes(file.read(2 if version == 1 else 4), "little")
        start = file.tell() + length
        if length > 10_000 or start > size:
            raise ValueError(f"{path}: a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length).decode("latin-1" if version < 3 else "utf-8", "replace")
    try:
        header = ast.literal_eval(text.strip())
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise ValueError(f"{path}: its NumPy header cannot be read") from None
    if kind != "<u2" or fortran is not False:
        order = ", columns first" if fortran else ""
        raise ValueError(f"{path}: holds {str(kind)[:40]!r}{order}, not uint16 tokens ('<u2')")
    if not (isinstance(shape, tuple) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0):
        raise ValueError(f"{path}: its shape is {str(shape)[:40]}, not one row of tokens")
    uint16.check_size(path, size, start + 2 * shape[0], f"{shape[0]:,} tokens")
    return TokenFile(path, shape[0], start)


def npy_header(num_tokens: int) -> bytes:
    """Return the 128 bytes that numpy.save writes in front of that many uint16."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({num_tokens},), }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", NPY_HEADER_BYTES - 10) + text.encode().ljust(117) + b"\n"


# --- Megatron


def _megatron(pairs: list[tuple[Path, Path]]) -> ForeignManifest:
    """Take files with `val` or `valid` in their names for validation, all others but `test` for training."""
    pairs_of: dict[str, list[tuple[Path, Path]]] = {"train": [], "val": [], "test": []}
    for pair in pairs:
        words = set(re.split(r"[^a-z]+", pair[0].stem.lower()))
        split = "val" if words & {"val", "valid", "validation"} else "test" if "test" in words else "train"
        pairs_of[split].append(pair)
    chosen = [(split, pair) for split in SPLITS for pair in pairs_of[split]]
    if not chosen:
        raise ValueError(f"{pairs[0][0].parent} holds test data only: {', '.join(pair[0].name for pair in pairs)}")
    files = tuple((split, check_megatron(*pair)) for split, pair in chosen)
    return ForeignManifest("megatron", files, tuple(index for _, (_, index) in chosen))


def check_megatron(tokens: Path, index: Path) -> TokenFile:
    """Open a pair whose sequences are uint16 and fill the .bin in order. Raises ValueError or OSError."""
    sequences, documents = _read_idx_header(index)
    size = tokens.stat().st_size
    position = 0
    for start in range(0, sequences, _CHUNK):
        count = min(_CHUNK, sequences - start)
        lengths = _idx_array(index, "<i4", 4 * start, count)
        ends = position + 2 * np.cumsum(lengths)
        positions = _idx_array(index, "<i8", 4 * sequences + 8 * start, count)
        if (lengths < 0).any() or ends[-1] > size or (positions != ends - 2 * lengths).any():
            raise ValueError(f"{index}: its sequences do not lie one after the other in {tokens.name}: damaged")
        position = int(ends[-1])
    uint16.check_size(tokens, size, position, f"{position // 2:,} tokens")
    if position == 0:
        raise ValueError(f"{tokens}: holds no tokens")
    before = 0
    for start in range(0, documents, _CHUNK):
        numbers = _idx_array(index, "<i8", 12 * sequences + 8 * start, min(_CHUNK, documents - start))
        if (np.diff(numbers, prepend=before) < 0).any() or numbers[-1] > sequences:
            raise ValueError(
                f"{index}: its documents are out of order or outside the {sequences:,} sequences: damaged"
            )
        before = int(numbers[-1])
    return TokenFile(tokens, position // 2, 0)


def _read_idx_header(index: Path) -> tuple[int, int]:
    """Return (sequences, entries that list documents), once they agree with the file's size."""
    with index.open("rb") as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(IDX_HEADER_BYTES)
    if len(header) < IDX_HEADER_BYTES or not header.startswith(IDX_MAGIC):
        raise ValueError(f"{index}: not an index of Megatron's")
    version, kind, sequences, documents = struct.unpack("<QBQQ", header[len(IDX_MAGIC) :])
    if version != 1:
        raise ValueError(f"{index}: version {version}, this program reads version 1")
    if kind != _IDX_UINT16:
        raise ValueError(f"{index}: number kind {kind}, not uint16 ({_IDX_UINT16}), which GPT-2's tokens are")
    expected = IDX_HEADER_BYTES + 12 * sequences + 8 * documents
    uint16.check_size(index, size, expected, f"{sequences:,} sequences and {documents:,} documents")
    return sequences, documents


def _idx_array(index: Path, kind: str, position: int, count: int) -> NDArray[np.int64]:
    """Read `count` numbers of an .idx from byte `position` behind the header on."""
    return np.fromfile(index, kind, count, offset=IDX_HEADER_BYTES + position).astype(np.int64)


def megatron_starts(description: ForeignManifest, split: str) -> NDArray[np.int64]:
    """Return where each document of a split begins in its stream, in tokens; 8 bytes a document."""
    starts, before = [np.empty(0, np.int64)], 0
    for (name, file), index in zip(description.files, description.indexes, strict=True):
        if name == split:
            sequences, documents = _read_idx_header(index)
            positions = _idx_array(index, "<i8", 4 * sequences, sequences) // 2
            numbers = _idx_array(index, "<i8", 12 * sequences, documents)[:-1]
            starts.append(positions[numbers[numbers < sequences]] + before)  # behind the last are empty ones
            before += file.tokens
    return np.concatenate(starts)


def write_idx(file: BinaryIO, begins: NDArray[np.int64]) -> None:
    """Write the .idx of one-document sequences; `begins` are in tokens, with the number of tokens at the end."""
    count = len(begins) - 1
    file.write(IDX_MAGIC + struct.pack("<QBQQ", 1, _IDX_UINT16, count, count + 1))
    for start in range(0, count, _CHUNK):
        file.write(np.diff(begins[start : start + _CHUNK + 1]).astype("<i4").data)
    for start in range(0, count, _CHUNK):
        file.write((2 * begins[start : min(start + _CHUNK, count)]).astype("<i8").data)
    for start in range(0, count + 1, _CHUNK):
        file.write(np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").data)


# --- documents


def scanned_starts(
    read: Callable[[NDArray[np.uint16], int], None], num_tokens: int, eot_behind: bool
) -> NDArray[np.int64]:
    """Find where documents begin: at each EOT, or if EOTs stand behind documents, after each but the last.

    Reads the stream once and returns 8 bytes a document. `read` fills an array with tokens from a position on.
    """
    pieces = [np.zeros(int(eot_behind), np.int64)]
    buffer = np.empty(min(_CHUNK, num_tokens), np.uint16)
    for start in range(0, num_tokens, _CHUNK):
        tokens = buffer[: num_tokens - start]
        read(tokens, start)
        pieces.append(np.flatnonzero(tokens == EOT) + start + int(eot_behind))
    starts = np.concatenate(pieces)
    inside: NDArray[np.int64] = starts[starts < num_tokens]
    return inside
