"""Phase B of a build: tokenized units -> documents in order -> splits -> shards.

The documents in their order are one stream of tokens. Two work files say what is where in it, so that no process
holds that in memory: `positions` (where the k-th document begins in the stream; at the end the stream's length)
and `starts` (where that document begins in the units' tokens, laid end to end).
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data import order
from gpt2_data.disk import write_whole
from gpt2_data.formats import arrow, uint16
from gpt2_data.formats.manifest import Shard, Sidecar

DEFAULT_VAL_TOKENS = 100_000_000
_CHUNK_DOCUMENTS = 1_000_000
_CHUNK_TOKENS = 4_000_000


@dataclass(frozen=True)
class UnitFiles:
    """A tokenized unit: raw uint16 tokens, and the u64 length of each document, EOTs counted in both."""

    tokens: Path
    lengths: Path
    num_tokens: int
    num_documents: int


@dataclass(frozen=True)
class Layout:
    """The stream of all documents in order; its first `val_tokens` are for validation.

    Attributes:
        seed: of the documents' order. None: the source's order.
    """

    units: tuple[UnitFiles, ...]
    positions: Path
    starts: Path
    num_documents: int
    num_tokens: int
    val_tokens: int
    seed: int | None


@dataclass(frozen=True)
class ShardTask:
    """Write tokens [start, stop) of the stream to `folder / file`."""

    layout: Layout
    folder: Path
    temporary_folder: Path
    split: str
    file: str
    start: int
    stop: int
    format: str = "uint16"


def lay_out(
    units: Sequence[UnitFiles], work: Path, seed: int | None, val_tokens: int | None, exact: int | None = None
) -> Layout:
    """Put the documents in order.

    Args:
        seed: of the order. None: the source's order.
        val_tokens: validation takes the first documents, as many whole ones as reach this many tokens. None:
            DEFAULT_VAL_TOKENS, or a tenth of all tokens if that is less, and nothing if that takes more than half.
        exact: validation takes this many tokens, and may share a document with training.

    Raises:
        ValueError: nothing is left for training.
    """
    source, positions, starts = work / "source.u64", work / "positions.u64", work / "starts.u64"
    with source.open("wb") as file:
        num_documents = _write_sums(file, (np.fromfile(unit.lengths, uint16.OFFSET) for unit in units))
    begins = _map(source)
    if seed is None:
        positions = starts = source
    else:
        with starts.open("wb") as file:
            for chosen in _permuted(num_documents, seed):
                file.write(begins[chosen].astype(uint16.OFFSET).data)
        with positions.open("wb") as file:
            chunks = (begins[chosen + 1] - begins[chosen] for chosen in _permuted(num_documents, seed))
            _write_sums(file, chunks)
    sums = _map(positions)
    total = int(sums[-1])
    if exact is not None:
        val = exact
    else:
        wanted = min(DEFAULT_VAL_TOKENS, total // 10) if val_tokens is None else val_tokens
        val = int(sums[min(int(np.searchsorted(sums, wanted)), num_documents)])
        if val_tokens is None and val > total // 2:  # a first document that is most of the source, or all of it
            val = 0
    if val >= total:
        raise ValueError(_nothing_left(sums, exact or val_tokens or 0))
    return Layout(tuple(units), positions, starts, num_documents, total, val, seed)


def _write_sums(file: BinaryIO, chunks: Iterator[NDArray[np.uint64]]) -> int:
    """Write 0 and the running sums of the numbers in `chunks`; return how many numbers there were."""
    total = count = 0
    file.write(np.zeros(1, uint16.OFFSET).data)
    for chunk in chunks:
        if len(chunk):
            sums = total + np.cumsum(chunk, dtype=np.uint64)
            file.write(sums.astype(uint16.OFFSET).data)
            total, count = int(sums[-1]), count + len(chunk)
    return count


def _permuted(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, n, _CHUNK_DOCUMENTS):
        yield order.permute(np.arange(start, min(start + _CHUNK_DOCUMENTS, n)), n, seed)


def _map(path: Path) -> NDArray[np.uint64]:
    return np.memmap(path, uint16.OFFSET, "r")


def _nothing_left(sums: NDArray[np.uint64], val_tokens: int) -> str:
    documents, tokens = len(sums) - 1, int(sums[-1])
    proposal = tokens // 20
    if proposal > 0:
        proposal = round(proposal, 2 - len(str(proposal)))  # two digits are enough to type
    if documents > 1 and int(np.searchsorted(sums, proposal)) >= documents:
        proposal = 0
    start = f"nothing is left for training: the source has {tokens:,} tokens in {documents:,} documents and "
    start += f"{val_tokens:,} are wanted for validation: "
    if documents == 1:
        return start + (
            "a document is not split, so write the text as several documents (files, or lines of JSON), or cut it "
            f"anywhere with --compat build-nanogpt --shard-size {max(proposal, 1)}, or do without: --val-tokens 0"
        )
    return start + f"try --val-tokens {proposal}"


def shard_tasks(
    layout: Layout, shard_size: int, folder: Path, temporary_folder: Path, format: str = "uint16"
) -> list[ShardTask]:
    """Cut the shards: validation's first, numbered as one series. A document may continue in the next shard."""
    ends = {"val": (0, layout.val_tokens), "train": (layout.val_tokens, layout.num_tokens)}
    ranges = [
        (split, start, min(start + shard_size, last))
        for split, (first, last) in ends.items()
        for start in range(first, last, shard_size)
    ]
    return [
        ShardTask(layout, folder, temporary_folder, split, shard_name(split, i, format), start, stop, format)
        for i, (split, start, stop) in enumerate(ranges)
    ]


