"""A dataset opened for reading, ours or another project's: a split is one stream of tokens across its files."""

import bisect
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_data.formats import foreign, manifest, uint16
from gpt2_data.formats.foreign import ForeignManifest
from gpt2_data.formats.manifest import Manifest
from gpt2_data.formats.uint16 import TokenFile

_ITERATED = 1024  # document starts read at once


class Dataset:
    """A dataset. Opening ours reads dataset.json only; a split's files are checked when it is first used.

    Of other projects only Megatron records where documents are. For the rest the first use of a split's documents
    reads the whole split and keeps 8 bytes a document: they start at each EOT, or in nanoGPT's files after it.

    Args:
        path: a folder of ours (uint16 or Arrow shards), of build-nanogpt's .npy, of llm.c's .bin, of nanoGPT's
            train.bin and val.bin, or of Megatron's .bin and .idx, or the common beginning of the latter's names.

    Raises:
        ValueError, OSError: `path` is no dataset, or one of another tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = load(self.path)
        self._splits: dict[str, _Split] = {}

    def tokens(self, split: str) -> int:
        """Return the number of tokens of the split, EOTs counted."""
        return self.manifest.tokens(split)

    def num_documents(self, split: str) -> int:
        """Return the number of documents of the split."""
        return self._split(split).num_documents

    def read(self, split: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return tokens [start, stop) of the split, across shards. Raises ValueError if there are none such."""
        if not 0 <= start <= stop <= self.tokens(split):
            raise ValueError(f"tokens {start:,} to {stop:,} not in split {split!r}: it has {self.tokens(split):,}")
        out = np.empty(stop - start, np.uint16)
        self._split(split).read_into(out, start)
        return out

    def document(self, split: str, number: int) -> NDArray[np.uint16]:
        """Return document `number` of the split as it stands there: EOT, then its tokens."""
        return self.read(split, *self.document_range(split, number))

    def document_range(self, split: str, number: int) -> tuple[int, int]:
        """Return where in the split document `number` stands: (start, stop) in tokens."""
        count = self.num_documents(split)
        if not 0 <= number < count:
            raise ValueError(f"no document {number:,} in split {split!r}: it has {count:,}, counted from 0")
        starts = self._split(split).document_starts(number, min(number + 2, count))
        return starts[0], starts[1] if len(starts) == 2 else self.tokens(split)

    def documents(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """Yield every document of the split in order, as `document` returns it."""
        bounds = itertools.chain(self.document_starts(split), [self.tokens(split)])
        for start, stop in itertools.pairwise(bounds):
            yield self.read(split, start, stop)

    def document_starts(self, split: str) -> Iterator[int]:
        """Yield where each document of the split begins, in tokens, in order."""
        count = self.num_documents(split)
        for first in range(0, count, _ITERATED):
            yield from self._split(split).document_starts(first, min(first + _ITERATED, count))

    def files(self, split: str) -> list[TokenFile]:
        """Return the files of the split in order, and where in each the tokens are."""
        return self._split(split).files

    def _split(self, split: str) -> "_Split":
        if split not in self._splits:
            self._splits[split] = _Split(self.path, self.manifest, split)
        return self._splits[split]

    def read_windows(self, out: NDArray[np.uint16], split: str, starts: NDArray[np.int64]) -> None:
        """Fill row i of `out` (rows, length) with the split's tokens from starts[i] on, which must exist."""
        self._split(split).read_windows(out, starts)


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset, ours or another project's; see Dataset."""
    return Dataset(path)


def load(path: Path) -> Manifest | ForeignManifest:
    """Describe the dataset at `path`. Raises ValueError or OSError in one line, also for a foreign tokenizer."""
    if (path / manifest.FILE_NAME).exists() or (path / ".build").exists():
        description = manifest.load(path)
        if (problem := manifest.tokenizer_problem(description)) is not None:
            raise ValueError(f"{path}/{problem}")
        return description
    if (other := foreign.sniff(path)) is not None:
        return other
    known = ", ".join(foreign.NAMES.values())
    raise ValueError(manifest.not_a_dataset(path, "dataset", f", nor shards of {known}"))


class _Split:
    """The files of one split as one stream. Raises ValueError or OSError for a missing or cut-short file."""

    def __init__(self, folder: Path, description: Manifest | ForeignManifest, split: str) -> None:
        self._folder, self._description, self._split = folder, description, split
        if isinstance(description, Manifest):
            self.files = [manifest.open_shard(folder, shard) for shard in description.split(split)]
        else:
            self.files = [shard.file for shard in description.split(split)]
        self._vocab_size = description.vocab_size
        self._reader = uint16.TokenFiles(self.files)
        self._starts = list(itertools.accumulate((file.tokens for file in self.files), initial=0))

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """The number of the first document of each shard, and at the end how many there are."""
        if isinstance(self._description, Manifest):
            counts = [shard.documents for shard in self._description.split(self._split)]
        else:
            counts = [len(starts) for starts in self._foreign_starts]
        return list(itertools.accumulate(counts, initial=0))

    @functools.cached_property
    def _foreign_starts(self) -> list[NDArray[np.int64]]:
        assert isinstance(self._description, ForeignManifest)
        shards = self._description.split(self._split)
        return [foreign.document_starts(self._description.format, shard) for shard in shards]

    @property
    def num_documents(self) -> int:
        return self._firsts[-1]

    def document_starts(self, first: int, last: int) -> list[int]:
        """Return where documents [first, last) begin in the split, in tokens."""
        starts: list[int] = []
        while first < last:
            number = bisect.bisect_right(self._firsts, first) - 1
            before, stop = self._firsts[number], min(last, self._firsts[number + 1])
            starts += (self._shard_starts(number, first - before, stop - before) + self._starts[number]).tolist()
            first = stop
        return starts

    def _shard_starts(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        if isinstance(self._description, ForeignManifest):
            return self._foreign_starts[number][first:last]
        shard = self._description.split(self._split)[number]
        documents = manifest.open_documents(self._folder, shard)
        starts = documents.read(first, last)
        if (np.diff(starts, prepend=0, append=shard.tokens - 1) < 0).any():
            raise ValueError(
                f"{documents.path}: offsets out of order or outside the shard's {shard.tokens:,} tokens: damaged"
            )
        return starts

    def read_into(self, out: NDArray[np.uint16], start: int) -> None:
        self._read(out, start)
        if len(out) and int(out.max()) >= self._vocab_size:
            self._refuse(out, start)

    def read_windows(self, out: NDArray[np.uint16], starts: NDArray[np.int64]) -> None:
        borders = np.asarray(self._starts)
        shards = borders.searchsorted(starts, side="right") - 1
        if (starts + out.shape[1] <= borders[shards + 1]).all():
            self._reader.read_rows(out, shards.tolist(), (starts - borders[shards]).tolist())
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
            self._reader.read_into(out[filled : filled + count], shard, position - self._starts[shard])
            position, filled = position + count, filled + count

    def _refuse(self, out: NDArray[np.uint16], start: int) -> None:
        # dataset.json vouches for the largest id, but the file may have been damaged since. An id too large would
        # end a run on a GPU without a word of where it came from; finding it costs microseconds.
        at = int(np.argmax(out >= self._vocab_size))
        shard = bisect.bisect_right(self._starts, start + at) - 1
        raise ValueError(
            f"{self.files[shard].path}: token {start + at - self._starts[shard]:,} is {out[at]}, "
            f"the vocabulary has {self._vocab_size}: damaged"
        )
