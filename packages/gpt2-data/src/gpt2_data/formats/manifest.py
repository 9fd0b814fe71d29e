"""dataset.json: what a built dataset is, and its shards."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import tokenizer, vocabulary
from gpt2_data.disk import sha256, write_whole
from gpt2_data.formats import arrow, uint16
from gpt2_data.formats.uint16 import Numbers, TokenFile

FILE_NAME = "dataset.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val")
_PLAIN_NAME = re.compile(r"(?=.*[^.])[A-Za-z0-9._-]+")
_SHARD_NAME = re.compile(r"(train|val)_\d{6,}\.(bin|docs|arrow)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_split(split: str) -> None:
    """Raise ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose {' or '.join(SPLITS)}")


@dataclass(frozen=True)
class Sidecar:
    """The file of document offsets beside a shard."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """What dataset.json says about a shard. Sizes are in bytes."""

    split: str
    file: str
    tokens: int
    documents: int  # that start in it
    bytes: int
    max_token: int
    tokens_sha256: str  # of the tokens alone, without the file's header
    sha256: str
    docs: Sidecar | None  # None for an Arrow shard, whose rows are the documents

    @property
    def files(self) -> list[str]:
        """The names of the shard's files."""
        return [self.file] + ([self.docs.file] if self.docs else [])


class Tokenized:
    """A dataset's description says which tokenizer made its ids; `tokenizer` is as in dataset.json."""

    tokenizer: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary: token ids are below it."""
        return int(self.tokenizer["vocab_size"])

    @property
    def eot(self) -> int:
        """The id that stands before each document."""
        return int(self.tokenizer["eot"])

    @property
    def own_tokenizer(self) -> bool:
        """True if the vocabulary is not GPT-2's, but that of the folder's tokenizer.json."""
        return self.tokenizer.get("name") == vocabulary.FILE_NAME


@dataclass(frozen=True)
class Manifest(Tokenized):
    """dataset.json, which is the same byte for byte in two builds of the same source, order and seed."""

    tokenizer: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    shards: tuple[Shard, ...]

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split, including EOTs."""
        return sum(shard.tokens for shard in self.split(split))

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return sum(shard.documents for shard in self.split(split))

    def split(self, split: str) -> list[Shard]:
        """Return the shards of a split in order. Raises ValueError for an unknown split."""
        check_split(split)
        return [shard for shard in self.shards if shard.split == split]

    @functools.cached_property
    def hash(self) -> str:
        """The SHA-256 of dataset.json in hex, which names the dataset."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return dataset.json, byte for byte."""
        totals = {}
        for split in SPLITS:
            counts = {"tokens": self.tokens(split), "documents": self.documents(split)}
            totals[split] = counts | {"shards": len(self.split(split))}
        content = {"format_version": FORMAT_VERSION, "totals": totals} | dataclasses.asdict(self)
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def load(folder: Path) -> Manifest:
    """Read and check a dataset folder's dataset.json. Raises ValueError or OSError naming it.

    Nothing in it is trusted: file names must be plain, numbers in range, totals the sums of their parts. A
    vocabulary that is neither GPT-2's nor the folder's is refused not here, but by tokenizer_problem.
    """
    path = folder / FILE_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = ", but an unfinished build: run its command again" if (folder / ".build").exists() else ""
        raise ValueError(not_a_dataset(folder, "dataset of gpt2-data", hint)) from None
    try:
        manifest = _parse(json.loads(data))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a valid dataset description: {what}") from None
    if manifest.to_bytes() != data:
        raise ValueError(f"{path}: changed since gpt2-data wrote it: its totals or its layout are different")
    return manifest


def not_a_dataset(folder: Path, what: str, hint: str) -> str:
    """Return the message for a path that is not a dataset; it names a dataset around it or in it."""
    if not folder.exists():
        return f"{folder} is not a dataset: there is no such folder; gpt2-data build --out {folder} makes one"
    if folder.is_file():
        return f"{folder} is a file: name its folder, {folder.parent}"
    if inside := sorted(file.parent for file in folder.glob(f"*/{FILE_NAME}")):
        return f"{folder} is not a dataset but holds one: use {' or '.join(map(str, inside[:3]))}"
    return f"{folder} is not a {what}: there is no {FILE_NAME} in it{hint}"


def _typed(kind: Any, item: Any) -> Any:
    """Make a dataclass instance from JSON, whose values must have the fields' types."""
    record = kind(**item)
    for field in dataclasses.fields(kind):
        value = getattr(record, field.name)
        if not isinstance(value, field.type) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ValueError(f"{field.name} {value!r}")
    return record


def _parse(content: Any) -> Manifest:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this program reads version {FORMAT_VERSION}")
    shards = tuple(
        _typed(Shard, item | {"docs": item["docs"] and _typed(Sidecar, item["docs"])})
        for item in content["shards"]
    )
    manifest = Manifest(content["tokenizer"], content["source"], content["options"], shards)
    vocab_size, eot = manifest.tokenizer["vocab_size"], manifest.tokenizer["eot"]
    if not (isinstance(vocab_size, int) and isinstance(eot, int) and 0 <= eot < vocab_size <= 2**16):
        raise ValueError(f"vocab_size {vocab_size!r} and eot {eot!r}")
    for shard in shards:
        _check_shard(shard, vocab_size)
    files = [name for shard in shards for name in shard.files]
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    return manifest


