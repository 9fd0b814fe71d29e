"""A dataset opened for reading, ours or another project's: a split is one stream of tokens across its files."""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_data.formats import foreign, manifest, uint16
from gpt2_data.formats.arrow import ArrowShard
from gpt2_data.formats.foreign import ForeignManifest
from gpt2_data.formats.manifest import Manifest, Shard
from gpt2_data.formats.uint16 import TokenFile
from gpt2_data.tokenizer import EOT

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
        if isinstance(self.manifest, Manifest):
            return self.manifest.documents(split)
        return self._split(split).num_documents()

    def read(self, split: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return tokens [start, stop) of the split, across shards. Raises ValueError if there are none such."""
        if not 0 <= start <= stop <= self.tokens(split):
            raise ValueError(f"tokens {start:,} to {stop:,} of split {split!r}: it has {self.tokens(split):,}")
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
        before = None
        for start in self.document_starts(split):
            if before is not None:
                yield self.read(split, before, start)
            before = start
        if before is not None:
            yield self.read(split, before, self.tokens(split))

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

    def read_into(self, out: NDArray[np.uint16], split: str, start: int) -> None:
        """Fill `out` with the split's tokens from `start` on; the caller knows that they exist."""
        self._split(split).read_into(out, start)

    def read_windows(self, out: NDArray[np.uint16], split: str, starts: NDArray[np.int64]) -> None:
        """Fill row i of `out` (rows, length) with the split's tokens from starts[i] on, as `read_into` does."""
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
        self._description, self._split = description, split
        if isinstance(description, Manifest):
            shards = description.split(split)
            opened = [manifest.open_shard(folder, shard) for shard in shards]
            self.files = [item.file if isinstance(item, ArrowShard) else item for item in opened]
            self._listed = _ShardDocuments(folder, shards, opened)
        else:
            self.files = description.split(split)
        self._vocab_size = description.vocab_size
        self._reader = uint16.TokenFiles(self.files)
        self._starts = list(itertools.accumulate((file.tokens for file in self.files), initial=0))

    def num_documents(self) -> int:
        return self._listed.count if isinstance(self._description, Manifest) else len(self._scanned)

    def document_starts(self, first: int, last: int) -> list[int]:
        """Return where documents [first, last) begin in the split, in tokens."""
        if isinstance(self._description, Manifest):
            return self._listed.starts(first, last)
        starts: list[int] = self._scanned[first:last].tolist()
        return starts

    @functools.cached_property
    def _scanned(self) -> NDArray[np.int64]:
        """Find where another project's documents begin, by Megatron's .idx or the EOTs."""
        assert isinstance(self._description, ForeignManifest)
        if self._description.format == "megatron":
            return foreign.megatron_starts(self._description, self._split)
        eot_behind = False
        if self._description.format == "nanogpt" and self.files:
            self.read_into(first := np.empty(1, np.uint16), 0)
            eot_behind = int(first[0]) != EOT
        return foreign.scanned_starts(self.read_into, self._starts[-1], eot_behind)

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
        raise ValueError(
            f"{self._where(start + at)} is {int(out[at])}, the vocabulary has {self._vocab_size}: damaged"
        )

    def _where(self, position: int) -> str:
        shard = bisect.bisect_right(self._starts, position) - 1
        return f"{self.files[shard].path}: token {position - self._starts[shard]:,}"


class _ShardDocuments:
    """The documents of a dataset of ours, which sidecars list, or which are the rows of Arrow shards."""

    def __init__(self, folder: Path, shards: Sequence[Shard], opened: Sequence[TokenFile | ArrowShard]) -> None:
        self._folder, self._shards, self._opened = folder, shards, opened
        self._token_starts = list(itertools.accumulate((shard.tokens for shard in shards), initial=0))
        self._firsts = list(itertools.accumulate((shard.documents for shard in shards), initial=0))
        self.count = self._firsts[-1]

    def starts(self, first: int, last: int) -> list[int]:
        """Return where documents [first, last) begin in the split, in tokens."""
        starts: list[int] = []
        while first < last:
            number = bisect.bisect_right(self._firsts, first) - 1
            stop = min(last, self._firsts[number + 1])
            entries = self._entries(number, first - self._firsts[number], stop - self._firsts[number])
            starts += [self._token_starts[number] + entry for entry in entries]
            first = stop
        return starts

    def _entries(self, number: int, start: int, stop: int) -> list[int]:
        shard, opened = self._shards[number], self._opened[number]
        if isinstance(opened, ArrowShard):
            path = opened.file.path
            first = opened.rows - shard.documents  # a row in front continues the shard before's last document
            offsets: list[int] = opened.row_starts(first + start, first + stop).tolist()
        else:
            assert shard.docs is not None
            path = self._folder / shard.docs.file
            if uint16.check_docs(path) != shard.documents:
                raise ValueError(f"{path}: not the {shard.documents:,} documents that dataset.json says")
            offsets = uint16.read_docs(path, start, stop).tolist()
        if offsets != sorted(offsets) or not 0 <= offsets[0] <= offsets[-1] < shard.tokens:
            raise ValueError(
                f"{path}: offsets out of order or outside the shard's {shard.tokens:,} tokens: damaged"
            )
        return offsets
