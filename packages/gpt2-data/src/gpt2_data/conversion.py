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

from gpt2_data import disk, tokenizer
from gpt2_data.building.cut_shards import document_ids
from gpt2_data.dataset import Dataset, load
from gpt2_data.formats import arrow, foreign, uint16
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


def convert(
    source: str | Path, out: str | Path, to: str, progress: Progress = lambda what, done, total: None
) -> ConvertResult:
    """Write the dataset `source` to the folder `out` in another format.

    Every byte of a dataset of ours is compared with its dataset.json on the way. Memory: a few chunks of 1M
    tokens, and 20 bytes a document of a shard (for Megatron, or if another project's documents are needed, of a
    whole split).

    Args:
        out: must not exist or be empty. It appears whole or not at all: until then it is OUT.converting.
        to: one of FORMATS. llmc and arrow are datasets of ours, with a dataset.json; the others are as their
            makers' programs read them.

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}: choose one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another folder")
    dataset = Dataset(source)
    before = dataset.manifest.hash
    total = sum(dataset.tokens(split) for split in SPLITS)
    if total == 0:
        raise ValueError(f"{source} holds no tokens")
    target = out.resolve()  # not a link, which cannot be renamed over
    work = target.with_name(target.name + ".converting")
    documents = total // 50  # a guess: another project's are not counted before they are read
    if isinstance(dataset.manifest, Manifest):
        documents = sum(dataset.manifest.documents(split) for split in SPLITS)
    with _work_folder(work, 2 * total + 20 * documents + 1_000_000):  # 20: in Megatron's .idx
        job = _Job(dataset, work, lambda done: progress("writing", done, total))
        if to == "npy":
            _to_npy(job)
        elif to in ("llmc", "arrow"):
            _to_ours(job, to)
        else:
            _to_one_file(job, to)
        if load(dataset.path).hash != before:
            raise ValueError(f"{dataset.path} was changed while it was read: run the same command again")
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
            disk.check_space(work, needed, "OUT")
            yield
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


class _Job:
    """A conversion at work: it reads the source from end to end and hashes it on the way.

    Attributes:
        inputs: the files that were read, as dataset.json lists a source.
    """

    def __init__(self, dataset: Dataset, work: Path, progress: Callable[[int], None]) -> None:
        self.dataset, self.manifest, self.work = dataset, dataset.manifest, work
        self.inputs: list[dict[str, Any]] = []
        self._progress = progress
        self._done = 0

    def tokens(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """Yield all tokens of a split in chunks; a chunk is valid until the next is asked for."""
        for _, _, chunks in self.pieces(split):
            yield from chunks

    def pieces(self, split: str) -> Iterator[tuple[int, TokenFile, Iterator[NDArray[np.uint16]]]]:
        """Yield what becomes a shard each: its file's number, where it is, and its tokens, to be taken at once."""
        has_shards = isinstance(self.manifest, Manifest) or self.manifest.format in ("npy", "llmc")
        for number, file in enumerate(self.dataset.files(split)):
            size = file.tokens if has_shards and file.tokens <= uint16.MAX_SHARD_TOKENS else SHARD_TOKENS
            chunks = self._read(file, size)
            for start in range(0, file.tokens, size):
                piece = TokenFile(file.path, min(size, file.tokens - start), file.start + 2 * start)
                yield number, piece, _take(chunks, piece.tokens)
            assert next(chunks, None) is None  # and so the hash was compared

    def _read(self, file: TokenFile, size: int) -> Iterator[NDArray[np.uint16]]:
        """Yield a file's tokens; no chunk crosses a multiple of `size`. Raises ValueError if its hash is wrong."""
        digest = hashlib.sha256()
        buffer = np.empty(_CHUNK, uint16.TOKEN)
        position, limit = 0, self.manifest.vocab_size
        with file.path.open("rb") as source:
            digest.update(source.read(file.start))
            while position < file.tokens:
                chunk = buffer[: min(file.tokens - position, size - position % size)]
                if source.readinto(chunk.data.cast("B")) != chunk.nbytes:
                    raise ValueError(f"{file.path}: cut short while it was read, at token {position:,}")
                digest.update(chunk.data)
                if int(chunk.max()) >= limit:
                    at = int(np.argmax(chunk >= limit))
                    raise ValueError(f"{file.path}: token {position + at:,} is {chunk[at]}, not below {limit}")
                yield chunk
                position += len(chunk)
                self._done += len(chunk)
                self._progress(self._done)
            digest.update(source.read(1024))  # what follows the tokens of an Arrow shard
            size, sha256 = source.tell(), digest.hexdigest()
        kind = self.manifest.options["format"] if isinstance(self.manifest, Manifest) else self.manifest.format
        self.inputs.append({"kind": kind, "name": file.path.name, "bytes": size, "sha256": sha256})
        if isinstance(self.manifest, Manifest):
            shard = next(shard for shard in self.manifest.shards if shard.file == file.path.name)
            for part in [shard] + ([shard.docs] if shard.docs else []):
                path = file.path.with_name(part.file)
                if part.sha256 != (sha256 if part is shard else disk.sha256(path)):
                    raise ValueError(f"{path}: damaged: its SHA-256 is not the one in {FILE_NAME}")


