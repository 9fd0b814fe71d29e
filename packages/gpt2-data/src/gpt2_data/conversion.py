"""A dataset, ours or others', into another format: each split's tokens stay the same, byte for byte.

Where a format has shards and the source has them too, they are cut at the same places.
"""

import contextlib
import fcntl
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import dataset, tokenizer
from gpt2_data.building import cut_shards as shards
from gpt2_data.dataset import Dataset
from gpt2_data.formats import arrow, foreign, manifest
from gpt2_data.formats import uint16 as formats
from gpt2_data.formats.uint16 import TokenFile

FORMATS = ("npy", "llmc", "nanogpt", "megatron", "arrow")
SHARD_TOKENS = 100_000_000
"""What is cut where the source has no shards: nanoGPT's and Megatron's files."""
_CHUNK = 1_000_000
_MOST_TOKENS = 2**31 - 1  # of a sequence: an i32

Progress = Callable[[str, int, int], None]
"""Told ("writing", tokens done, of how many)."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made."""

    out: Path
    format: str
    tokens: int
    files: int
    bytes: int


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, start + tokens) of a split's file, which become one shard."""

    file: TokenFile
    start: int
    tokens: int


def convert(
    source: str | Path, out: str | Path, to: str, progress: Progress = lambda what, done, total: None
) -> ConvertResult:
    """Write the dataset `source` to the folder `out`, which must not exist or be empty, in the format `to`.

    llmc and arrow are datasets of ours, with a dataset.json; the others are as their makers' programs read them.
    Every byte of a dataset of ours is compared with its dataset.json on the way. `out` appears whole or not at
    all: until then it is OUT.converting, beside it. Memory: a few chunks of 1M tokens, and 20 bytes a document of
    a shard (of the whole source, if it is others' and the documents are asked for). Raises ValueError or OSError.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}: known are {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another")
    opened = Dataset(source)
    total = sum(opened.tokens(split) for split in manifest.SPLITS)
    if total == 0:
        raise ValueError(f"{opened.path} holds no tokens")
    target = out.resolve()  # not a link, which cannot be renamed over
    work = target.with_name(target.name + ".converting")
    documents = total // 50  # a guess: others' are not counted before they are read
    if isinstance(opened.manifest, manifest.Manifest):
        documents = sum(opened.num_documents(split) for split in manifest.SPLITS)
    with _work_folder(work, 2 * total + 28 * documents + 1_000_000):  # Megatron's: 20 in the .idx, 8 meanwhile
        job = _Job(opened, work, to, lambda done: progress("writing", done, total))
        {"npy": _to_npy, "nanogpt": _to_nanogpt, "megatron": _to_megatron}.get(to, _to_ours)(job)
        job.check_unchanged()
        files = list(work.glob("[!.]*"))
        size = sum(path.stat().st_size for path in files)
        work.rename(target)  # takes the place of an empty folder
        (target / ".lock").unlink()
    formats.fsync_folder(target.parent)
    return ConvertResult(out, to, total, len(files), size)


@contextlib.contextmanager
def _work_folder(work: Path, needed: int) -> Iterator[None]:
    """A fresh folder of ours alone, gone if what is done in it fails."""
    if work.is_dir() and any(work.iterdir()) and not (work / ".lock").exists():
        raise ValueError(f"{work} was not made by gpt2-data: choose another OUT")
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except BlockingIOError:
            raise ValueError(f"another conversion is at work in {work}") from None
        try:
            for left in work.iterdir():  # by one that was killed
                if left.name != ".lock":
                    left.unlink()
            free = shutil.disk_usage(work).free
            if needed > free:
                raise OSError(f"{work.parent}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")
            yield
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


class _Job:
    """A conversion at work: reads the source from end to end, hashed on the way."""

    def __init__(self, opened: Dataset, work: Path, to: str, progress: Callable[[int], None]) -> None:
        self.dataset, self.work, self.to = opened, work, to
        self.made = opened.manifest
        self._hash = self.made.hash
        self._progress = progress
        self._done = 0
        self.inputs: list[dict[str, Any]] = []
        """The files that were read, as dataset.json lists a source."""

    def pieces(self, split: str) -> list[_Piece]:
        """What becomes a shard each."""
        whole = isinstance(self.made, manifest.Manifest) or self.made.format in ("npy", "llmc")
        found = []
        for file in self.dataset.files(split):
            size = file.tokens if whole and file.tokens <= formats.MAX_SHARD_TOKENS else SHARD_TOKENS
            for start in range(0, file.tokens, size):
                found.append(_Piece(file, start, min(size, file.tokens - start)))
        return found

    def tokens(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """All tokens of a split in chunks; a chunk is good until the next is asked for."""
        for file in self.dataset.files(split):
            yield from self._read(file, [file.tokens])

    def pieces_read(self, split: str) -> Iterator[tuple[_Piece, Iterator[NDArray[np.uint16]]]]:
        """Each piece with its tokens, which must be taken before the next."""
        for file, pieces in itertools.groupby(self.pieces(split), key=lambda piece: piece.file):
            here = list(pieces)
            chunks = self._read(file, [piece.tokens for piece in here])
            for piece in here:
                yield piece, _take(chunks, piece.tokens)
            assert next(chunks, None) is None  # and so the hash was compared

    def _read(self, file: TokenFile, cuts: list[int]) -> Iterator[NDArray[np.uint16]]:
        """A file's tokens; no chunk goes over a cut. Raises ValueError at the end if it is not the right file."""
        digest = hashlib.sha256()
        buffer = np.empty(_CHUNK, formats.TOKEN)
        position = 0
        with file.path.open("rb") as source:
            digest.update(source.read(file.start))
            for left in cuts:
                while left:
                    chunk = buffer[: min(left, _CHUNK)]
                    if source.readinto(chunk.data.cast("B")) != chunk.nbytes:
                        raise ValueError(f"{file.path}: cut short while it was read, at token {position:,}")
                    digest.update(chunk.data)
                    if int(chunk.max()) >= (limit := self.made.vocab_size):
                        at = int(np.argmax(chunk >= limit))
                        raise ValueError(f"{file.path}: token {position + at:,} is {chunk[at]}, not below {limit}")
                    yield chunk
                    left, position = left - len(chunk), position + len(chunk)
                    self._done += len(chunk)
                    self._progress(self._done)
            rest = source.read(1024)
            digest.update(rest)
            self._finish(file, digest.hexdigest(), source.tell())

    def _finish(self, file: TokenFile, sha256: str, size: int) -> None:
        if isinstance(self.made, foreign.ForeignManifest):
            kind = self.made.format
        else:
            kind = str(self.made.options["format"])
            shard = self.shard_of(file)
            if sha256 != shard.sha256:
                raise ValueError(f"{file.path}: damaged: its SHA-256 is not the one in {manifest.FILE_NAME}")
            if shard.docs is not None:
                data = (self.dataset.path / shard.docs.file).read_bytes()
                if hashlib.sha256(data).hexdigest() != shard.docs.sha256:
                    raise ValueError(f"{self.dataset.path / shard.docs.file}: damaged: its SHA-256 is another")
        self.inputs.append({"kind": kind, "name": file.path.name, "bytes": size, "sha256": sha256})

    def shard_of(self, file: TokenFile) -> manifest.Shard:
        """What dataset.json says of a file of a dataset of ours."""
        assert isinstance(self.made, manifest.Manifest)
        return next(shard for shard in self.made.shards if shard.file == file.path.name)

    def check_unchanged(self) -> None:
        """Raise ValueError if the source is no longer what was opened."""
        if dataset.load(self.dataset.path).hash != self._hash:
            raise ValueError(f"{self.dataset.path} was changed while it was read: run the same command again")


