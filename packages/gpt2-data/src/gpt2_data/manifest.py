"""dataset.json: what a built dataset is; and whether the files beside it are that."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_data import formats

FILE_NAME = "dataset.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SHARD_NAME = re.compile(r"(train|val)_\d{6,}\.(bin|docs|arrow)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_TOKENS = 4_000_000


@dataclass(frozen=True)
class Sidecar:
    """The file of document offsets beside a shard. Sizes in bytes."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One shard: `documents` start in it, `bytes` is the file's size, `tokens_sha256` leaves the header out."""

    split: str
    file: str
    tokens: int
    documents: int
    bytes: int
    max_token: int
    tokens_sha256: str
    sha256: str
    docs: Sidecar


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

    Nothing in it is trusted: file names must be plain, numbers in range, totals the sums of their parts.
    """
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = ", but an unfinished build: run its command again" if (folder / ".build").exists() else ""
        raise ValueError(f"{folder} is not a dataset: there is no {FILE_NAME} in it{hint}") from None
    try:
        manifest = _parse(json.loads(data))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a valid dataset description: {what}") from None
    if manifest.to_bytes() != data:
        raise ValueError(f"{path}: not as gpt2-data wrote it: totals or layout were changed")
    return manifest


def _parse(content: Any) -> Manifest:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this program reads version {FORMAT_VERSION}")
    shards = tuple(
        Shard(**{key: value for key, value in item.items() if key != "docs"}, docs=Sidecar(**item["docs"]))
        for item in content["shards"]
    )
    manifest = Manifest(content["tokenizer"], content["source"], content["options"], shards)
    files = [name for shard in shards for name in (shard.file, shard.docs.file)]
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    vocab_size = manifest.tokenizer["vocab_size"]
    if not _is_count(vocab_size, 2**16):
        raise ValueError(f"vocab_size {vocab_size!r}")
    for shard in shards:
        _check_shard(shard, vocab_size)
    return manifest


def _check_shard(shard: Shard, vocab_size: int) -> None:
    for name in shard.file, shard.docs.file:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or not name.strip("."):
            raise ValueError(f"file name {name!r} is not a plain name")
    if shard.split not in SPLITS:
        raise ValueError(f"{shard.file}: split {shard.split!r}")
    for value in shard.sha256, shard.tokens_sha256, shard.docs.sha256:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise ValueError(f"{shard.file}: SHA-256 {value!r}")
    if not _is_count(shard.tokens, formats.MAX_SHARD_TOKENS) or shard.tokens == 0:
        raise ValueError(f"{shard.file}: {shard.tokens!r} tokens")
    if not _is_count(shard.documents, shard.tokens):
        raise ValueError(f"{shard.file}: {shard.documents!r} documents")
    if not _is_count(shard.max_token, vocab_size - 1):
        raise ValueError(f"{shard.file}: token {shard.max_token!r} in a vocabulary of {vocab_size}")
    if shard.bytes != formats.shard_bytes(shard.tokens) or shard.docs.bytes != formats.docs_bytes(shard.documents):
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


def verify(path: str | Path, level: str = "fast") -> Report:
    """Compare a dataset's files with its dataset.json.

    `fast`: every file is there, with the right size and header, and no shard beside them. `full`: the SHA-256 of
    every file too, ids within the vocabulary, and an EOT at each document's start. Raises ValueError if there is
    no valid dataset.json; what is wrong with the files is in the report.
    """
    if level not in ("fast", "full"):
        raise ValueError(f"level is {level!r}, must be fast or full")
    folder = Path(path)
    manifest = load(folder)
    problems: list[str] = []
    listed = {name for shard in manifest.shards for name in (shard.file, shard.docs.file)}
    for shard in manifest.shards:
        problems += _shard_problems(folder, shard, manifest, level)
    for extra in sorted(entry.name for entry in folder.iterdir() if _SHARD_NAME.fullmatch(entry.name)):
        if extra not in listed:
            problems.append(f"{extra}: not part of this dataset; delete it")
    size = sum(shard.bytes + shard.docs.bytes for shard in manifest.shards)
    return Report(level, len(listed), size, tuple(problems))


def is_shard_name(name: str) -> bool:
    """Whether a file of this name in a dataset folder would pass for one of its shards."""
    return _SHARD_NAME.fullmatch(name) is not None


def _shard_problems(folder: Path, shard: Shard, manifest: Manifest, level: str) -> list[str]:
    problems = []
    checks = (
        (shard.file, shard.tokens, "tokens", formats.check_shard),
        (shard.docs.file, shard.documents, "documents", formats.check_docs),
    )
    for name, expected, what, check in checks:
        try:
            count = check(folder / name)
            if count != expected:
                problems.append(f"{name}: {count:,} {what}, dataset.json says {expected:,}")
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {str(error).removeprefix(f'{folder / name}: ')}")
    if problems or level == "fast":
        return problems
    for name, sha256 in (shard.file, shard.sha256), (shard.docs.file, shard.docs.sha256):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                problems.append(f"{name}: damaged: its SHA-256 is not the one in dataset.json")
    return problems + _token_problems(folder, shard, manifest)


def _token_problems(folder: Path, shard: Shard, manifest: Manifest) -> list[str]:
    """What a wrong hash may mean for training, and what a right one does not rule out."""
    files = formats.TokenFiles([folder / shard.file])
    starts = formats.read_docs(folder / shard.docs.file)
    problems = []
    for start in range(0, shard.tokens, _READ_TOKENS):
        tokens = np.empty(min(_READ_TOKENS, shard.tokens - start), np.uint16)
        files.read_into(tokens, 0, start)
        if int(tokens.max()) >= manifest.vocab_size:
            at = int(np.argmax(tokens >= manifest.vocab_size))
            problems.append(f"{shard.file}: token {start + at:,} is {tokens[at]}, not below {manifest.vocab_size}")
            break
        here = starts[(starts >= start) & (starts < start + len(tokens))] - start
        if not np.array_equal(np.flatnonzero(tokens == manifest.tokenizer["eot"]), here):
            problems.append(f"{shard.docs.file}: document offsets do not fit the tokens of {shard.file}")
            break
    files.close()
    return problems
