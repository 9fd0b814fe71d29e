"""Batches of a dataset, or of a mix of several datasets, for one rank.

A split is one stream of tokens. Sample k is tokens [k*T, k*T + T + 1) of it: inputs, and the same shifted by one;
the last begins earlier, so that it ends where the split does. order.py says which sample comes when.
"""

import copy
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gpt2_data.dataset import Dataset
from gpt2_data.order import apportion, build_nanogpt_starts, integer_weights, mix, permute

STATE_VERSION = 2  # 1 left out the tail of a split
Order = Literal["shuffled", "sequential", "build-nanogpt"]
Datasets = str | Path | Mapping[str, float] | Mapping[Path, float]
Pair = tuple[NDArray[np.int64], NDArray[np.int64]]
Allocate = Callable[[tuple[int, ...], np.dtype[np.int64]], NDArray[np.int64]]
# Global samples whose places are computed at once: computing only 64 would take longer than reading them.
_PLANNED = 16384


class TokenLoader(Iterator[Pair]):
    """Iterate endlessly over batches (x, y), int64 arrays of shape (batch_size, seq_len), y one token ahead.

    Args:
        path: a dataset's folder; or several with their weights, {folder: weight}, to be mixed sample by sample.
            Each dataset's samples come in the order they would have alone, in its own epochs.
        batch_size: samples in a step of this rank. Step j of rank r takes the global samples from j*B*W + r*B
            on: the ranks together take what one rank with the whole batch would. A batch may span two epochs.
        order: "shuffled", anew in each epoch; "sequential"; or "build-nanogpt", the order in which each
            rank of its DataLoaderLite reads, which skips the ends of shards. Only this order depends on
            batch_size and world_size.

    Attributes:
        samples_consumed: samples that all ranks together have taken.
        num_windows: samples in an epoch of each dataset, except in the order "build-nanogpt".

    Raises:
        ValueError, OSError: a split (or, for "build-nanogpt", a shard) is too short; shards are damaged or
            missing; the datasets cannot be mixed.
    """

    def __init__(
        self,
        path: Datasets,
        split: str = "train",
        batch_size: int = 32,
        seq_len: int = 1024,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: Order = "shuffled",
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size {batch_size} and seq_len {seq_len} must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}: must be 0 to world_size - 1")
        if order not in get_args(Order):
            raise ValueError(f"order {order!r}: must be one of {', '.join(get_args(Order))}")
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.seed, self.rank, self.world_size, self.order = seed, rank, world_size, order
        self.samples_consumed = 0
        self.datasets, self.weights = _open(path)
        if order == "build-nanogpt" and len(self.datasets) > 1:
            raise ValueError("the order build-nanogpt reads one dataset, not a mix")
        for dataset in self.datasets:
            self._check(dataset)
        # Rounded up: the tokens after whole windows are in a last one, which overlaps with the one before.
        self.num_windows = [-((1 - dataset.tokens(split)) // seq_len) for dataset in self.datasets]
        self._tokens = np.empty((batch_size, seq_len + 1), np.uint16)
        self._planned_from = 0
        self._planned = (np.empty((0, batch_size), np.int64),) * 2

    def _check(self, dataset: Dataset) -> None:
        tokens, needed = dataset.tokens(self.split), self.seq_len + 1
        if tokens < needed:
            raise ValueError(
                f"{dataset.path}: split {self.split!r} has {tokens:,} tokens, "
                f"a sample of seq_len {self.seq_len} needs {needed:,}"
            )
        if self.order == "build-nanogpt":
            needed = self.batch_size * self.seq_len * self.world_size + 1
            file = min(dataset.split(self.split).files, key=lambda file: file.tokens)
            if file.tokens < needed:
                raise ValueError(
                    f"{file.path} has {file.tokens:,} tokens, and the order build-nanogpt "
                    f"needs {needed:,} in each shard, a batch for every rank: lower batch_size or seq_len"
                )
        dataset.read(self.split, 0, 1)  # opens the split, so that a missing shard is noticed now

    def __next__(self) -> Pair:
        shape = self.batch_size, self.seq_len
        x, y = np.empty(shape, np.int64), np.empty(shape, np.int64)
        self.next_into(x, y)
        return x, y

    def next_into(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> None:
        """Load the next step's batch into the caller's arrays, of the shape and type that iteration yields."""
        if not x.shape == y.shape == (self.batch_size, self.seq_len):
            raise ValueError(
                f"the arrays have shapes {x.shape} and {y.shape}, not ({self.batch_size}, {self.seq_len})"
            )
        sources, starts = self._next_windows()
        tokens = self._tokens
        if len(self.datasets) == 1:
            self.datasets[0].split(self.split).read_windows(tokens, starts)
        else:
            for source in np.unique(sources).tolist():
                rows = np.flatnonzero(sources == source)
                part = np.empty((len(rows), self.seq_len + 1), np.uint16)
                self.datasets[source].split(self.split).read_windows(part, starts[rows])
                tokens[rows] = part
        np.copyto(x, tokens[:, :-1])
        np.copyto(y, tokens[:, 1:])
        self.samples_consumed += self.batch_size * self.world_size

    def prefetch(self, depth: int = 2, allocate: Allocate | None = None) -> "Prefetch":
        """Return an iterator over the same batches: a thread loads `depth` of them ahead while the caller works.

        The arrays belong to a ring of 2 * depth pairs: a pair is valid until the `depth`-th call of `next` after
        the one that yielded it; that call may overwrite it. `state` of this loader and of the result counts
        only batches that were yielded. Until `close` (or the end of a `with`) this loader must not be used
        directly. If the thread fails to load a batch, `next` raises its error in place of that batch.

        Args:
            allocate: makes each array from a shape and a dtype, such as page-locked ones for a GPU.
        """
        return Prefetch(self, depth, allocate)

    def _next_windows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset and the first token of each row of the next batch."""
        step = self.batch_size * self.world_size
        row, rest = divmod(self.samples_consumed - self._planned_from, step)
        if rest or not 0 <= row < len(self._planned[0]):
            # No more than an epoch, as each epoch takes a call of its own.
            steps = np.arange(max(min(_PLANNED, sum(self.num_windows)) // step, 1))[:, None] * step
            first = self.samples_consumed + self.rank * self.batch_size
            self._planned = self.windows(first + steps + np.arange(self.batch_size))
            self._planned_from, row = self.samples_consumed, 0
        sources, starts = self._planned
        return sources[row], starts[row]

    def windows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset (an index into `datasets`) and first token of each of the global samples `numbers`.

        Numbers are counted through all epochs; in the order "build-nanogpt" they are those of this rank's samples.
        """
        if self.order == "build-nanogpt":
            batches, rows = np.divmod(numbers, self.batch_size)
            shards = [file.tokens for file in self.datasets[0].split(self.split).files]
            starts = build_nanogpt_starts(
                batches // self.world_size, shards, self.batch_size, self.seq_len, self.rank, self.world_size
            )
            return np.zeros_like(numbers), starts + rows * self.seq_len
        if len(self.datasets) == 1:
            return np.zeros_like(numbers), self._starts(0, numbers)
        sources, within = apportion(numbers, self.weights, self.seed)
        for source in range(len(self.datasets)):
            here = sources == source
            within[here] = self._starts(source, within[here])
        return sources, within

    def _starts(self, source: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        n = self.num_windows[source]
        epochs, within = np.divmod(numbers, n)
        if self.order == "shuffled":
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                within[here] = permute(within[here], n, mix(self.seed, epoch))
        last = self.datasets[source].tokens(self.split) - self.seq_len - 1
        starts: NDArray[np.int64] = np.minimum(within * self.seq_len, last)
        return starts

    def state(self) -> dict[str, Any]:
        """Return the position in the stream of batches, to be stored as JSON; it is the same on every rank."""
        hashes = [dataset.manifest.hash for dataset in self.datasets]
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "dataset": hashes if len(hashes) > 1 else hashes[0],
            "split": self.split,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "order": self.order,
            "samples": self.samples_consumed,
        }
        if len(hashes) > 1:
            state["weights"] = self.weights
        if self.order == "build-nanogpt":
            state |= {"batch_size": self.batch_size, "world_size": self.world_size}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a `state`, in O(1), even with another number of ranks or another batch_size.

        Raises ValueError, which names the field, if the state is that of another stream of batches.
        """
        for field, here in (self.state() | {"samples": state.get("samples")}).items():
            if state.get(field) != here:
                why = ", which the order build-nanogpt depends on" if field in ("batch_size", "world_size") else ""
                raise ValueError(f"the loader's state has {field} {state.get(field)!r}, this loader {here!r}{why}")
        samples = state["samples"]
        step = self.batch_size * self.world_size if self.order == "build-nanogpt" else 1
        if not isinstance(samples, int) or not 0 <= samples < 2**62 or samples % step:
            raise ValueError(f"the loader's state has an impossible number of samples: {samples!r}")
        self.samples_consumed = samples


def _open(path: Datasets) -> tuple[list[Dataset], list[int]]:
    """Open the datasets, in an order that does not depend on the mapping's, and return them and their weights."""
    weights = path if isinstance(path, Mapping) else {Path(path): 1}
    if not weights:
        raise ValueError("the mix contains no dataset")
    integers = integer_weights(list(weights.values()))
    opened = sorted(zip(map(Dataset, weights), integers, strict=True), key=lambda pair: pair[0].manifest.hash)
    for (one, _), (other, _) in itertools.pairwise(opened):
        if one.manifest.hash == other.manifest.hash:
            raise ValueError(
                f"{one.path} and {other.path} are the same dataset: name it once, with the sum of the weights"
            )
        if one.manifest.tokenizer != other.manifest.tokenizer:
            raise ValueError(
                f"{one.path} and {other.path} have different tokenizers: build both with the same --tokenizer"
            )
    return [dataset for dataset, _ in opened], [weight for _, weight in opened]


class Prefetch(Iterator[Pair]):
    """Load a loader's batches ahead in a thread. Use it as a context manager, or call `close`."""

    def __init__(self, loader: TokenLoader, depth: int, allocate: Allocate | None) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth {depth} must be 1 or more")
        self._loader, self._depth = loader, depth
        self._position = loader.samples_consumed
        self._yielded: deque[Pair] = deque()  # pairs that are still valid, the oldest first
        self._loading: deque[tuple[Future[None], Pair]] = deque()
        # The thread has its own loader, and so its own open files. It holds no reference to this object, which
        # can thus be garbage-collected; that stops the thread.
        self._load = copy.deepcopy(loader).next_into
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._finalizer = weakref.finalize(self, _stop, self._pool)
        shape, dtype = (loader.batch_size, loader.seq_len), np.dtype(np.int64)
        make = allocate or np.empty
        for _ in range(2 * depth):  # half of them yielded, half being loaded
            self._submit((make(shape, dtype), make(shape, dtype)))

    def _submit(self, pair: Pair) -> None:
        self._loading.append((self._pool.submit(self._load, *pair), pair))

    def __next__(self) -> Pair:
        if not self._finalizer.alive:
            raise ValueError("this prefetch is closed")
        if self._loader.samples_consumed != self._position:
            raise ValueError("the loader was used during a prefetch: close the prefetch first, then start another")
        if len(self._yielded) == self._depth:
            self._submit(self._yielded.popleft())
        future, pair = self._loading.popleft()
        try:
            future.result()
        except BaseException:
            self.close()
            raise
        self._yielded.append(pair)
        self._position += self._loader.batch_size * self._loader.world_size
        self._loader.samples_consumed = self._position
        return pair

    def state(self) -> dict[str, Any]:
        """Return the loader's state after the batches that were yielded, not those loaded ahead."""
        return self._loader.state()

    def close(self) -> None:
        """End the thread after its current batch. The loader may then be used directly again."""
        self._finalizer()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(pool: ThreadPoolExecutor) -> None:
    # The garbage collector may have run in the thread itself, which cannot wait for its own end.
    itself = threading.current_thread().name.startswith("prefetch")
    pool.shutdown(wait=not itself, cancel_futures=True)
