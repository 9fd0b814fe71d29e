"""A dataset into another format: each split's tokens stay the same, byte for byte.

Where a format has shards and the source has them too, they are cut at the same places.
"""

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import dataset, disk, tokenizer
from gpt2_data.building.cut_shards import document_ids
from gpt2_data.dataset import Dataset
from gpt2_data.formats import foreign, manifest, uint16
from gpt2_data.formats.arrow import ArrowShard
from gpt2_data.formats.manifest import FILE_NAME, SPLITS, Manifest, Shard, shard_name, write_documents
from gpt2_data.formats.uint16 import TokenFile

FORMATS = ("npy", "llmc", "nanogpt", "megatron", "arrow")
SHARD_TOKENS = 100_000_000  # in a shard, where the source has none: of nanoGPT's and Megatron's files
_CHUNK = 1_000_000
_MAX_SEQUENCE = 2**31 - 1  # tokens: an i32

Progress = Callable[[str, int, int], None]  # is called with ("writing", tokens done, of how many)


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion."""

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
    """Write the dataset `source` to the folder `out` in another format.

    Every byte of a dataset of ours is compared with its dataset.json on the way. Memory: a few chunks of 1M
    tokens, and 20 bytes a document of a shard (of the whole source, if another project's documents are needed).

    Args:
        out: must not exist or be empty. It appears whole or not at all: until then it is OUT.converting.
        to: one of FORMATS. llmc and arrow are datasets of ours, with a dataset.json; the others are as their
            makers' programs read them.

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}: known are {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another")
    opened = Dataset(source)
    total = sum(opened.tokens(split) for split in SPLITS)
    if total == 0:
        raise ValueError(f"{opened.path} holds no tokens")
    target = out.resolve()  # not a link, which cannot be renamed over
    work = target.with_name(target.name + ".converting")
    documents = total // 50  # a guess: another project's are not counted before they are read
    if isinstance(opened.manifest, Manifest):
        documents = sum(opened.num_documents(split) for split in SPLITS)
    with _work_folder(work, 2 * total + 28 * documents + 1_000_000):  # Megatron's: 20 in the .idx, 8 meanwhile
        job = _Job(opened, work, to, lambda done: progress("writing", done, total))
        {"npy": _to_npy, "nanogpt": _to_nanogpt, "megatron": _to_megatron}.get(to, _to_ours)(job)
        job.check_unchanged()
        files = list(work.glob("[!.]*"))
        size = sum(path.stat().st_size for path in files)
        work.rename(target)  # takes the place of an empty folder
        (target / ".lock").unlink()
    disk.sync_folder(target.parent)
    return ConvertResult(out, to, total, len(files), size)


@contextlib.contextmanager
def _work_folder(work: Path, needed: int) -> Iterator[None]:
    """Work in a fresh folder alone; it is removed if that fails."""
    if work.is_dir() and any(work.iterdir()) and not (work / ".lock").exists():
        raise ValueError(f"{work} was not made by gpt2-data: choose another OUT")
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("a") as file:
        disk.lock(file, f"another conversion is at work in {work}: wait for it or choose another OUT")
        try:
            for path in work.iterdir():  # of a conversion that was killed
                if path.name != ".lock":
                    path.unlink()
            free = shutil.disk_usage(work).free
            if needed > free:
                raise OSError(
                    f"{work.parent}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free: "
                    "make room or choose another OUT"
                )
            yield
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


class _Job:
    """A conversion at work: it reads the source from end to end and hashes it on the way.

    Attributes:
        inputs: the files that were read, as dataset.json lists a source.
    """

    def __init__(self, opened: Dataset, work: Path, to: str, progress: Callable[[int], None]) -> None:
        self.dataset, self.work, self.to = opened, work, to
        self.manifest = opened.manifest
        self.inputs: list[dict[str, Any]] = []
        self._hash = self.manifest.hash
        self._progress = progress
        self._done = 0

    def tokens(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """Yield all tokens of a split in chunks; a chunk is valid until the next is asked for."""
        for file in self.dataset.files(split):
            yield from self._read(file, [file.tokens])

    def pieces(self, split: str) -> Iterator[tuple[_Piece, Iterator[NDArray[np.uint16]]]]:
        """Yield what becomes a shard each, with its tokens, which must be taken before the next."""
        has_shards = isinstance(self.manifest, Manifest) or self.manifest.format in ("npy", "llmc")
        for file in self.dataset.files(split):
            size = file.tokens if has_shards and file.tokens <= uint16.MAX_SHARD_TOKENS else SHARD_TOKENS
            starts = range(0, file.tokens, size)
            pieces = [_Piece(file, start, min(size, file.tokens - start)) for start in starts]
            chunks = self._read(file, [piece.tokens for piece in pieces])
            for piece in pieces:
                yield piece, _take(chunks, piece.tokens)
            assert next(chunks, None) is None  # and so the hash was compared

    def _read(self, file: TokenFile, cuts: list[int]) -> Iterator[NDArray[np.uint16]]:
        """Yield a file's tokens; no chunk crosses a cut. Raises ValueError at the end if its hash is wrong."""
        digest = hashlib.sha256()
        buffer = np.empty(_CHUNK, uint16.TOKEN)
        position = 0
        with file.path.open("rb") as source:
            digest.update(source.read(file.start))
            for remaining in cuts:
                while remaining:
                    chunk = buffer[: min(remaining, _CHUNK)]
                    if source.readinto(chunk.data.cast("B")) != chunk.nbytes:
                        raise ValueError(f"{file.path}: cut short while it was read, at token {position:,}")
                    digest.update(chunk.data)
                    if int(chunk.max()) >= (limit := self.manifest.vocab_size):
                        at = int(np.argmax(chunk >= limit))
                        raise ValueError(f"{file.path}: token {position + at:,} is {chunk[at]}, not below {limit}")
                    yield chunk
                    remaining, position = remaining - len(chunk), position + len(chunk)
                    self._done += len(chunk)
                    self._progress(self._done)
            digest.update(source.read(1024))  # what follows the tokens of an Arrow shard
            self._finish(file, digest.hexdigest(), source.tell())

    def _finish(self, file: TokenFile, sha256: str, size: int) -> None:
        if isinstance(self.manifest, Manifest):
            kind = str(self.manifest.options["format"])
            shard = self.shard_of(file)
            if sha256 != shard.sha256:
                raise ValueError(f"{file.path}: damaged: its SHA-256 is not the one in {FILE_NAME}")
            docs = shard.docs
            if docs is not None and disk.sha256(self.dataset.path / docs.file) != docs.sha256:
                raise ValueError(f"{self.dataset.path / docs.file}: damaged: its SHA-256 is another")
        else:
            kind = self.manifest.format
        self.inputs.append({"kind": kind, "name": file.path.name, "bytes": size, "sha256": sha256})

    def shard_of(self, file: TokenFile) -> Shard:
        """Return what dataset.json says of a file of a dataset of ours."""
        assert isinstance(self.manifest, Manifest)
        return next(shard for shard in self.manifest.shards if shard.file == file.path.name)

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
    written: list[Shard] = []
    form = "arrow" if job.to == "arrow" else "uint16"
    number = 0  # of the next document
    for split in ("val", "train"):
        for piece, chunks in job.pieces(split):
            path = job.work / shard_name(split, len(written), form)
            starts = _document_starts(job, piece)
            ids: NDArray[np.int64] | None = None
            if form == "arrow":
                continues = int(len(starts) == 0 or starts[0] > 0)  # the document before, or one without an EOT
                number = max(number, continues)
                ids = _ids(job, piece, np.arange(number - continues, number + len(starts)))
                number += len(starts)
            written.append(write_documents(path, job.work, split, piece.tokens, chunks, starts, ids))
    source: dict[str, Any]
    if isinstance(job.manifest, Manifest):
        source, options = job.manifest.source, job.manifest.options | {"format": form}
    else:
        source = {"inputs": job.inputs, "documents": sum(shard.documents for shard in written)}
        options = {"format": form, "order": "source", "seed": None}
    source = source | {"converted_from": {"format": job.inputs[0]["kind"], "dataset": job.manifest.hash}}
    with disk.write_whole(job.work / FILE_NAME) as file:
        file.write(Manifest(tokenizer.identity(), source, options, tuple(written)).to_bytes())


def _document_starts(job: _Job, piece: _Piece) -> NDArray[np.int64]:
    """Find where documents start in a piece: in ours, where an EOT is."""
    reader = uint16.TokenFiles([piece.file])
    starts = foreign.scanned_starts(
        lambda out, at: reader.read_into(out, 0, piece.start + at), piece.tokens, eot_behind=False
    )
    reader.close()
    if isinstance(job.manifest, Manifest) and len(starts) != job.shard_of(piece.file).documents:
        raise ValueError(
            f"{piece.file.path}: damaged: it has {len(starts):,} documents, dataset.json says otherwise"
        )
    return starts


def _ids(job: _Job, piece: _Piece, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids of an Arrow shard's rows, which are the documents `numbers` of the whole dataset.

    Those of Arrow shards of ours stay; else they follow from the order, or count from 0 where none is known.
    """
    if not isinstance(job.manifest, Manifest):
        return numbers
    opened = manifest.open_shard(job.dataset.path, job.shard_of(piece.file))
    if isinstance(opened, ArrowShard):
        return opened.ids()
    total = sum(job.manifest.documents(split) for split in SPLITS)
    return document_ids(numbers, total, job.manifest.options["seed"])


def _to_npy(job: _Job) -> None:
    number = itertools.count()
    for split in ("val", "train"):
        for piece, chunks in job.pieces(split):
            _write(job, f"{split}_{next(number):06d}.npy", foreign.npy_header(piece.tokens), chunks)


def _to_nanogpt(job: _Job) -> None:
    for split in SPLITS:
        if job.dataset.tokens(split):
            _write(job, f"{split}.bin", b"", job.tokens(split))


def _to_megatron(job: _Job) -> None:
    """Write one sequence a document, and one of what stands in front of a split's first document."""
    for split in SPLITS:
        total = job.dataset.tokens(split)
        if total == 0:
            continue
        _write(job, f"{split}_text_document.bin", b"", job.tokens(split))
        begins = job.work / ".begins"  # i64, in tokens: not in memory
        starts = job.dataset.document_starts(split)
        first = next(starts, total)
        starts = itertools.chain([0] if first else [], [first], starts, [total])
        before = 0
        with begins.open("wb") as file:
            while len(numbers := np.fromiter(itertools.islice(starts, _CHUNK), "<i8")):
                if (np.diff(numbers, prepend=before) > _MAX_SEQUENCE).any():
                    raise ValueError(f"{split}: a document of over {_MAX_SEQUENCE:,} tokens: Megatron has no such")
                before = int(numbers[-1])
                file.write(numbers.data)
        with disk.write_whole(job.work / f"{split}_text_document.idx") as file:
            foreign.write_idx(file, np.memmap(begins, "<i8", "r"))
        begins.unlink()


def _write(job: _Job, name: str, header: bytes, chunks: Iterable[NDArray[np.uint16]]) -> None:
    with disk.write_whole(job.work / name) as file:
        file.write(header)
        for chunk in chunks:
            file.write(chunk.data)
