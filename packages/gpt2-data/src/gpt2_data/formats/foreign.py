"""Datasets of other projects: what a folder holds, by names and first bytes, and where the tokens are in it.

- `npy`, build-nanogpt: `edufineweb_train_000001.npy`, a NumPy file of uint16.
- `llmc`, llm.c and modded-nanogpt: `fineweb_train_000001.bin`, the layout of our own uint16 shards (uint16.py).
- `nanogpt`: `train.bin` and `val.bin`, uint16 and nothing else. llm.c's header begins with no GPT-2 id.
- `megatron`: pairs `X.bin`, uint16 and nothing else, and `X.idx`: the 9 bytes MMIDIDX 0 0, u64 version 1, u8 kind
  of number (8: uint16), u64 sequences S, u64 D; i32 lengths[S], i64 positions[S] in bytes, i64 documents[D]: the
  first sequence of each document, and S at the end.

A tokenizer.json beside them is that of their ids, which are GPT-2's without one.

Nothing here is trusted: sizes are compared with the files before anything is allocated; no pickle is ever loaded.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data import vocabulary
from gpt2_data.formats import uint16
from gpt2_data.formats.manifest import SPLITS, Tokenized, check_split
from gpt2_data.formats.uint16 import Numbers, TokenFile, TokenFiles, check_size
from gpt2_data.tokenizer import EOT

NAMES = {"npy": "build-nanogpt", "llmc": "llm.c", "nanogpt": "nanoGPT", "megatron": "Megatron"}
_IDX_MAGIC, _IDX_UINT16 = b"MMIDIDX\0\0", 8
_IDX_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _NUMBER = np.dtype("<i4"), np.dtype("<i8")
_SHARD = re.compile(r"(?:(.*)_)?(train|val)(?:_(\d{1,12}))?\.(npy|bin)")
_SAMPLES, _SAMPLE_BYTES = 16, 16_384
_CHUNK = 1_000_000


@dataclass(frozen=True)
class ForeignShard:
    """A file of a foreign dataset, and Megatron's index of it."""

    split: str
    file: TokenFile
    index: Path | None = None
    eot: int = EOT
    behind: bool = False  # an EOT follows each document, as in nanoGPT's own files; it does not begin one

    @functools.cached_property
    def max_token(self) -> int:
        """The largest id in the file, which is read from end to end."""
        return max(int(tokens.max()) for tokens in scan(self.file))

    @functools.cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """The positions, in tokens, at which documents begin: those in Megatron's .idx, else at or after EOTs."""
        if self.index is not None:
            _, positions, documents = _read_idx(self.index)
            first = documents[:-1]
            return positions[first[first < len(positions)]] // 2  # those after the last sequence are empty
        starts = eots(self.file, self.eot)
        if self.behind:
            starts = np.append(0, starts + 1)
        return starts[starts < self.file.tokens]

    @property
    def lacks_marks(self) -> bool:
        """True if documents may begin without an EOT. A text that has none gets none: it may be of characters."""
        return self.index is not None or (self.behind and len(eots(self.file, self.eot)) > 0)

    @property
    def documents(self) -> int:
        """The number of documents that start in the file."""
        return len(self.document_starts)


@dataclass(frozen=True)
class ForeignManifest(Tokenized):
    """The description of a foreign dataset, in place of a dataset.json; its shards are in order."""

    format: str
    shards: tuple[ForeignShard, ...]
    tokenizer: dict[str, Any]  # that of the tokenizer.json beside the files, or GPT-2's

    def split(self, split: str) -> list[ForeignShard]:
        """Return the files of a split in order. Raises ValueError for an unknown split."""
        check_split(split)
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(shard.file.tokens for shard in self.split(split))

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256, in hex, of the format and each file's split, name, size and a sample, and the tokenizer.

        The sample is 16 pieces of 16 KiB, spread evenly from the first byte to the last: all of a small file, a
        thousandth of a shard of 100M tokens. A file that was replaced, cut or swapped is noticed; a few flipped
        bits may not be.
        """
        paths = [(shard.split, shard.file.path) for shard in self.shards]
        paths += [("index", shard.index) for shard in self.shards if shard.index is not None]
        files = [[split, path.name, *_sampled(path)] for split, path in paths]
        own = [self.tokenizer] if self.own_tokenizer else []
        return hashlib.sha256(json.dumps([self.format, files, *own]).encode()).hexdigest()


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
    """Return what a folder, or a Megatron pair's path without its endings, holds; None if it is unknown.

    Raises ValueError or OSError if it is known but damaged, or may be more than one dataset.
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
        files = " and ".join(f"{name} is {NAMES[kind]}'s" for kind, name in sorted(kinds.items()))
        raise ValueError(f"{path} may be more than one dataset: {files}: keep one kind in a folder")
    if pairs:
        return _megatron([(path / name, path / f"{name[:-4]}.idx") for name in pairs])
    return _shards(path, next(iter(kinds)), matches) if kinds else None


