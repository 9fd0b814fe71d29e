"""Batches of a dataset for a rank.

A split is one stream of tokens. Sample k is tokens [k*T, k*T + T + 1) of it: inputs, and the same shifted by one.
Which sample comes when depends on the dataset, the seed and a running number alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import order
from gpt2_data.dataset import Dataset

STATE_VERSION = 1


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
