"""Phase B of a build: tokenized units -> documents in order -> splits -> shards.

The documents in their order are one stream of tokens. Two work files are mapped: `positions` (where the k-th
document begins in the stream; at the end the stream's length) and `starts` (where it begins in the units' tokens).
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import order
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.tokenize_units import Receipt, UnitTask
from gpt2_data.console import plural
from gpt2_data.formats import arrow
from gpt2_data.formats.manifest import Shard, shard_name, write_documents
from gpt2_data.formats.uint16 import OFFSET, TokenFile, TokenFiles
from gpt2_data.sources.catalog import Unit

DEFAULT_VAL_TOKENS = 100_000_000
_CHUNK_DOCUMENTS = 1_000_000
_CHUNK_TOKENS = 4_000_000


@dataclass(frozen=True)
class Layout:
    """The stream of all documents in order; its first `val_tokens` are for validation."""

    work: Path  # the folder of the work files
    units: tuple[TokenFile, ...]
    positions: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    num_documents: int
    num_tokens: int
    val_tokens: int
    seed: int | None  # of the documents' order; None for the source's


@dataclass(frozen=True)
class Cut:
    """Tokens [start, stop) of the stream, which become the shard `path`."""

    split: str
    path: Path
    start: int
    stop: int


def lay_out(config: BuildConfig, tasks: Sequence[UnitTask], receipts: Sequence[Receipt]) -> Layout:
    """Put the documents of the tokenized units in order, and decide how many are for validation.

    With `compat`, validation and training may share a document. Raises ValueError if nothing is left for training.
    """
    work = tasks[0].work
    lengths = (np.fromfile(task.file("u64"), OFFSET) for task in tasks)
    starts = positions = _write(work / "source.u64", _sums(lengths))
    n = len(starts) - 1
    seed = config.seed if config.order == "shuffled" else None
    if seed is not None:
        source = starts
        starts = _write(work / "starts.u64", (source[chosen] for chosen in _permuted(n, seed)))
        lengths = (source[chosen + 1] - source[chosen] for chosen in _permuted(n, seed))
        positions = _write(work / "positions.u64", _sums(lengths))
    total = int(positions[-1])
    wanted = config.val_tokens
    if config.compat is not None:
        wanted = val = config.shard_size
    else:
        val = whole_documents(positions, wanted)
    if val >= total:
        proposal = total // 20 if int(np.searchsorted(positions, total // 20)) < n else 0
        raise ValueError(
            f"nothing is left for training: the source has {total:,} tokens in {plural(n, 'document')} and "
            f"{wanted or 0:,} are wanted for validation: try --val-tokens {proposal} or more documents"
            + advise_split([task.unit for task in tasks])
        )
    units = [TokenFile(task.file("u16"), receipt.tokens, 0) for task, receipt in zip(tasks, receipts, strict=True)]
    return Layout(work, tuple(units), positions, starts, n, total, val, seed)


def advise_split(units: Sequence[Unit]) -> str:
    """Return the end of a message which says that more documents are needed: text files can be split."""
    whole = any(unit.kind == "txt" and unit.split_on is None for unit in units)
    return r", or add --split-on '\n\n', which makes documents of a text file's paragraphs" if whole else ""


def whole_documents(positions: NDArray[Any], val_tokens: int | None) -> int:
    """Return how many tokens are for validation; documents begin at `positions`, whose last is the end of all."""
    total = int(positions[-1])
    least = min(DEFAULT_VAL_TOKENS, total // 10) if val_tokens is None else val_tokens
    val = int(positions[min(int(np.searchsorted(positions, least)), len(positions) - 1)])
    # A first document may be most of the source, or all of it.
    return 0 if val_tokens is None and val > total // 2 else val


def _write(path: Path, chunks: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Write numbers to a file, and map it."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk.astype(OFFSET).data)
    return np.memmap(path, OFFSET, "r")


def _sums(chunks: Iterable[NDArray[np.uint64]]) -> Iterator[NDArray[np.uint64]]:
    """Yield 0 and the running sums of the numbers in `chunks`."""
    total = np.zeros(1, np.uint64)
    yield total
    for chunk in chunks:
        if len(chunk):
            sums = total + np.cumsum(chunk, dtype=np.uint64)
            yield sums
            total = sums[-1:]


def _permuted(n: int, seed: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, n, _CHUNK_DOCUMENTS):
        yield order.permute(np.arange(start, min(start + _CHUNK_DOCUMENTS, n)), n, seed)


def cut_stream(layout: Layout, config: BuildConfig) -> list[Cut]:
    """Plan all shards: validation first, numbered as one series. A document may continue in the next shard."""
    cuts: list[Cut] = []
    for split, first, last in ("val", 0, layout.val_tokens), ("train", layout.val_tokens, layout.num_tokens):
        for start in range(first, last, config.shard_size):
            path = config.out / shard_name(split, len(cuts), config.format)
            cuts.append(Cut(split, path, start, min(start + config.shard_size, last)))
    return cuts


def document_ids(numbers: NDArray[np.int64], num_documents: int, seed: int | None) -> NDArray[np.int64]:
    """Return the numbers that documents have in the source; `numbers` are those in the stream."""
    return numbers if seed is None else order.permute(numbers, num_documents, seed)


def write_shard(layout: Layout, cut: Cut) -> Shard:
    """Write one shard: uint16 with its sidecar, or Arrow. Memory: a chunk of tokens and 20 bytes per document."""
    sums = layout.positions
    begin, end = (int(i) for i in np.searchsorted(sums[:-1], [cut.start, cut.stop]))  # documents that start here
    starts = sums[begin:end].astype(np.int64) - cut.start
    ids = None
    if cut.path.suffix == arrow.ENDING:
        continues = int(begin == end or starts[0] > 0)  # the first row is the rest of the document before
        ids = document_ids(np.arange(begin - continues, end), layout.num_documents, layout.seed)
    tokens = _tokens(layout, cut)
    return write_documents(cut.path, layout.work, cut.split, cut.stop - cut.start, tokens, starts, ids)


def _tokens(layout: Layout, cut: Cut) -> Iterator[NDArray[np.uint16]]:
    """Yield the shard's tokens in chunks; a chunk is valid until the next is asked for."""
    unit_starts = list(itertools.accumulate((unit.tokens for unit in layout.units), initial=0))
    files = TokenFiles(layout.units)
    buffer = np.empty(min(_CHUNK_TOKENS, cut.stop - cut.start), np.uint16)
    filled = 0
    for start, length in _runs(layout, cut):
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


def _runs(layout: Layout, cut: Cut) -> Iterator[tuple[int, int]]:
    """Yield (start, length), in the units' tokens, of the shard's pieces; adjoining pieces are joined."""
    sums = layout.positions
    first = int(np.searchsorted(sums, cut.start, side="right")) - 1  # it may start before the shard
    last = int(np.searchsorted(sums[:-1], cut.stop))
    lengths = np.diff(np.clip(sums[first : last + 1].astype(np.int64), cut.start, cut.stop))
    starts = layout.starts[first:last].astype(np.int64)
    starts[0] += cut.start - int(sums[first])
    runs = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
    yield from zip(starts[runs].tolist(), np.add.reduceat(lengths, runs).tolist(), strict=True)
