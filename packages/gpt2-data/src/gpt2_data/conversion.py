"""Convert a dataset to another format. Each split keeps its tokens, and its shards if both formats have shards."""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import disk, vocabulary
from gpt2_data.building.cut_shards import document_ids
from gpt2_data.dataset import Dataset, load
from gpt2_data.formats import foreign, uint16
from gpt2_data.formats.foreign import ForeignShard
from gpt2_data.formats.manifest import FILE_NAME, SPLITS, Manifest, Shard, shard_name, write_documents
from gpt2_data.formats.uint16 import TokenFile

FORMATS = ("npy", "llmc", "nanogpt", "megatron", "arrow")
SHARD_TOKENS = 100_000_000  # in a shard, if the source has no shards (nanoGPT, Megatron)
_CHUNK = 1_000_000
_MOVED = ".moved"  # in the work folder: a file's tokens with the EOTs in front of the documents
_MAX_SEQUENCE = 2**31 - 1  # tokens: Megatron stores a length as an int32

Progress = Callable[[str, int, int], None]  # is called with ("writing", tokens done, tokens in all)


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

    The documents stay the same. In npy, llmc and arrow an EOT stands in front of each. If in `source` it follows
    them, as in nanoGPT's and Megatron's own files, it moves; if Megatron's documents have none, each gets one. A
    tokenizer of its own goes with it.

    If `source` has our own format, every file is compared with its hash in dataset.json. Memory: a few chunks of
    1M tokens, a document if its mark moves, and 20 bytes per document of a shard (of a whole split for Megatron,
    or if another project's documents are needed).

    Args:
        out: must not exist, or be empty. It appears whole or not at all: until it is whole, it is OUT.converting.
        to: one of FORMATS. llmc and arrow make a dataset of our own, with a dataset.json; the others make files
            that the programs of those projects read.
    """
    out = Path(os.path.expanduser(out))
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
    job = _Job(dataset, work, to, lambda done: progress("writing", done, total))
    # In Megatron's .idx a document takes 20 bytes: 0.1 a token if it has 200 tokens.
    with _work_folder(work, int(2.1 * total) * (1 + job.moves) + 1_000_000):
        if to in ("llmc", "arrow"):
            _to_ours(job, "arrow" if to == "arrow" else "uint16")
        elif to == "npy":
            _to_npy(job)
        else:
            _to_one_file(job, to)
        if dataset.tokenizer is not None:
            end = {"eos_token": dataset.decode([dataset.eot])}
            vocabulary.write(work, dataset.tokenizer.read_bytes(), end)
        if load(dataset.path).hash != before:
            raise ValueError(f"{dataset.path} was changed while it was read: run the same command again")
        files = list(work.glob("[!.]*"))
        size = sum(path.stat().st_size for path in files)
        work.rename(target)  # takes the place of an empty folder
        for name in ".lock", _MOVED:
            (target / name).unlink(missing_ok=True)
    disk.sync_folder(target.parent)
    return ConvertResult(out, to, job.written, len(files), size)


@contextlib.contextmanager
def _work_folder(work: Path, needed: int) -> Iterator[None]:
    """Lock an empty work folder while the block runs; remove it if the block fails."""
    if work.is_dir() and any(work.iterdir()) and not (work / ".lock").exists():
        raise ValueError(f"{work} was not made by gpt2-data: choose another OUT")
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("a") as file:
        disk.lock(file, f"another conversion is running in {work}: wait for it or choose another OUT")
        try:
            for path in work.iterdir():  # left by a conversion that was killed
                if path.name != ".lock":
                    path.unlink()
            disk.check_space(work, needed, "OUT")
            yield
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@dataclass(frozen=True)
class _Piece:
    """A piece of a file becomes a new shard. Its tokens can be read once; `eots` returns where its EOTs are."""

    number: int
    path: Path
    tokens: int
    eots: Callable[[], NDArray[np.int64]]
    chunks: Iterator[NDArray[np.uint16]]


class _Job:
    """A running conversion: it reads the source from end to end and hashes it on the way."""

    def __init__(self, dataset: Dataset, work: Path, to: str, progress: Callable[[int], None]) -> None:
        self.dataset, self.manifest, self.work = dataset, dataset.manifest, work
        self.inputs: list[dict[str, Any]] = []  # the files that were read, as dataset.json lists a source
        self.written = 0  # tokens
        self._progress = progress
        self._done = 0
        # nanoGPT's layout has an EOT behind or in front of all documents, Megatron's anything.
        self.moves = to not in ("megatron", self.kind) and self.kind in ("nanogpt", "megatron")

    @property
    def kind(self) -> str:
        """The source's format."""
        return (
            str(self.manifest.options["format"]) if isinstance(self.manifest, Manifest) else self.manifest.format
        )

    def pieces(self, split: str) -> Iterator[_Piece]:
        """Yield the pieces of a split in order; read the tokens of each before asking for the next."""
        has_shards = self.kind not in ("nanogpt", "megatron")
        shards = self.manifest.split(split)
        for number, file in enumerate(self.dataset.split(split).files):
            shard, moved = shards[number], None
            if self.moves and isinstance(shard, ForeignShard) and shard.lacks_marks:
                for _ in self._read(file, _CHUNK):  # checks and hashes it
                    pass
                file = moved = foreign.mark_in_front(shard, self.work / _MOVED)
            total = file.tokens
            size = total if has_shards and total <= uint16.MAX_SHARD_TOKENS else SHARD_TOKENS
            chunks = iter(()) if moved else self._read(file, size)
            for start in range(0, total, size):
                part = TokenFile(file.path, min(size, total - start), file.start + 2 * start)
                tokens = foreign.scan(part) if moved else itertools.islice(chunks, -(-part.tokens // _CHUNK))
                yield _Piece(number, file.path, part.tokens, partial(foreign.eots, part, self.dataset.eot), tokens)
            assert next(chunks, None) is None  # all was read, so the hash was compared
            self.written += total

    def _read(self, file: TokenFile, size: int) -> Iterator[NDArray[np.uint16]]:
        """Yield a file's tokens; no chunk crosses a multiple of `size`. Raises ValueError if its hash is wrong."""
        digest = hashlib.sha256()
        buffer = np.empty(_CHUNK, uint16.TOKEN)
        position, limit = 0, self.dataset.vocab_size
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
        self.inputs.append({"kind": self.kind, "name": file.path.name, "bytes": size, "sha256": sha256})
        if isinstance(self.manifest, Manifest):
            shard = next(shard for shard in self.manifest.shards if shard.file == file.path.name)
            for part in [shard] + ([shard.docs] if shard.docs else []):
                path = file.path.with_name(part.file)
                if part.sha256 != (sha256 if part is shard else disk.sha256(path)):
                    raise ValueError(f"{path}: damaged: its SHA-256 is not the one in {FILE_NAME}")


def _to_ours(job: _Job, form: str) -> None:
    ours = job.manifest if isinstance(job.manifest, Manifest) else None
    options: dict[str, Any] = ours.options if ours else {"order": "source", "seed": None}
    total = sum(ours.documents(split) for split in SPLITS) if ours else 0
    written: list[Shard] = []
    documents = 0
    for split in ("val", "train"):
        for piece in job.pieces(split):
            starts = piece.eots()
            if ours and len(starts) != ours.split(split)[piece.number].documents:
                raise ValueError(
                    f"{piece.path}: damaged: it has {len(starts):,} documents, {FILE_NAME} says otherwise"
                )
            ids = None
            if form == "arrow":
                continues = int(len(starts) == 0 or starts[0] > 0)  # the first row has no EOT of its own
                documents = max(documents, continues)
                rows = np.arange(documents - continues, documents + len(starts))
                ids = document_ids(rows, total, options["seed"])
                documents += len(starts)
            path = job.work / shard_name(split, len(written), form)
            written.append(write_documents(path, job.work, split, piece.tokens, piece.chunks, starts, ids))
    inputs = {"inputs": job.inputs, "documents": sum(shard.documents for shard in written)}
    origin = {"format": job.inputs[0]["kind"], "dataset": job.manifest.hash}
    source = (ours.source if ours else inputs) | {"converted_from": origin}
    with disk.write_whole(job.work / FILE_NAME) as file:
        file.write(Manifest(job.manifest.tokenizer, source, options | {"format": form}, tuple(written)).to_bytes())


def _to_npy(job: _Job) -> None:
    number = itertools.count()
    for split in ("val", "train"):
        for piece in job.pieces(split):
            with disk.write_whole(job.work / f"{split}_{next(number):06d}.npy") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (piece.tokens,)}
                np.lib.format.write_array_header_1_0(file, header)
                file.writelines(chunk.data for chunk in piece.chunks)


def _to_one_file(job: _Job, to: str) -> None:
    """Write one file per split; for Megatron, one sequence per document, and one of what precedes the first."""
    for split in SPLITS:
        if not (total := job.dataset.tokens(split)):
            continue
        path = job.work / (f"{split}.bin" if to == "nanogpt" else f"{split}_text_document.bin")
        with disk.write_whole(path) as file:
            for piece in job.pieces(split):
                file.writelines(chunk.data for chunk in piece.chunks)
        if to == "megatron":
            starts = np.fromiter(itertools.chain(job.dataset.document_starts(split), [total]), np.int64)
            if starts[0]:
                starts = np.append(0, starts)
            if np.diff(starts).max() > _MAX_SEQUENCE:
                raise ValueError(f"{split}: a document of over {_MAX_SEQUENCE:,} tokens is too long for Megatron")
            with disk.write_whole(path.with_suffix(".idx")) as file:
                foreign.write_idx(file, starts)
