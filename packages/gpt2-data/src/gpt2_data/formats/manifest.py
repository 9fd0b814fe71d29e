"""dataset.json: what a built dataset is; and whether the files beside it are that."""

import dataclasses
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import tokenizer
from gpt2_data.building import workers as engines
from gpt2_data.formats import arrow, foreign
from gpt2_data.formats import uint16 as formats

FILE_NAME = "dataset.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SHARD_NAME = re.compile(r"(train|val)_\d{6,}\.(bin|docs|arrow)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 18  # bytes hashed and checked at once: what a core's cache holds
_DAMAGED = "damaged: its SHA-256 is not the one in dataset.json"


@dataclass(frozen=True)
class Sidecar:
    """The file of document offsets beside a shard. Sizes in bytes."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One shard: `documents` start in it, `bytes` is the file's size, `tokens_sha256` is of the tokens alone."""

    split: str
    file: str
    tokens: int
    documents: int
    bytes: int
    max_token: int
    tokens_sha256: str
    sha256: str
    docs: Sidecar | None
    """None for an Arrow shard, whose rows are the documents."""

    @property
    def files(self) -> list[str]:
        """The names of its files."""
        return [self.file] + ([self.docs.file] if self.docs else [])


@dataclass(frozen=True)
class Manifest:
    """dataset.json. Two builds of the same source, order and seed have it byte for byte."""

    tokenizer: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    shards: tuple[Shard, ...]

    def tokens(self, split: str) -> int:
        """Tokens of a split, EOTs counted."""
        return sum(shard.tokens for shard in self.split(split))

    def documents(self, split: str) -> int:
        """Documents of a split."""
        return sum(shard.documents for shard in self.split(split))

    def split(self, split: str) -> list[Shard]:
        """The shards of a split in order. Raises ValueError for a split there cannot be."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {' and '.join(SPLITS)}")
        return [shard for shard in self.shards if shard.split == split]

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(self.tokenizer["vocab_size"])

    @property
    def hash(self) -> str:
        """SHA-256 of dataset.json, in hex; names the dataset."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """What stands in dataset.json, byte for byte."""
        totals = {
            split: {
                "tokens": self.tokens(split),
                "documents": self.documents(split),
                "shards": len(self.split(split)),
            }
            for split in SPLITS
        }
        content = {"format_version": FORMAT_VERSION, "totals": totals} | dataclasses.asdict(self)
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def load(folder: Path) -> Manifest:
    """Read and check a dataset folder's dataset.json. Raises ValueError or OSError naming it.

    Nothing in it is trusted: file names must be plain, numbers in range, totals the sums of their parts. Whether
    the tokens are GPT-2's is tokenizer_problem's to say.
    """
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise ValueError(no_such_folder(folder)) from None
        hint = ", but an unfinished build: run its command again" if (folder / ".build").exists() else ""
        raise ValueError(f"{folder} is not a dataset of gpt2-data: there is no {FILE_NAME} in it{hint}") from None
    try:
        manifest = _parse(json.loads(data))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a valid dataset description: {what}") from None
    if manifest.to_bytes() != data:
        raise ValueError(f"{path}: not as gpt2-data wrote it: totals or layout were changed")
    return manifest


def no_such_folder(folder: Path) -> str:
    """What is wrong with a dataset's folder that is not there."""
    return f"{folder} is not a dataset: there is no such folder; gpt2-data build --out {folder} makes one"


def shard_from_json(item: Any) -> Shard:
    """What dataclasses.asdict made of a Shard. Raises KeyError or TypeError if it is none."""
    return Shard(**item | {"docs": None if item["docs"] is None else Sidecar(**item["docs"])})


def _parse(content: Any) -> Manifest:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this program reads version {FORMAT_VERSION}")
    shards = tuple(shard_from_json(item) for item in content["shards"])
    manifest = Manifest(content["tokenizer"], content["source"], content["options"], shards)
    files = [name for shard in shards for name in shard.files]
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    vocab_size = manifest.tokenizer["vocab_size"]
    if not _is_count(vocab_size, 2**16):
        raise ValueError(f"vocab_size {vocab_size!r}")
    if not _is_count(manifest.tokenizer["eot"], vocab_size - 1):
        raise ValueError(f"eot {manifest.tokenizer['eot']!r}")
    for shard in shards:
        _check_shard(shard, vocab_size)
    return manifest


