"""Where documents come from: `expand` turns a SOURCE into files, `read` turns a work unit into documents.

A source is read one unit at a time (plan.py cuts them), as a stream of batches in the source's own order. A new
kind of file needs an entry in ENDINGS, a branch in _parts, a reader in files.py, and a cut in plan.py.
"""

import glob
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2_data.sources import files, pydocs
from gpt2_data.sources.files import Batch, Part

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz")
KNOWN = (
    "fineweb-edu, fineweb, hf:REPO[@REVISION][:CONFIG[:SPLIT]], tinyshakespeare, pydocs, "
    f"and files or globs ending in {' '.join(ENDINGS)}"
)


@dataclass(frozen=True)
class Unit:
    """A piece of work: a range of one source's documents. What is in it depends on the source alone.

    Attributes:
        kind: parquet, jsonl, txt, pydocs, tinyshakespeare or stream.
        files: one path, several for txt; for stream, the Listing of the hub's files as JSON.
        start: first row group (parquet), byte (jsonl), shard (stream) or document (pydocs).
        stop: one past the last; 0 means the end.
        limit: read no more than this many documents.
        documents: how many there are, including empty ones; None if only reading would tell.
        text_bytes: the approximate size of the text, for progress and estimates.
    """

    index: int
    kind: str
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0
    limit: int | None = None
    documents: int | None = None
    text_bytes: int = 0
    column: str = "text"

    @property
    def name(self) -> str:
        """The unit's name in messages."""
        if self.kind == "stream":
            return f"unit {self.index} (shard {self.start} of the stream)"
        what = {"parquet": "row groups", "jsonl": "bytes"}.get(self.kind, "documents")
        where = f", {what} {self.start:,} to {self.stop:,}" if self.stop else ""
        files = self.files[0] + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        return f"unit {self.index} ({files}{where})"


def expand(source: str) -> list[tuple[str, str]]:
    """Return (kind, path) of each file of a SOURCE, globs sorted. Raises ValueError naming what is wrong."""
    if source in ("pydocs", "tinyshakespeare"):
        return [(source, source)]
    if os.path.isdir(source):
        raise ValueError(f"{source} is a folder: name the files in it, as in '{source.rstrip('/')}/*.parquet'")
    kind = next((ending.split(".")[1] for ending in ENDINGS if source.endswith(ending)), None)
    if kind is None:
        raise ValueError(f"unknown source {source!r}: choose from {KNOWN}")
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise ValueError(f"no file matches {source!r}")
    for path in paths:  # reading a pipe would wait; a device such as /dev/zero never ends
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is not a regular file")
    return [(kind, path) for path in paths]


def read(unit: Unit) -> Iterator[Batch]:
    """Yield the documents of a unit. Raises ValueError or OSError that names the file, and in JSON the line."""
    if unit.kind == "parquet":
        batches = files.read_parquet(unit.files[0], unit.column, unit.start, unit.stop)
    else:
        batches = files.gather(_parts(unit))
    remaining = unit.limit
    for batch in batches:
        if remaining is not None:
            if batch.documents >= remaining:
                yield batch.rows(0, remaining)
                return
            remaining -= batch.documents
        yield batch


def _parts(unit: Unit) -> Iterator[Part]:
    path = unit.files[0]
    if unit.kind == "jsonl":
        yield from files.read_jsonl(path, unit.column, unit.start, unit.stop)
    elif unit.kind == "txt":
        for path in unit.files:
            yield from files.read_text(path)
    elif unit.kind == "pydocs":
        yield from (Part(text) for _, text in pydocs.documents()[unit.start : unit.stop])
    elif unit.kind == "tinyshakespeare":  # documents as llm.c has them: between blank lines, with the blank line
        texts = Path(path).read_text(encoding="utf-8").split("\n\n")
        for i, text in enumerate(texts, 1):
            yield Part(text + "\n\n" * (i < len(texts)))
    else:
        from gpt2_data.sources import hub  # takes half a second to import, and is only needed here

        listing = hub.Listing.from_json(json.loads(path))
        yield from map(Part, hub.stream(listing, unit.start, unit.column))


def document_name(unit: Unit, number: int) -> str:
    """Say, for a message, where the unit's document `number`, counted from 0, is."""
    path = unit.files[0]
    if unit.kind == "parquet":
        rows = sum(rows for rows, _ in files.row_groups(path, unit.column)[: unit.start])
        return f"{path}: row {rows + number:,}, counted from 0"
    if unit.kind == "txt" and number < len(unit.files):
        return unit.files[number]
    return f"{unit.name}: document {number:,} of it, counted from 0"