def _take(chunks: Iterator[NDArray[np.uint16]], count: int) -> Iterator[NDArray[np.uint16]]:
    while count:
        chunk = next(chunks)
        yield chunk
        count -= len(chunk)


# --- the formats


def _to_ours(job: _Job) -> None:
    written: list[manifest.Shard] = []
    form = "arrow" if job.to == "arrow" else "uint16"
    number = 0  # of the next document
    for split in ("val", "train"):
        for piece, chunks in job.pieces_read(split):
            path = job.work / shards.shard_name(split, len(written), form)
            starts = _eots(job, piece)
            ids: NDArray[np.int64] | None = None
            if form == "arrow":
                goes_on = int(len(starts) == 0 or starts[0] > 0)  # with the document before, or one without an EOT
                number = max(number, goes_on)
                ids = _ids(job, piece, np.arange(number - goes_on, number + len(starts)))
                number += len(starts)
            written.append(shards.write_documents(path, job.work, split, piece.tokens, chunks, starts, ids))
    source: dict[str, Any]
    if isinstance(job.made, manifest.Manifest):
        source, options = job.made.source, job.made.options | {"format": form}
    else:
        source = {"inputs": job.inputs, "documents": sum(shard.documents for shard in written)}
        options = {"format": form, "order": "source", "seed": None}
    origin = {"format": job.inputs[0]["kind"], "dataset": job.made.hash}
    made = manifest.Manifest(tokenizer.identity(), source | {"converted_from": origin}, options, tuple(written))
    with formats.atomic(job.work / manifest.FILE_NAME, job.work) as file:
        file.write(made.to_bytes())