def _check_shard(shard: Shard, vocab_size: int) -> None:
    for name in shard.files:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or not name.strip("."):
            raise ValueError(f"file name {name!r} is not a plain name")
    if shard.split not in SPLITS:
        raise ValueError(f"{shard.file}: split {shard.split!r}")
    for value in shard.sha256, shard.tokens_sha256, *([shard.docs.sha256] if shard.docs else []):
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise ValueError(f"{shard.file}: SHA-256 {value!r}")
    if not _is_count(shard.tokens, formats.MAX_SHARD_TOKENS) or shard.tokens == 0:
        raise ValueError(f"{shard.file}: {shard.tokens!r} tokens")
    if not _is_count(shard.documents, shard.tokens):
        raise ValueError(f"{shard.file}: {shard.documents!r} documents")
    if not _is_count(shard.max_token, vocab_size - 1):
        raise ValueError(f"{shard.file}: token {shard.max_token!r} in a vocabulary of {vocab_size}")
    if shard.docs:
        sizes = {(formats.shard_bytes(shard.tokens), formats.docs_bytes(shard.documents))}
    else:  # a first row may go on with a document from the shard before
        rows = {min(max(shard.documents + more, 1), shard.tokens) for more in (0, 1)}
        sizes = {(arrow.shard_bytes(shard.tokens, n), 0) for n in rows}
    if (shard.bytes, shard.docs.bytes if shard.docs else 0) not in sizes:
        raise ValueError(f"{shard.file}: sizes that do not fit its counts")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


@dataclass(frozen=True)
class Report:
    """What verify found; `problems` are lines that each begin with the file's name."""

    level: str
    files: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def tokenizer_problem(manifest: Manifest) -> str | None:
    """What is wrong if the tokens are not GPT-2's: ids of another vocabulary train without an error."""
    ours = tokenizer.identity()
    for key in "vocabulary_sha256", "vocab_size", "eot":
        if manifest.tokenizer.get(key) != ours[key]:
            name = manifest.tokenizer.get("name")
            return (
                f"{FILE_NAME}: foreign tokenizer: {key} of {name!r} is not GPT-2's: build it again from its text"
            )
    return None


def verify(path: str | Path, level: str = "fast", workers: int | None = None) -> Report:
    """Compare a dataset's files with its dataset.json.

    `fast`: GPT-2's tokenizer, every file there, with the right size and header, and no shard beside them. `full`:
    the SHA-256 of every file too, ids within the vocabulary, and an EOT at each document's start and nowhere else.
    `workers` threads, None for one a core, take a shard each and read every file once. Raises ValueError if there
    is no valid dataset.json; what is wrong with the files is in the report.
    """
    if level not in ("fast", "full"):
        raise ValueError(f"level is {level!r}, must be fast or full")
    folder = Path(path)
    if (folder / FILE_NAME).exists() or (other := foreign.sniff(folder)) is None:
        manifest = load(folder)
    else:
        raise ValueError(
            f"{folder} is {foreign.NAMES[other.format]}'s, with nothing to verify it against: "
            f"gpt2-data convert {folder} OUT --to llmc makes a dataset that can be verified"
        )
    problem = tokenizer_problem(manifest)
    problems = [] if problem is None else [problem]
    with ThreadPoolExecutor(
        workers or engines.cores()
    ) as pool:  # hashlib and numpy work outside the interpreter's lock
        for found in pool.map(lambda shard: _shard_problems(folder, shard, manifest, level), manifest.shards):
            problems += found
    listed = {name for shard in manifest.shards for name in shard.files}
    for extra in sorted(entry.name for entry in folder.iterdir() if is_shard_name(entry.name)):
        if extra not in listed:
            problems.append(f"{extra}: not part of this dataset; delete it")
    size = sum(shard.bytes + (shard.docs.bytes if shard.docs else 0) for shard in manifest.shards)
    return Report(level, len(listed), size, tuple(problems))


def is_shard_name(name: str) -> bool:
    """Whether a file of this name in a dataset folder would pass for one of its shards."""
    return _SHARD_NAME.fullmatch(name) is not None


