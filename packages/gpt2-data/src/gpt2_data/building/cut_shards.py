"""Phase B of a build: tokenized units -> documents in order -> splits -> shards.

The documents in their order are one stream of tokens. Two work files say what is where in it, so that no process
holds that in memory: `positions` (where the k-th document begins in the stream; at the end the stream's length)
and `starts` (where that document begins in the units' tokens, laid end to end).
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_data import order
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.tokenize_units import Receipt, UnitTask
from gpt2_data.formats import arrow
from gpt2_data.formats.manifest import Shard, shard_name, write_documents
from gpt2_data.formats.uint16 import OFFSET, TokenFile, TokenFiles

DEFAULT_VAL_TOKENS = 100_000_000
_CHUNK_DOCUMENTS = 1_000_000
_CHUNK_TOKENS = 4_000_000


@dataclass(frozen=True)
class Layout:
    """The stream of all documents in order; its first `val_tokens` are for validation.

    Attributes:
        units: the units' tokens.
        seed: of the documents' order. None: the source's order.
    """

    units: tuple[TokenFile, ...]
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
    split: str
    file: str
    start: int
    stop: int


def lay_out(config: BuildConfig, tasks: Sequence[UnitTask], receipts: Sequence[Receipt]) -> Layout:
    """Put the documents of the tokenized units in order, and decide how many are for validation.

    Validation takes the first documents, as many whole ones as reach `val_tokens`. None: DEFAULT_VAL_TOKENS, or a
    tenth of all tokens if that is less, and nothing if that takes more than half. With `compat` it takes a shard
    to the token, and may share a document with training. Raises ValueError if nothing is left for training.
    """
    work = tasks[0].work
    source, positions, starts = work / "source.u64", work / "positions.u64", work / "starts.u64"
    with source.open("wb") as file:
        num_documents = _write_sums(file, (np.fromfile(task.file("u64"), OFFSET) for task in tasks))
    begins = _map(source)
    seed = config.seed if config.order == "shuffled" else None
    if seed is None:
        positions = starts = source
    else:
        with starts.open("wb") as file:
            for chosen in _permuted(num_documents, seed):
                file.write(begins[chosen].astype(OFFSET).data)
        with positions.open("wb") as file:
            chunks = (begins[chosen + 1] - begins[chosen] for chosen in _permuted(num_documents, seed))
            _write_sums(file, chunks)
    sums = _map(positions)
    total = int(sums[-1])
    wanted = config.val_tokens
    if config.compat is not None:
        wanted = val = config.shard_size
    else:
        least = min(DEFAULT_VAL_TOKENS, total // 10) if wanted is None else wanted
        val = int(sums[min(int(np.searchsorted(sums, least)), num_documents)])
        if wanted is None and val > total // 2:  # a first document that is most of the source, or all of it
            val = 0
    if val >= total:
        proposal = total // 20 if int(np.searchsorted(sums, total // 20)) < num_documents else 0
        raise ValueError(
            f"nothing is left for training: the source has {total:,} tokens in {num_documents:,} documents and "
            f"{wanted or 0:,} are wanted for validation: try --val-tokens {proposal} or more documents"
        )
    units = tuple(
        TokenFile(task.file("u16"), receipt.tokens, 0) for task, receipt in zip(tasks, receipts, strict=True)
    )
    return Layout(units, positions, starts, num_documents, total, val, seed)


def _write_sums(file: BinaryIO, chunks: Iterator[NDArray[np.uint64]]) -> int:
    """Write 0 and the running sums of the numbers in `chunks`; return how many numbers there were."""
    total = count = 0
    file.write(np.zeros(1, OFFSET).data)
    for chunk in chunks:
        if len(chunk):
            sums = total + np.cumsum(chunk, dtype=np.uint64)
            file.write(sums.astype(OFFSET).data)
            total, count = int(sums[-1]), count + len(chunk)
    return count


def _permuted(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, n, _CHUNK_DOCUMENTS):
        yield order.permute(np.arange(start, min(start + _CHUNK_DOCUMENTS, n)), n, seed)


def _map(path: Path) -> NDArray[np.uint64]:
    return np.memmap(path, OFFSET, "r")


def shard_tasks(layout: Layout, config: BuildConfig) -> list[ShardTask]:
    """Cut the shards: validation's first, numbered as one series. A document may continue in the next shard."""
    tasks: list[ShardTask] = []
    for split, first, last in ("val", 0, layout.val_tokens), ("train", layout.val_tokens, layout.num_tokens):
        for start in range(first, last, config.shard_size):
            file, stop = shard_name(split, len(tasks), config.format), min(start + config.shard_size, last)
            tasks.append(ShardTask(layout, config.out, split, file, start, stop))
    return tasks


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
    if task.file.endswith(arrow.ENDING):
        continues = int(begin == end or starts[0] > 0)  # the first row is the rest of the document before
        numbers = np.arange(begin - continues, end)
        ids = document_ids(numbers, layout.num_documents, layout.seed)
    work = layout.positions.parent
    return write_documents(task.folder / task.file, work, task.split, num_tokens, tokens, starts, ids)


def _tokens(task: ShardTask, sums: NDArray[np.uint64]) -> Iterator[NDArray[np.uint16]]:
    """Yield tokens [start, stop) of the stream in chunks; a chunk is valid until the next is asked for."""
    units = task.layout.units
    unit_starts = list(itertools.accumulate((unit.tokens for unit in units), initial=0))
    files = TokenFiles(units)
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
