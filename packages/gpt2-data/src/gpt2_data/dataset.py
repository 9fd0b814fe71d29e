"""A dataset opened for reading, ours or another project's: a split is one stream of tokens across its files."""

import bisect
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_data import tokenizer, vocabulary
from gpt2_data.formats import foreign, manifest
from gpt2_data.formats.foreign import ForeignManifest, ForeignShard
from gpt2_data.formats.manifest import Manifest, Shard
from gpt2_data.formats.uint16 import TokenFiles

_ONE_READ = 1 << 29  # tokens: one system call reads at most 2 GiB


class Dataset:
    """A dataset. Opening ours reads dataset.json only; a split's files are checked when it is first used.

    Of other formats only Megatron's records where documents begin. Otherwise the first use of a split's documents
    reads the whole split and keeps 8 bytes per document; one starts at each EOT, or after it in nanoGPT's files.

    Args:
        path: a folder with our shards (uint16 or Arrow), build-nanogpt's .npy, llm.c's .bin, nanoGPT's train.bin
            and val.bin, or Megatron's .bin and .idx; for Megatron also a path without these two endings.

    Raises:
        ValueError, OSError: `path` is not a dataset, or its tokenizer is neither GPT-2's nor in the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        self.manifest = load(self.path)
        self._splits: dict[str, Split] = {}

    @property
    def eot(self) -> int:
        """The id that stands before each document."""
        return self.manifest.eot

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary: token ids are below it."""
        return self.manifest.vocab_size

    @property
    def tokenizer(self) -> Path | None:
        """The dataset's tokenizer.json; None if the vocabulary is GPT-2's."""
        folder = self.path if self.path.is_dir() else self.path.parent  # the path may be of a Megatron pair
        return folder / vocabulary.FILE_NAME if self.manifest.own_tokenizer else None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; bytes that are not UTF-8 become U+FFFD."""
        if self.tokenizer is None:
            return tokenizer.get_tokenizer().decode(ids)
        return vocabulary.decode(self.tokenizer, ids)

    def split(self, name: str) -> "Split":
        """Open a split. Raises ValueError or OSError if one of its files is missing or damaged."""
        if name not in self._splits:
            self._splits[name] = Split(self.path, self.manifest, name)
        return self._splits[name]

    def tokens(self, split: str) -> int:
        """Return the number of tokens of the split, including EOTs."""
        return self.manifest.tokens(split)

    def num_documents(self, split: str) -> int:
        """Return the number of documents of the split."""
        return self.split(split).first_documents[-1]

    def read(self, split: str, start: int, stop: int) -> NDArray[np.uint16]:
        """Return tokens [start, stop) of the split, across shards. Raises ValueError if it has no such tokens."""
        if not 0 <= start <= stop <= self.tokens(split):
            raise ValueError(f"split {split!r} has {self.tokens(split):,} tokens, not {start:,} to {stop:,}")
        out = np.empty(stop - start, np.uint16)
        if start < stop:
            self.split(split).read_windows(out[np.newaxis], np.array([start]))
        return out

    def document(self, split: str, number: int) -> NDArray[np.uint16]:
        """Return document `number` as it is stored in the split: EOT, then its tokens; others' may end with it."""
        return self.read(split, *self.document_range(split, number))

    def document_range(self, split: str, number: int) -> tuple[int, int]:
        """Return where document `number` is in the split: (start, stop) in tokens."""
        count = self.num_documents(split)
        if not 0 <= number < count:
            raise ValueError(f"no document {number:,} in split {split!r}: it has {count:,}, counted from 0")
        files = self.split(split)
        stop = files.document_start(number + 1) if number + 1 < count else files.starts[-1]
        return files.document_start(number), stop

    def documents(self, split: str) -> Iterator[NDArray[np.uint16]]:
        """Yield every document of the split in order, as `document` returns it."""
        bounds = itertools.chain(self.document_starts(split), [self.tokens(split)])
        for start, stop in itertools.pairwise(bounds):
            yield self.read(split, start, stop)

    def document_starts(self, split: str) -> Iterator[int]:
        """Yield where each document of the split begins, in tokens, in order."""
        files = self.split(split)
        for number, start in enumerate(files.starts[:-1]):
            yield from (start + files.starts_in_file(number)).tolist()


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset, ours or another project's; see Dataset."""
    return Dataset(path)