def _kind(path: Path) -> str:
    if path.suffix == ".npy":
        return "npy"
    if uint16.read_header(path, 4)[0] == struct.pack("<i", uint16.SHARD_MAGIC):
        return "llmc"
    if path.name in ("train.bin", "val.bin"):
        return "nanogpt"
    raise ValueError(f"{path}: named like a shard of llm.c, but without its header: the contents are unknown")


def _shards(folder: Path, kind: str, matches: list[re.Match[str]]) -> ForeignManifest:
    """Put the files of each split in the order of their numbers, which must be of one series without a gap."""
    open_file = {"npy": _check_npy, "llmc": uint16.check_shard, "nanogpt": _check_raw}[kind]
    shards: list[ForeignShard] = []
    for split in SPLITS:
        here = sorted((match for match in matches if match[2] == split), key=lambda match: int(match[3] or 0))
        for before, after in itertools.pairwise(here):
            if before[1] != after[1] or int(after[3] or 0) != int(before[3] or 0) + 1:
                raise ValueError(
                    f"{folder}: {after.string} does not follow {before.string}: a shard is missing, "
                    "or there is more than one dataset: keep one in a folder"
                )
        shards += [ForeignShard(split, open_file(folder / match.string)) for match in here]
    tokenizer = _tokenizer(folder)
    eot = tokenizer["eot"]
    behind = kind == "nanogpt" and _mark_is_behind([shard.file for shard in shards], eot)
    return ForeignManifest(kind, tuple(replace(shard, eot=eot, behind=behind) for shard in shards), tokenizer)


def _tokenizer(folder: Path) -> dict[str, Any]:
    file = folder / vocabulary.FILE_NAME
    return vocabulary.identity(vocabulary.load(file) if file.is_file() else None)


def _mark_is_behind(files: list[TokenFile], eot: int) -> bool:
    """Return whether EOTs follow the documents of nanoGPT's files: so they do in its own, not in converted ones.

    Only a file with the mark in front begins with an EOT and ends with another token: its last document. One whose
    first or last document is empty may begin and end with an EOT; then the other file decides.
    """
    ends = [[_token(file, at) == eot for at in (0, file.tokens - 1)] for file in files]
    return [True, False] not in ends and any(not begins for begins, _ in ends)


def _token(file: TokenFile, at: int) -> int:
    return int(Numbers(file.path, file.tokens, file.start, uint16.TOKEN).read(at, at + 1)[0])