def _take(chunks: Iterator[NDArray[np.uint16]], count: int) -> Iterator[NDArray[np.uint16]]:
    while count:
        chunk = next(chunks)
        yield chunk
        count -= len(chunk)


# --- the formats


def _to_ours(job: _Job, to: str) -> None:
    written: list[Shard] = []
    form = "arrow" if to == "arrow" else "uint16"
    documents = 0
    for split in ("val", "train"):
        for number, piece, chunks in job.pieces(split):
            starts = foreign.eots(piece)
            if isinstance(job.manifest, Manifest) and len(starts) != job.manifest.split(split)[number].documents:
                raise ValueError(
                    f"{piece.path}: damaged: it has {len(starts):,} documents, {FILE_NAME} says otherwise"
                )
            ids = None
            if form == "arrow":
                continues = int(len(starts) == 0 or starts[0] > 0)  # the document before, or one without an EOT
                documents = max(documents, continues)
                ids = _ids(job, split, number, np.arange(documents - continues, documents + len(starts)))
                documents += len(starts)
            path = job.work / shard_name(split, len(written), form)
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


def _ids(job: _Job, split: str, number: int, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids of an Arrow shard's rows, which are these `documents` of the whole dataset.

    Those of Arrow shards of ours stay; else they follow from the order, or count from 0 where none is known.
    """
    if not isinstance(job.manifest, Manifest):
        return documents
    shard = job.manifest.split(split)[number]
    if shard.docs is None:
        return arrow.check_shard(job.dataset.path / shard.file, shard.tokens, shard.documents).ids.read()
    total = sum(job.manifest.documents(split) for split in SPLITS)
    return document_ids(documents, total, job.manifest.options["seed"])


def _to_npy(job: _Job) -> None:
    number = itertools.count()
    for split in ("val", "train"):
        for _, piece, chunks in job.pieces(split):
            _write(job.work / f"{split}_{next(number):06d}.npy", foreign.npy_header(piece.tokens), chunks)


def _to_one_file(job: _Job, to: str) -> None:
    """Write a file a split; for Megatron one sequence a document, and one of what stands before the first."""
    for split in SPLITS:
        total = job.dataset.tokens(split)
        if total == 0:
            continue
        if to == "nanogpt":
            _write(job.work / f"{split}.bin", b"", job.tokens(split))
            continue
        _write(job.work / f"{split}_text_document.bin", b"", job.tokens(split))
        starts = np.fromiter(itertools.chain(job.dataset.document_starts(split), [total]), np.int64)
        if starts[0]:
            starts = np.append(0, starts)
        if np.diff(starts).max() > _MAX_SEQUENCE:
            raise ValueError(f"{split}: a document of over {_MAX_SEQUENCE:,} tokens: Megatron has no such")
        with disk.write_whole(job.work / f"{split}_text_document.idx") as file:
            foreign.write_idx(file, starts)


def _write(path: Path, header: bytes, chunks: Iterable[NDArray[np.uint16]]) -> None:
    with disk.write_whole(path) as file:
        file.write(header)
        for chunk in chunks:
            file.write(chunk.data)
