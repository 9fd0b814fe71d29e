"""Is a dataset on the disk what its dataset.json says?"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_data.disk import cores
from gpt2_data.formats import foreign, manifest, uint16
from gpt2_data.formats.arrow import ArrowShard
from gpt2_data.formats.manifest import FILE_NAME, Manifest, Shard, Sidecar

_BLOCK = 1 << 18  # bytes hashed and checked at once: what a core's cache holds
_DAMAGED = "damaged: its SHA-256 is not the one in dataset.json"


@dataclass(frozen=True)
class Report:
    """The result of verify; each line of `problems` begins with a file's name."""

    level: str
    files: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


def verify(path: str | Path, level: str = "fast", workers: int | None = None) -> Report:
    """Compare a dataset's files with its dataset.json.

    Args:
        path: the dataset's folder.
        level: "fast" checks that the tokenizer is GPT-2's and that every file is there, with the right size and
            header, and no other shard beside them. "full" also checks the SHA-256 of every file, that ids are in
            the vocabulary, and that an EOT stands at each document's start and nowhere else.
        workers: threads, each at a shard of its own; every file is read once. None: one a core.

    Raises:
        ValueError: there is no valid dataset.json. What is wrong with the files is in the report.
    """
    if level not in ("fast", "full"):
        raise ValueError(f"level is {level!r}, must be fast or full")
    folder = Path(path)
    if not (folder / FILE_NAME).exists() and (other := foreign.sniff(folder)) is not None:
        raise ValueError(
            f"{folder} is {foreign.NAMES[other.format]}'s, with nothing to verify it against: "
            f"gpt2-data convert {folder} OUT --to llmc makes a dataset that can be verified"
        )
    dataset = manifest.load(folder)
    problem = manifest.tokenizer_problem(dataset)
    problems = [] if problem is None else [problem]
    with ThreadPoolExecutor(workers or cores()) as pool:  # hashlib and numpy work outside the interpreter's lock
        for of_shard in pool.map(lambda shard: _shard_problems(folder, shard, dataset, level), dataset.shards):
            problems += of_shard
    listed = {name for shard in dataset.shards for name in shard.files}
    for extra in sorted(entry.name for entry in folder.iterdir() if manifest.is_shard_name(entry.name)):
        if extra not in listed:
            problems.append(f"{extra}: not part of this dataset; delete it")
    size = sum(shard.bytes + (shard.docs.bytes if shard.docs else 0) for shard in dataset.shards)
    return Report(level, len(listed), size, tuple(problems))


def _shard_problems(folder: Path, shard: Shard, dataset: Manifest, level: str) -> list[str]:
    problems: list[str] = []
    starts: NDArray[np.int64] | None = None
    name = shard.file
    try:
        if shard.docs is not None:
            name = shard.docs.file
            starts = _checked_docs(folder, shard, shard.docs, level, problems)
    except (ValueError, OSError) as error:
        problems.append(_named(folder, name, error))
    try:
        opened = manifest.open_shard(folder, shard)
        if level == "full":
            problems += _content_problems(opened, starts, shard, dataset)
    except (ValueError, OSError) as error:
        problems.append(_named(folder, shard.file, error))
    return problems


def _named(folder: Path, name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name}: missing"
    return f"{name}: {str(error).removeprefix(f'{folder / name}: ')}"


def _checked_docs(
    folder: Path, shard: Shard, docs: Sidecar, level: str, problems: list[str]
) -> NDArray[np.int64] | None:
    """Return the document starts of a sidecar, for the level full."""
    count = uint16.check_docs(folder / docs.file)
    if count != shard.documents:
        raise ValueError(f"{count:,} documents, dataset.json says {shard.documents:,}")
    if level == "fast":
        return None
    data = (folder / docs.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != docs.sha256:
        problems.append(f"{docs.file}: {_DAMAGED}")
    return np.frombuffer(data[uint16.DOCS_HEADER_BYTES :], uint16.OFFSET).astype(np.int64)


def _content_problems(
    opened: uint16.TokenFile | ArrowShard, starts: NDArray[np.int64] | None, shard: Shard, dataset: Manifest
) -> list[str]:
    """Read the file once: its hash may be wrong, or right and its tokens as a faulty builder wrote them."""
    problems: list[str] = []
    if isinstance(opened, ArrowShard):
        file, rows = opened.file, opened.row_starts()
        if rows[0] != 0 or opened.ids().min() < 0:
            problems.append(f"{shard.file}: row starts or ids that cannot be: damaged")
        starts = rows[opened.rows - shard.documents :]
    else:
        file = opened
    check = _TokenCheck(file.tokens, starts, dataset)
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as source:
        digest.update(source.read(file.start))
        buffer = memoryview(bytearray(_BLOCK))
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            check.add(np.frombuffer(buffer[: count // 2 * 2], uint16.TOKEN))
    if digest.hexdigest() != shard.sha256:
        problems.append(f"{shard.file}: {_DAMAGED}")
    if check.bad_id:
        problems.append(f"{shard.file}: {check.bad_id}")
    if starts is not None and not check.documents_fit():
        where = shard.docs.file if shard.docs else shard.file
        problems.append(f"{where}: document offsets do not fit the tokens of {shard.file}")
    return problems


class _TokenCheck:
    """A check, block by block, that ids are in the vocabulary and EOTs just where documents start."""

    def __init__(self, num_tokens: int, starts: NDArray[np.int64] | None, dataset: Manifest) -> None:
        self._unread, self._position = num_tokens, 0
        self._vocab_size, self._eot = dataset.vocab_size, dataset.tokenizer["eot"]
        # In order, and all of them in the shard; else a look-up would not find them.
        self._in_order = starts is None or bool((np.diff(starts, prepend=-1, append=num_tokens) > 0).all())
        self._starts = starts if starts is not None and self._in_order else np.empty(0, np.int64)
        self._eots = self._at_starts = 0
        self.bad_id = ""

    def add(self, block: NDArray[np.uint16]) -> None:
        tokens = block[: self._unread]  # an Arrow file has more behind them
        self._unread -= len(tokens)
        if not self.bad_id and len(tokens) and int(tokens.max()) >= self._vocab_size:
            at = int(np.argmax(tokens >= self._vocab_size))
            self.bad_id = f"token {self._position + at:,} is {tokens[at]}, not below {self._vocab_size}"
        first, last = np.searchsorted(self._starts, [self._position, self._position + len(tokens)])
        self._eots += int(np.count_nonzero(tokens == self._eot))
        at_starts = tokens[self._starts[first:last] - self._position]
        self._at_starts += int(np.count_nonzero(at_starts == self._eot))
        self._position += len(tokens)

    def documents_fit(self) -> bool:
        """True if there are as many EOTs as documents, each of which starts with one: so no EOT is elsewhere."""
        return self._in_order and self._eots == self._at_starts == len(self._starts)
