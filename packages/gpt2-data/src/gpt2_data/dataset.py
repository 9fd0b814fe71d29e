"""A built dataset opened for reading: a split is one stream of tokens across its shards."""

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_data import formats, manifest

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

    def read_windows(self, out: NDArray[np.uint16], split: str, starts: NDArray[np.int64]) -> None:
        """Fill row i of `out` (rows, length) with the split's tokens from starts[i] on, as `read_into` does."""
        self._split(split).read_windows(out, starts)


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
        self._read(out, start)
        if len(out) and int(out.max()) >= self._vocab_size:
            self._refuse(out, start)

    def read_windows(self, out: NDArray[np.uint16], starts: NDArray[np.int64]) -> None:
        borders = np.asarray(self._starts)
        shards = borders.searchsorted(starts, side="right") - 1
        if (starts + out.shape[1] <= borders[shards + 1]).all():
            self._files.read_rows(out, shards.tolist(), (starts - borders[shards]).tolist())
        else:  # one crosses a shard's border
            for row, start in zip(out, starts.tolist(), strict=True):
                self._read(row, start)
        if out.size and int(out.max()) >= self._vocab_size:  # once, not for each row: a fifth of the time
            row = int(np.argmax(out.max(axis=1) >= self._vocab_size))
            self._refuse(out[row], int(starts[row]))

    def _read(self, out: NDArray[np.uint16], start: int) -> None:
        position, filled = start, 0
        while filled < len(out):
            shard = bisect.bisect_right(self._starts, position) - 1
            count = min(len(out) - filled, self._starts[shard + 1] - position)
            self._files.read_into(out[filled : filled + count], shard, position - self._starts[shard])
            position, filled = position + count, filled + count

    def _refuse(self, out: NDArray[np.uint16], start: int) -> None:
        # dataset.json vouches for the largest id, but the file may have been damaged since. An id too large would
        # end a run on a GPU without a word of where it came from; finding it costs microseconds.
        at = int(np.argmax(out >= self._vocab_size))
        raise ValueError(
            f"{self._where(start + at)} is {int(out[at])}, the vocabulary has {self._vocab_size}: damaged"
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