def _check_raw(path: Path) -> TokenFile:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size:,} bytes are not a file of uint16 tokens")
    return TokenFile(path, size // 2, 0)


def _check_npy(path: Path) -> TokenFile:
    """Open a NumPy file of one row of uint16."""
    with path.open("rb") as file:
        try:
            # A header of version 1 is 64 KiB at most; numpy allocates what the header's length claims.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # numpy catches only some of what Python's parser may raise
            raise ValueError(
                f"{path}: not a NumPy file of version 1, or its header cannot be read "
                "(some projects give raw tokens that name)"
            ) from None
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype != uint16.TOKEN or fortran or len(shape) != 1 or shape[0] < 1:
        order = ", columns first" if fortran else ""
        raise ValueError(
            f"{path}: holds {dtype.str!r} of shape {str(shape)[:40]}{order}, not one row of uint16 tokens ('<u2')"
        )
    check_size(path, size, start + 2 * shape[0], f"{shape[0]:,} tokens")
    return TokenFile(path, shape[0], start)


# --- Megatron


def _megatron(pairs: list[tuple[Path, Path]]) -> ForeignManifest:
    """Take files with `val` or `valid` in their names for validation, all others but `test` for training."""
    shards: list[ForeignShard] = []
    tokenizer = _tokenizer(pairs[0][0].parent)
    for tokens, index in pairs:
        words = set(re.split(r"[^a-z]+", tokens.stem.lower()))
        split = "val" if words & {"val", "valid", "validation"} else "train"
        if split == "val" or "test" not in words:
            shards.append(ForeignShard(split, _check_megatron(tokens, index), index, tokenizer["eot"]))
    if not shards:
        raise ValueError(f"{pairs[0][0].parent} holds test data only: {', '.join(pair[0].name for pair in pairs)}")
    return ForeignManifest("megatron", tuple(sorted(shards, key=lambda shard: shard.split)), tokenizer)


def _check_megatron(tokens: Path, index: Path) -> TokenFile:
    """Open a pair whose sequences fill the .bin in order."""
    lengths, positions, documents = _read_idx(index)
    ends = 2 * np.cumsum(lengths)
    if (lengths < 0).any() or (positions != ends - 2 * lengths).any():
        raise ValueError(f"{index}: its sequences do not lie one after the other in {tokens.name}: damaged")
    count = int(lengths.sum())
    check_size(tokens, tokens.stat().st_size, 2 * count, f"{count:,} tokens")
    if count == 0:
        raise ValueError(f"{tokens}: holds no tokens")
    if (np.diff(documents, prepend=0, append=len(lengths)) < 0).any():
        raise ValueError(
            f"{index}: its documents are out of order or outside the {len(lengths):,} sequences: damaged"
        )
    return TokenFile(tokens, count, 0)


def _read_idx(index: Path) -> list[NDArray[np.int64]]:
    """Return an .idx's lengths, positions and documents, after checking its counts against its size."""
    start = _IDX_HEADER.size
    header, size = uint16.read_header(index, start)
    if size < start or not header.startswith(_IDX_MAGIC):
        raise ValueError(f"{index}: not a Megatron index")
    _, version, kind, sequences, documents = _IDX_HEADER.unpack(header)
    if (version, kind) != (1, _IDX_UINT16):
        raise ValueError(
            f"{index}: version {version}, tokens of kind {kind}: this program reads version 1 and GPT-2's uint16 "
            f"({_IDX_UINT16})"
        )
    positions = start + _LENGTH.itemsize * sequences
    behind = positions + _NUMBER.itemsize * sequences
    what = f"{sequences:,} sequences and {documents:,} documents"
    check_size(index, size, behind + _NUMBER.itemsize * documents, what)
    arrays = (sequences, start, _LENGTH), (sequences, positions, _NUMBER), (documents, behind, _NUMBER)
    return [Numbers(index, *array).read() for array in arrays]


def write_idx(file: BinaryIO, starts: NDArray[np.int64]) -> None:
    """Write an .idx with a sequence per document; `starts` are in tokens, and end with the number of tokens."""
    count = len(starts) - 1
    file.write(_IDX_HEADER.pack(_IDX_MAGIC, 1, _IDX_UINT16, count, count + 1))
    file.write(np.diff(starts).astype(_LENGTH).data)
    file.write((2 * starts[:-1]).astype(_NUMBER).data)
    file.write(np.arange(count + 1, dtype=_NUMBER).data)


def eots(file: TokenFile, eot: int = EOT) -> NDArray[np.int64]:
    """Read a file once and return where its EOTs are."""
    pieces = [np.flatnonzero(tokens == eot) + _CHUNK * i for i, tokens in enumerate(scan(file))]
    return np.concatenate([np.empty(0, np.int64), *pieces])


def scan(file: TokenFile) -> Iterator[NDArray[np.uint16]]:
    """Yield the tokens of a file in chunks."""
    reader = TokenFiles([file])
    for start in range(0, file.tokens, _CHUNK):
        tokens = np.empty(min(_CHUNK, file.tokens - start), np.uint16)
        reader.read_into(tokens, 0, start)
        yield tokens


def mark_in_front(shard: ForeignShard, path: Path) -> TokenFile:
    """Write the shard's tokens to `path` with each document begun by an EOT, which it may have had at its end."""
    starts, total = shard.document_starts, shard.file.tokens
    reader = TokenFiles([shard.file])
    with path.open("wb") as file:
        for number, (start, stop) in enumerate(itertools.pairwise([0, *starts.tolist(), total])):
            document = np.empty(stop - start, np.uint16)
            reader.read_into(document, 0, start)
            if number and (start == stop or document[0] != shard.eot):  # what precedes the first document stays
                end = len(document) - (start < stop and document[-1] == shard.eot)
                document = np.insert(document[:end], 0, shard.eot)
            file.write(document.data)
        return TokenFile(path, file.tell() // 2, 0)
