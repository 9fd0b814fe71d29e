"""Where a task's file comes from (a path, the web, a dataset on the Hugging Face hub), and the records in it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2_data import fetch
from gpt2_model.command import LFS_POINTERS, cache_folder, sha256

T = TypeVar("T")
Fields = Mapping[str, type | None]  # of a record: see `check_fields`
BOM = b"\xef\xbb\xbf"  # with which editors of Windows begin a file


@dataclass(frozen=True)
class Published:
    """A file that published numbers are computed on."""

    source: str  # an address, or hf:REPO:CONFIG:SPLIT
    sha256: str | None = None  # in hex; None if only the hub records it
    items: int = 0  # records in it

    def doubt(self, sha256: str, items: int, own: bool) -> str:
        """Say why a file is not the published one, "" if it is; `own` is True if it is the user's."""
        if sha256 == self.sha256 or (items == self.items and self.sha256 is None and not own):
            return ""
        if items != self.items:
            return f"Not the published file (SHA-256 {sha256[:12]}…), which has {self.items:,} items"
        return f"Not {'known to be ' * (self.sha256 is None)}the published file (SHA-256 {sha256[:12]}…)"


def find_file(published: Published, path: str | Path | None = None) -> tuple[Path, str]:
    """Return the file at `path`, or the published one, downloaded once into the user's cache; and its SHA-256.

    An OSError says that there is no such file, or that the download failed and what to do instead.
    """
    if path is not None:
        path = Path(os.path.expanduser(path))
        return path, sha256(path)
    cache = cache_folder("gpt2-eval")
    if cache is None:
        raise OSError(f"there is no home folder to keep {published.source} in: set XDG_CACHE_HOME, or give --data")
    try:
        file = fetch(published.source, cache, sha256=published.sha256)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # an error of the disk
            raise
        advice = f"Or download {published.source} yourself and give it as --data"
        raise OSError(f"{str(error).rstrip('.')}. {advice}") from error
    return file, sha256(file)


def short_hash(*parts: object) -> str:
    """Return 16 hex digits that tell one item from another: SHA-256 of the parts as JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_items(
    path: Path, parse: Callable[[dict[str, Any]], T], limit: int | None = None, fields: Fields | None = None
) -> tuple[list[T], int]:
    """Parse the records of a .jsonl or .parquet file, or the first `limit`; return them and how many the file has.

    A record that lacks `fields` (see `check_fields`), or on which `parse` fails, is wrong. A ValueError names the
    first one, as FILE:7, with the fields that are wanted and those that are there, and counts all wrong ones.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    items, wrong, total = list[T](), list[str](), 0
    for where, record in _records(path):
        total += 1
        try:
            if isinstance(record, bytes):
                record = json.loads(record)
            if limit is None or total <= limit or not isinstance(record, dict):
                check_fields(record, fields or {})
                items.append(parse(record))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            wrong.append(f"{where}: not JSON: {error}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            here = f" (here: {', '.join(map(str, record))[:200] or 'none'})" if isinstance(record, dict) else ""
            wanted = f", whose fields are {', '.join(fields)}{here}" if fields else ""
            why = f"no {error}" if isinstance(error, KeyError) else error
            wrong.append(f"{where}: not a record of this task{wanted}: {why}")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1:,} more of {total:,} records)" if wrong[1:] else ""))
    if not total:
        raise ValueError(f"{path} holds no items")
    return items, total


def check_fields(record: Any, fields: Fields) -> None:
    """Check that a record has these fields, choices.text within choices, of these kinds.

    A kind is str, int (also written as text, as the hub's copies of some tasks have it), list (of texts) or None,
    which is not looked at. A KeyError or ValueError names the first field that is not so.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, not a JSON object")
    for name, kind in fields.items():
        value: Any = record
        for part in name.split(".") if kind is not None else ():
            if not isinstance(value, dict) or part not in value:
                raise KeyError(name)
            value = value[part]
        texts = value if kind is list else [value] if kind is str else []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is not {'text' if kind is str else 'a list of texts'}")
        for text in texts:
            text.encode()  # JSON can write half a surrogate pair: UnicodeEncodeError is a ValueError
        if kind is int and type(value) is not int and not (isinstance(value, str) and value.isdecimal()):
            raise ValueError(f"{name} {value!r} is not a whole number")


def read_bytes(path: Path) -> bytes:
    """Return a file's content, without an editor's byte order mark; a ValueError says that it lies elsewhere."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTERS):
        raise ValueError(f"{path} is a git-lfs pointer in the file's place: run `git lfs pull` where it is from")
    return content.removeprefix(BOM)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_bytes(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(pa.BufferReader(content)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        for number, record in enumerate(records, 1):
            yield f"{path}: row {number}", record
        return
    # Split at b"\n" alone: str.splitlines would also split at U+2028 and others, which JSON strings may contain.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line