def open_shard(folder: Path, shard: Shard) -> formats.TokenFile | arrow.ArrowShard:
    """A shard whose file has the size and the header that dataset.json says. Raises ValueError or OSError."""
    path = folder / shard.file
    if shard.docs is None:
        return arrow.check_shard(path, shard.tokens, shard.documents)
    count = formats.check_shard(path)
    if count != shard.tokens:
        raise ValueError(f"{path}: {count:,} tokens, dataset.json says {shard.tokens:,}")
    return formats.TokenFile(path, count)


def _shard_problems(folder: Path, shard: Shard, manifest: Manifest, level: str) -> list[str]:
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
        opened = open_shard(folder, shard)
        if level == "full":
            problems += _content_problems(opened, starts, shard, manifest)
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
    """The document starts of a sidecar, for the level full."""
    count = formats.check_docs(folder / docs.file)
    if count != shard.documents:
        raise ValueError(f"{count:,} documents, dataset.json says {shard.documents:,}")
    if level == "fast":
        return None
    data = (folder / docs.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != docs.sha256:
        problems.append(f"{docs.file}: {_DAMAGED}")
    return np.frombuffer(data[formats.DOCS_HEADER_BYTES :], formats.OFFSET).astype(np.int64)


def _content_problems(
    opened: formats.TokenFile | arrow.ArrowShard,
    starts: NDArray[np.int64] | None,
    shard: Shard,
    manifest: Manifest,
) -> list[str]:
    """Read the file once: its hash, what a wrong one may mean for training, what a right one does not rule out."""
    problems: list[str] = []
    if isinstance(opened, arrow.ArrowShard):
        file, rows = opened.file, opened.row_starts()
        if rows[0] != 0 or opened.ids().min() < 0:
            problems.append(f"{shard.file}: row starts or ids that cannot be: damaged")
        starts = rows[opened.rows - shard.documents :]
    else:
        file = opened
    check = _TokenCheck(file.tokens, starts, manifest)
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as source:
        digest.update(source.read(file.start))
        buffer = memoryview(bytearray(_BLOCK))
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            check.add(np.frombuffer(buffer[: count // 2 * 2], formats.TOKEN))
    if digest.hexdigest() != shard.sha256:
        problems.append(f"{shard.file}: {_DAMAGED}")
    if check.bad_id:
        problems.append(f"{shard.file}: {check.bad_id}")
    if starts is not None and not check.documents_fit():
        where = shard.docs.file if shard.docs else shard.file
        problems.append(f"{where}: document offsets do not fit the tokens of {shard.file}")
    return problems


class _TokenCheck:
    """Are all ids in the vocabulary, and the EOTs just where documents start? Passes over what is in cache."""

    def __init__(self, num_tokens: int, starts: NDArray[np.int64] | None, manifest: Manifest) -> None:
        self._left, self._position = num_tokens, 0
        self._vocab_size, self._eot = manifest.vocab_size, manifest.tokenizer["eot"]
        # In order, and all of them in the shard; else a look-up would not find them.
        self._in_order = starts is None or bool((np.diff(starts, prepend=-1, append=num_tokens) > 0).all())
        self._starts = starts if starts is not None and self._in_order else np.empty(0, np.int64)
        self._eots = self._at_starts = 0
        self.bad_id = ""

    def add(self, block: NDArray[np.uint16]) -> None:
        tokens = block[: self._left]  # an Arrow file goes on behind them
        self._left -= len(tokens)
        if not self.bad_id and len(tokens) and int(tokens.max()) >= self._vocab_size:
            at = int(np.argmax(tokens >= self._vocab_size))
            self.bad_id = f"token {self._position + at:,} is {tokens[at]}, not below {self._vocab_size}"
        first, last = np.searchsorted(self._starts, [self._position, self._position + len(tokens)])
        self._eots += int(np.count_nonzero(tokens == self._eot))
        at_starts = tokens[self._starts[first:last] - self._position]
        self._at_starts += int(np.count_nonzero(at_starts == self._eot))
        self._position += len(tokens)

    def documents_fit(self) -> bool:
        """As many EOTs as documents, and each document starts with one: then no EOT is elsewhere."""
        return self._in_order and self._eots == self._at_starts == len(self._starts)
