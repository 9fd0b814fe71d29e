"""Where a task's file comes from: a path, the web, or a dataset on the Hugging Face hub; and what is in it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2_data.sources import hub, web
from gpt2_data.sources.download import download_file as fetch

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A file that published numbers are on.

    Attributes:
        source: an address, or hf:REPO:CONFIG:SPLIT.
        name: of the file in the cache.
        sha256: in hex; None where only the hub's own record of it is known.
    """

    source: str
    name: str
    sha256: str | None = None


def have(published: Published, path: str | None = None) -> tuple[Path, str]:
    """The file at `path`, or the published one, downloaded once into the user's cache; and its SHA-256.

    Raises:
        FileNotFoundError: no file at `path`.
        OSError: no download; says how to do without.
        ValueError: the dataset on the hub is not as it was.
    """
    if path is not None:
        file = Path(path)
        if file.is_dir():
            raise ValueError(f"{path} is a folder: name a file")
        if not file.is_file():
            raise FileNotFoundError(f"no file {path}")
        return file, _sha256(file)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-eval"
    file = cache / published.name
    if published.sha256 is not None and file.is_file() and _sha256(file) == published.sha256:
        return file, published.sha256
    try:
        file = _download(published, cache)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{error}; or download {published.source} by hand and give it as --data") from error
    return file, _sha256(file)


def _download(published: Published, cache: Path) -> Path:
    source = hub.parse(published.source)
    if source is None:
        size = web.size_of(published.source)
        return fetch(
            web.WebFile(published.source, published.name, size, published.sha256),
            cache,
            unreachable=web.UNREACHABLE,
        )
    files = hub.list_files(source).files
    if len(files) != 1:
        raise ValueError(f"{published.source} has {len(files)} files on the hub now, not one: give --data FILE")
    return fetch(files[0], cache / source.repo.replace("/", "--"), unreachable=web.UNREACHABLE)


def short_hash(*parts: object) -> str:
    """16 hex digits that tell one item from another: of SHA-256 of the parts as JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_items(path: Path, parse: Callable[[dict[str, Any]], T], limit: int | None = None) -> tuple[list[T], int]:
    """What `parse` makes of a .jsonl or .parquet file's records, or of the first `limit`; and how many it has.

    Raises:
        ValueError: a line that is not a JSON object, a record that `parse` raises a ValueError for, a file that is
            no Parquet, or holds nothing. Says what is wrong with the first, as FILE:7, and counts them.
    """
    items, wrong, total = list[T](), list[str](), 0
    for where, line in _lines(path):
        total += 1
        try:
            record = _json_object(line) if isinstance(line, bytes) else line
            if limit is None or total <= limit:
                items.append(parse(record))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1:,} more of {total:,} records)" if wrong[1:] else ""))
    if not total:
        raise ValueError(f"{path} holds no items")
    return items, total


def _lines(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no good Parquet file: {error}") from None
        for number, record in enumerate(records, 1):
            yield f"{path}: row {number}", record
        return
    # At b"\n" alone: str.splitlines would cut at U+2028 and others, which stand inside JSON strings.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record
