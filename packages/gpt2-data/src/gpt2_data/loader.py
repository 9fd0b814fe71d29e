"""A built dataset opened for reading, and batches from it for a rank.

A split is one stream of tokens across its shards. Sample k is tokens [k*T, k*T + T + 1) of it: inputs, and the
same shifted by one. Which sample comes when depends on the dataset, the seed and a running number alone.
"""

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import formats, manifest, order

STATE_VERSION = 1
_ITERATED = 1024  # sidecar entries read at once


class Dataset:
    """A dataset folder. Opening reads dataset.json only; a split's files are checked when it is first used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = manifest.load(self.path)
        self._splits: dict[str, _Split] = {}

    def tokens(self, split: str) -> int:
        """Tokens of the split, the EOT in front of each document counted."""
        return self.manifest.tokens(split)

    def num_documents(self, split: str) -> int:
        """Documents of the split."""
        return self.manifest.documents(split)

    def read(self, split: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Tokens [start, stop) of the split, across shards. Raises ValueError if there are no such tokens."""
        if not 0 <= start <= stop <= self.tokens(split):
            raise ValueError(f"tokens {start:,} to {stop:,} of split {split!r}: it has {self.tokens(split):,}")
        out = np.empty(stop - start, np.uint16)
        self._split(split).read_into(out, start)
        return out

    def document(self, split: str, number: int) -> NDArray[np.uint16]:
        """Document `number` of the split as it stands there: EOT, then its tokens."""
        return self.read(split, *self.document_range(split, number))

    def document_range(self, split: str, number: int) -> tuple[int, int]:
        """Where in the split document `number` stands, as (start, stop) in tokens."""
        count = self.num_documents(split)
        if not 0 <= number < count:
            raise ValueError(f"no document {number:,} in split {split!r}: it has {count:,}, counted from 0")
        opened = self._split(split)
        stop = opened.document_start(number + 1) if number + 1 < count else self.tokens(split)
        return opened.document_start(number), stop

    def documents(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """Every document of the split in order, each as `document` gives it."""
        before = None
        for start in self._split(split).document_starts():
            if before is not None:
                yield self.read(split, before, start)
            before = start
        if before is not None:
            yield self.read(split, before, self.tokens(split))

    def _split(self, split: str) -> "_Split":
        if split not in self._splits:
            self._splits[split] = _Split(self.path, self.manifest, split)
        return self._splits[split]

    def read_into(self, out: NDArray[np.uint16], split: str, start: int) -> None:
        """Fill `out` with the split's tokens from `start` on; the caller knows that they exist."""
        self._split(split).read_into(out, start)


def open_dataset(path: str | Path) -> Dataset:
    """Open a folder that `gpt2-data build` made. Raises ValueError if it is none."""
    return Dataset(path)


class _Split:
    """The files of one split as one stream. Raises ValueError or OSError for a missing or cut-short file."""

    def __init__(self, folder: Path, description: manifest.Manifest, split: str) -> None:
        shards = description.split(split)
        for shard in shards:
            count = formats.check_shard(folder / shard.file)
            if count != shard.tokens:
                raise ValueError(f"{folder / shard.file}: {count:,} tokens, dataset.json says {shard.tokens:,}")
        self._name = split
        self._vocab_size = description.vocab_size
        self._files = formats.TokenFiles([folder / shard.file for shard in shards])
        self._docs = [folder / shard.docs.file for shard in shards]
        self._starts = list(itertools.accumulate((shard.tokens for shard in shards), initial=0))
        self._first_documents = list(itertools.accumulate((shard.documents for shard in shards), initial=0))

    def read_into(self, out: NDArray[np.uint16], start: int) -> None:
        position, filled = start, 0
        while filled < len(out):
            shard = bisect.bisect_right(self._starts, position) - 1
            count = min(len(out) - filled, self._starts[shard + 1] - position)
            self._files.read_into(out[filled : filled + count], shard, position - self._starts[shard])
            position, filled = position + count, filled + count
        # dataset.json vouches for the largest id, but the file may have been damaged since. An id too large would
        # end a run on a GPU without a word of where it came from; this costs microseconds.
        if len(out) and int(out.max()) >= self._vocab_size:
            at = start + int(np.argmax(out >= self._vocab_size))
            raise ValueError(
                f"{self._where(at)} is {int(out.max())}, the vocabulary has {self._vocab_size}: damaged"
            )

    def _where(self, position: int) -> str:
        shard = bisect.bisect_right(self._starts, position) - 1
        return f"{self._docs[shard].with_suffix('.bin')}: token {position - self._starts[shard]:,}"

    def document_start(self, number: int) -> int:
        shard = bisect.bisect_right(self._first_documents, number) - 1
        entry = number - self._first_documents[shard]
        return self._starts[shard] + self._entries(shard, entry, entry + 1)[0]

    def document_starts(self) -> Iterator[int]:
        for shard, start in enumerate(self._starts[:-1]):
            count = self._first_documents[shard + 1] - self._first_documents[shard]
            for entry in range(0, count, _ITERATED):
                for offset in self._entries(shard, entry, min(entry + _ITERATED, count)):
                    yield start + offset

    def _entries(self, shard: int, start: int, stop: int) -> list[int]:
        path, tokens = self._docs[shard], self._starts[shard + 1] - self._starts[shard]
        count = self._first_documents[shard + 1] - self._first_documents[shard]
        if formats.check_docs(path) != count:
            raise ValueError(f"{path}: not the {count:,} documents that dataset.json says")
        offsets: list[int] = formats.read_docs(path, start, stop).tolist()
        if offsets != sorted(offsets) or not 0 <= offsets[0] <= offsets[-1] < tokens:
            raise ValueError(f"{path}: offsets out of order or outside the shard's {tokens:,} tokens: damaged")
        return offsets


class TokenLoader:
    """Batches for ever: each step yields (x, y), int64 arrays of shape (batch_size, seq_len), y one token ahead.

    `batch_size` is this rank's. Step j of rank r takes the global samples j*B*W + r*B onwards: the ranks together
    take what one rank with the whole batch would. After the last sample a new epoch begins, in a new order if
    `shuffle`; a batch may span both. Raises ValueError or OSError for a split too short for one sample, and for
    missing or damaged shards.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        batch_size: int = 32,
        seq_len: int = 1024,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size {batch_size} and seq_len {seq_len} must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}: must be 0 to world_size - 1")
        self.dataset = Dataset(path)
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.seed, self.rank, self.world_size, self.shuffle = seed, rank, world_size, shuffle
        self.num_samples = (self.dataset.tokens(split) - 1) // seq_len
        """Samples in an epoch."""
        if self.num_samples < 1:
            raise ValueError(
                f"{self.dataset.path}: split {split!r} has {self.dataset.tokens(split):,} tokens, "
                f"a sample of seq_len {seq_len} needs {seq_len + 1:,}"
            )
        self.samples_consumed = 0
        """Samples that all ranks together have taken."""
        self.dataset.read(split, 0, 1)  # opens the split, so that a missing shard is noticed now
        self._hash = self.dataset.manifest.hash

    def __iter__(self) -> "TokenLoader":
        return self

    def __next__(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        first = self.samples_consumed + self.rank * self.batch_size
        samples = self.samples(np.arange(first, first + self.batch_size))
        tokens = np.empty((self.batch_size, self.seq_len + 1), np.uint16)
        for row, sample in zip(tokens, samples.tolist(), strict=True):
            self.dataset.read_into(row, self.split, sample * self.seq_len)
        self.samples_consumed += self.batch_size * self.world_size
        return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)

    def samples(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which samples of the split are the global samples `numbers`, counted on through the epochs."""
        epochs, within = np.divmod(numbers, self.num_samples)
        if self.shuffle:
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                within[here] = order.permute(within[here], self.num_samples, order.mix(self.seed, epoch))
        return within

    def state(self) -> dict[str, Any]:
        """Where the stream of batches stands, to be kept as JSON; the same on every rank."""
        return {
            "version": STATE_VERSION,
            "dataset": self._hash,
            "split": self.split,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "shuffle": self.shuffle,
            "samples": self.samples_consumed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, in O(1), also on another number of ranks or with another batch_size.

        Raises ValueError naming the field if this loader's stream is another than that one's.
        """
        for field, here in (self.state() | {"samples": state.get("samples")}).items():
            if state.get(field) != here:
                raise ValueError(f"the loader's state has {field} {state.get(field)!r}, this loader {here!r}")
        samples = state["samples"]
        if not isinstance(samples, int) or samples < 0:
            raise ValueError(f"the loader's state has samples {samples!r}")
        self.samples_consumed = samples
