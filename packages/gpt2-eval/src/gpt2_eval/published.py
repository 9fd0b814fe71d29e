"""Where a task's file comes from (a path, the web, a dataset on the Hugging Face hub), and the records in it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2_data import fetch
from gpt2_model.command import cache_folder, sha256

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A file that published numbers are computed on."""

    source: str  # an address, or hf:REPO:CONFIG:SPLIT
    sha256: str | None = None  # in hex; None if only the hub records it


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


def read_items(path: Path, parse: Callable[[dict[str, Any]], T], limit: int | None = None) -> tuple[list[T], int]:
    """Parse the records of a .jsonl or .parquet file, or the first `limit`; return them and how many the file has.

    A record on which `parse` fails is wrong. A ValueError names the first one, as FILE:7, and counts them all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    items, wrong, total = list[T](), list[str](), 0
    for where, record in _records(path):
        total += 1
        try:
            if isinstance(record, bytes):
                record = json.loads(record)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
            if limit is None or total <= limit:
                items.append(parse(record))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            wrong.append(f"{where}: not JSON: {error}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            wrong.append(f"{where}: not a record of this task: {why}")
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1:,} more of {total:,} records)" if wrong[1:] else ""))
    if not total:
        raise ValueError(f"{path} holds no items")
    return items, total


def _records(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            records = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        for number, record in enumerate(records, 1):
            yield f"{path}: row {number}", record
        return
    # Split at b"\n" alone: str.splitlines would also split at U+2028 and others, which JSON strings may contain.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line