def _check_shard(shard: Shard, vocab_size: int) -> None:
    hashes = [shard.sha256, shard.tokens_sha256] + ([shard.docs.sha256] if shard.docs else [])
    for problem, ok in (
        ("a file name that is not a plain name", all(map(_PLAIN_NAME.fullmatch, shard.files))),
        (f"split {shard.split!r}", shard.split in SPLITS),
        (f"{shard.tokens:,} tokens", 0 < shard.tokens <= uint16.MAX_SHARD_TOKENS),
        (f"{shard.documents:,} documents", 0 <= shard.documents <= shard.tokens),
        (f"token {shard.max_token} in a vocabulary of {vocab_size}", 0 <= shard.max_token < vocab_size),
        (f"SHA-256 {hashes}", all(map(_SHA256.fullmatch, hashes))),
    ):
        if not ok:
            raise ValueError(f"{shard.file!r}: {problem}")
    if shard.docs:
        sizes = [(uint16.shard_bytes(shard.tokens), uint16.docs_bytes(shard.documents))]
    else:  # a first row may continue a document of the shard before
        rows = {min(max(shard.documents + more, 1), shard.tokens) for more in (0, 1)}
        sizes = [(arrow.shard_bytes(shard.tokens, n), 0) for n in rows]
    if (shard.bytes, shard.docs.bytes if shard.docs else 0) not in sizes:
        raise ValueError(f"{shard.file!r}: sizes that do not fit its counts")


def tokenizer_problem(folder: Path, manifest: Manifest) -> str | None:
    """Return what is wrong if the ids are neither GPT-2's nor those of the tokenizer.json that was built with.

    A model would train on other ids without an error.
    """
    if manifest.own_tokenizer:
        file = folder / vocabulary.FILE_NAME
        if not file.is_file():
            return f"{file.name}: missing: copy the file that the dataset was built with"
        same = sha256(file) == manifest.tokenizer.get("sha256")
        return None if same else f"{file.name}: damaged: its SHA-256 is not the one in {FILE_NAME}"
    theirs, ours = manifest.tokenizer, tokenizer.identity()
    for key in "vocabulary_sha256", "vocab_size", "eot":
        if theirs.get(key) != ours[key]:
            what = f"{key} of {theirs.get('name')!r} is not GPT-2's"
            return f"{FILE_NAME}: foreign tokenizer: {what}: build it again from its text"
    return None


def shard_name(split: str, number: int, format: str) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:06d}{arrow.ENDING if format == 'arrow' else '.bin'}"


def is_shard_name(name: str) -> bool:
    """True if a file of this name in a dataset's folder would pass for one of its shards."""
    return _SHARD_NAME.fullmatch(name) is not None


def open_shard(folder: Path, shard: Shard) -> TokenFile:
    """Open a shard whose size and header must be those of dataset.json. Raises ValueError or OSError."""
    path = folder / shard.file
    if shard.docs is None:
        return arrow.check_shard(path, shard.tokens, shard.documents).file
    file = uint16.check_shard(path)
    if file.tokens != shard.tokens:
        raise ValueError(f"{path}: {file.tokens:,} tokens, {FILE_NAME} says {shard.tokens:,}")
    return file


def open_documents(folder: Path, shard: Shard) -> Numbers:
    """Return where a shard's documents begin, in tokens, after checking the header of the file that says so."""
    if shard.docs is None:
        return arrow.check_shard(folder / shard.file, shard.tokens, shard.documents).documents
    offsets = uint16.check_docs(folder / shard.docs.file)
    if offsets.count != shard.documents:
        raise ValueError(f"{offsets.path}: {offsets.count:,} documents, {FILE_NAME} says {shard.documents:,}")
    return offsets


def write_documents(
    path: Path,
    temporary_folder: Path,
    split: str,
    num_tokens: int,
    chunks: Iterable[NDArray[np.uint16]],
    starts: NDArray[np.integer],
    ids: NDArray[np.int64] | None,
) -> Shard:
    """Write a shard in which documents start at the tokens `starts`: uint16 and its sidecar, or Arrow with `ids`.

    There is one id more than starts if the first row continues the previous document.
    """
    sidecar = None
    if ids is None:
        with write_whole(path.with_suffix(".docs"), temporary_folder) as file:
            docs = uint16.write_docs(file, starts)
        sidecar = Sidecar(path.with_suffix(".docs").name, docs.bytes, docs.sha256)
    with write_whole(path, temporary_folder) as file:
        if ids is None:
            written = uint16.write_shard(file, num_tokens, chunks)
        else:
            rows = np.concatenate([np.zeros(len(ids) - len(starts), np.int64), starts])
            written = arrow.write_shard(file, num_tokens, chunks, rows, ids)
    return Shard(split, path.name, num_tokens, len(starts), **vars(written), docs=sidecar)