def _eots(job: _Job, piece: _Piece) -> NDArray[np.int64]:
    """Where documents start in a piece: in ours, where an EOT is."""
    reader = formats.TokenFiles([piece.file])
    starts = foreign.scanned_starts(
        lambda out, at: reader.read_into(out, 0, piece.start + at), piece.tokens, eot_behind=False
    )
    reader.close()
    if isinstance(job.made, manifest.Manifest) and len(starts) != job.shard_of(piece.file).documents:
        raise ValueError(
            f"{piece.file.path}: damaged: it has {len(starts):,} documents, dataset.json says otherwise"
        )
    return starts


def _ids(job: _Job, piece: _Piece, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of an Arrow shard's rows, which are the documents `numbers` of the whole dataset.

    Those of Arrow shards of ours stay; else they follow from the order, or count from 0 where none is known.
    """
    if isinstance(job.made, foreign.ForeignManifest):
        return numbers
    opened = manifest.open_shard(job.dataset.path, job.shard_of(piece.file))
    if isinstance(opened, arrow.ArrowShard):
        return opened.ids()
    total = sum(job.made.documents(split) for split in manifest.SPLITS)
    return shards.document_ids(numbers, total, job.made.options["seed"])


def _to_npy(job: _Job) -> None:
    number = 0
    for split in ("val", "train"):
        for piece, chunks in job.pieces_read(split):
            _write(job, f"{split}_{number:06d}.npy", foreign.npy_header(piece.tokens), chunks)
            number += 1


def _to_nanogpt(job: _Job) -> None:
    for split in manifest.SPLITS:
        if job.dataset.tokens(split):
            _write(job, f"{split}.bin", b"", job.tokens(split))


def _to_megatron(job: _Job) -> None:
    """One sequence a document; what stands in front of a split's first document is one too."""
    for split in manifest.SPLITS:
        total = job.dataset.tokens(split)
        if total == 0:
            continue
        _write(job, f"{split}_text_document.bin", b"", job.tokens(split))
        begins = job.work / ".begins"  # i64, in tokens, so that they need not be held
        before = 0
        with begins.open("wb") as file:
            found = job.dataset.document_starts(split)
            first = next(found, total)
            for chunk in itertools.chain([[0]] if first else [], [[first]], _batched(found), [[total]]):
                numbers = np.array(chunk, "<i8")
                if (np.diff(numbers, prepend=before) > _MOST_TOKENS).any():
                    raise ValueError(f"{split}: a document of over {_MOST_TOKENS:,} tokens: Megatron has no such")
                before = int(numbers[-1])
                file.write(numbers.data)
        with formats.atomic(job.work / f"{split}_text_document.idx", job.work) as file:
            foreign.write_idx(file, np.memmap(begins, "<i8", "r"))
        begins.unlink()


def _batched(numbers: Iterator[int]) -> Iterator[list[int]]:
    while batch := list(itertools.islice(numbers, _CHUNK)):
        yield batch


def _write(job: _Job, name: str, header: bytes, chunks: Iterable[NDArray[np.uint16]]) -> None:
    with formats.atomic(job.work / name, job.work) as file:
        file.write(header)
        for chunk in chunks:
            file.write(chunk.data)