def shard_name(split: str, number: int, format: str) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:06d}{arrow.ENDING if format == 'arrow' else '.bin'}"


def document_ids(numbers: NDArray[np.int64], num_documents: int, seed: int | None) -> NDArray[np.int64]:
    """Return the numbers in the source's order of the documents `numbers` of the stream."""
    return numbers if seed is None else order.permute(numbers, num_documents, seed)


def write_shard(task: ShardTask) -> Shard:
    """Write one shard: uint16 with its sidecar, or Arrow. Memory: a chunk of tokens and 20 bytes a document."""
    layout, num_tokens = task.layout, task.stop - task.start
    sums = _map(layout.positions)
    begin, end = (int(i) for i in np.searchsorted(sums[:-1], [task.start, task.stop]))  # documents that start here
    starts = sums[begin:end].astype(np.int64) - task.start
    tokens = _tokens(task, sums)
    ids = None
    if task.format == "arrow":
        continues = int(begin == end or starts[0] > 0)  # the first row is the rest of the document before
        numbers = np.arange(begin - continues, end)
        ids = document_ids(numbers, layout.num_documents, layout.seed)
    path = task.folder / task.file
    return write_documents(path, task.temporary_folder, task.split, num_tokens, tokens, starts, ids)


def write_documents(
    path: Path,
    temporary_folder: Path,
    split: str,
    num_tokens: int,
    chunks: Iterable[NDArray[np.uint16]],
    starts: NDArray[np.integer],
    ids: NDArray[np.int64] | None,
) -> Shard:
    """Write a shard: Arrow if there are `ids`, else uint16 and its sidecar.

    Args:
        starts: where documents start in it, in tokens.
        ids: of the rows, one more than `starts` if the first row continues the document before.
    """
    sidecar = None
    if ids is None:
        with write_whole(path.with_suffix(".docs"), temporary_folder) as file:
            docs = uint16.write_docs(file, starts)
        sidecar = Sidecar(path.with_suffix(".docs").name, docs.bytes, docs.sha256)
    with write_whole(path, temporary_folder) as file:
        if ids is None:
            written = uint16.write_shard(file, num_tokens, chunks)
        else:
            rows = np.concatenate([np.zeros(len(ids) - len(starts), np.int64), starts])
            written = arrow.write_shard(file, num_tokens, chunks, rows, ids)
    return Shard(
        split=split,
        file=path.name,
        tokens=num_tokens,
        documents=len(starts),
        bytes=written.bytes,
        max_token=written.maximum,
        tokens_sha256=written.payload_sha256,
        sha256=written.sha256,
        docs=sidecar,
    )


def _tokens(task: ShardTask, sums: NDArray[np.uint64]) -> Iterator[NDArray[np.uint16]]:
    """Yield tokens [start, stop) of the stream in chunks; a chunk is valid until the next is asked for."""
    units = task.layout.units
    unit_starts = list(itertools.accumulate((unit.num_tokens for unit in units), initial=0))
    files = uint16.TokenFiles([uint16.TokenFile(unit.tokens, unit.num_tokens, 0) for unit in units])
    buffer = np.empty(min(_CHUNK_TOKENS, task.stop - task.start), np.uint16)
    filled = 0
    for start, length in _runs(task, sums):
        while length:
            unit = bisect.bisect_right(unit_starts, start) - 1
            count = min(length, unit_starts[unit + 1] - start, len(buffer) - filled)
            files.read_into(buffer[filled : filled + count], unit, start - unit_starts[unit])
            start, length, filled = start + count, length - count, filled + count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
    files.close()


def _runs(task: ShardTask, sums: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield (start, length) in the units' tokens of the shard's pieces; pieces that adjoin are one."""
    first = int(np.searchsorted(sums, task.start, side="right")) - 1  # may have started before the shard
    last = int(np.searchsorted(sums[:-1], task.stop))
    bounds = np.clip(sums[first : last + 1].astype(np.int64), task.start, task.stop)
    lengths = np.diff(bounds)
    starts = _map(task.layout.starts)[first:last].astype(np.int64)
    starts[0] += task.start - int(sums[first])
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
    run_lengths = np.add.reduceat(lengths, np.concatenate([[0], breaks]))
    yield from zip(starts[np.concatenate([[0], breaks])].tolist(), run_lengths.tolist(), strict=True)