def load(path: Path) -> Manifest | ForeignManifest:
    """Return the description of a dataset. Raises ValueError or OSError, also if tokenizer_problem names one."""
    if (path / manifest.FILE_NAME).exists() or (path / ".build").exists():
        description = manifest.load(path)
        if (problem := manifest.tokenizer_problem(path, description)) is not None:
            raise ValueError(f"{path}/{problem}")
        return description
    if (other := foreign.sniff(path)) is not None:
        return other
    known = ", ".join(foreign.NAMES.values())
    raise ValueError(manifest.not_a_dataset(path, "dataset", f", nor shards of {known}"))


class Split:
    """The files of one split as one stream."""

    def __init__(self, folder: Path, description: Manifest | ForeignManifest, split: str) -> None:
        self._folder, self._vocab_size = folder, description.vocab_size
        self._shards: Sequence[Shard | ForeignShard] = description.split(split)
        self.files = [
            manifest.open_shard(folder, shard) if isinstance(shard, Shard) else shard.file
            for shard in self._shards
        ]
        self._reader = TokenFiles(self.files)
        # Where each file begins in the stream, in tokens; the last entry is the stream's length.
        self.starts = list(itertools.accumulate((file.tokens for file in self.files), initial=0))

    @functools.cached_property
    def first_documents(self) -> list[int]:
        """The number of each file's first document; the last entry is the number of all documents."""
        return list(itertools.accumulate((shard.documents for shard in self._shards), initial=0))

    def document_start(self, number: int) -> int:
        """Return where document `number` begins in the split, in tokens."""
        file = bisect.bisect_right(self.first_documents, number) - 1
        within = number - self.first_documents[file]
        return self.starts[file] + int(self.starts_in_file(file, within, within + 1)[0])

    def starts_in_file(self, number: int, first: int = 0, last: int | None = None) -> NDArray[np.int64]:
        """Return where documents [first, last) of a file begin in it, in tokens."""
        shard = self._shards[number]
        if isinstance(shard, ForeignShard):
            return shard.document_starts[first:last]
        documents = manifest.open_documents(self._folder, shard)
        starts = documents.read(first, last)
        if (np.diff(starts, prepend=0, append=shard.tokens - 1) < 0).any():
            raise ValueError(
                f"{documents.path}: offsets out of order or outside the shard's {shard.tokens:,} tokens: damaged"
            )
        return starts

    def read_windows(self, out: NDArray[np.uint16], starts: NDArray[np.int64]) -> None:
        """Fill row i of `out` (rows, length) with the split's tokens from starts[i] on, which must exist."""
        borders = np.asarray(self.starts)
        files = borders.searchsorted(starts, side="right") - 1
        if out.shape[1] <= _ONE_READ and (starts + out.shape[1] <= borders[files + 1]).all():
            self._reader.read_rows(out, files.tolist(), (starts - borders[files]).tolist())
        else:  # a row crosses the border of two files, or is longer than one read
            for row, start in zip(out, starts.tolist(), strict=True):
                self._read(row, start)
        # dataset.json vouches for the largest id, but the file may have been damaged since. On a GPU, an id that
        # is too large would end a run without saying where it came from. All rows are checked at once: checking
        # them one by one takes a fifth of the time of reading them.
        if int(out.max()) >= self._vocab_size:
            row_number, column = np.argwhere(out >= self._vocab_size)[0].tolist()
            at = int(starts[row_number]) + column
            file = bisect.bisect_right(self.starts, at) - 1
            raise ValueError(
                f"{self.files[file].path}: token {at - self.starts[file]:,} is {out[row_number, column]}, "
                f"the vocabulary has {self._vocab_size}: damaged"
            )

    def _read(self, out: NDArray[np.uint16], start: int) -> None:
        position, filled = start, 0
        while filled < len(out):
            file = bisect.bisect_right(self.starts, position) - 1
            count = min(len(out) - filled, self.starts[file + 1] - position)
            self._reader.read_into(out[filled : filled + count], file, position - self.starts[file])
            position, filled = position + count, filled + count
