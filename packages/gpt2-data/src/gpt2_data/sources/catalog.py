"""Where documents come from: `expand` turns a SOURCE into files, `read` turns a work unit into documents.

A source is read one unit at a time (plan.py cuts them), as a stream of batches in the source's own order. A new
kind of file needs an entry in KINDS, a branch in _parts, a reader in files.py, and a cut in plan.py.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2_data.sources import files, opening, pydocs
from gpt2_data.sources.files import Batch, Part

_TABLES = {"parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "tsv": "csv"}
_TEXT = "txt text md markdown rst tex org"
_CODE = "py pyi c h cc cpp hpp cu java js jsx ts tsx go rs rb php sh sql r jl lua pl scala swift kt cs hs"
KINDS = _TABLES | dict.fromkeys(f"{_TEXT} {_CODE}".split(), "txt")  # by the ending of a file's name
TAKEN = (
    f".{' .'.join([*_TABLES, *_TEXT.split()])}, source code such as .py .c .js, "
    f"and all but .parquet also with {' '.join(opening.COMPRESSED)}"
)
KNOWN = (
    "fineweb-edu, fineweb, hf:REPO[@REVISION][:CONFIG[:SPLIT]], tinyshakespeare, pydocs, "
    f"and folders, files or globs of {TAKEN}"
)
_ONE_OBJECT = "one JSON object, not an array of them or one a line"
_UNKNOWN = "of no known kind"
_POINTERS = {
    b"version https://git-lfs.github.com/spec/v1": "a git-lfs pointer, not the file: run git lfs pull",
    b"version https://hawser.github.com/spec/v1": "a git-lfs pointer, not the file: run git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the file: run git annex get",
}


@dataclass(frozen=True)
class Unit:
    """A piece of work: a range of one source's documents. What is in it depends on the source alone.

    Attributes:
        kind: parquet, jsonl, json, csv, txt, pydocs, tinyshakespeare or stream.
        files: one path, several for txt; for stream, the Listing of the hub's files as JSON.
        start: first row group (parquet), byte (jsonl), shard (stream) or document (pydocs).
        stop: one past the last; 0 means the end.
        limit: read no more than this many documents.
        documents: how many there are, including empty ones; None if only reading would tell.
        text_bytes: the approximate size of the text, for progress and estimates.
        column: of Parquet and CSV, or the key of the text in JSON.
        encoding: of text files without a byte order mark; None: UTF-8.
        split_on: what stands between the documents of a txt file; None: it is one document.
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
    encoding: str | None = None
    split_on: str | None = None

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
    """Return (kind, path) of each file of a SOURCE, sorted if it is a glob or a folder.

    Raises ValueError naming what is wrong.
    """
    return find_files(source)[0]


def find_files(source: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what `expand` does, and what it leaves out of a folder and why, but for hidden files."""
    if source in ("pydocs", "tinyshakespeare"):
        return [(source, source)], []
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        if _ending(source) in KINDS or glob.has_magic(source):
            raise ValueError(f"no file matches {source!r}")
        raise ValueError(f"unknown source {source!r}: choose from {KNOWN}")
    found, others = [], list[str]()
    # A glob may match a folder and also the files in it.
    seen = {os.path.realpath(path) for path in paths if not os.path.isdir(path)}
    for path in paths:
        if os.path.isdir(path) and (path == source or _ending(path) not in KINDS):
            some, more = _walk(path, seen)
            found += some
            others += more
            continue
        # Reading a pipe would wait; a device such as /dev/zero never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is not a regular file")
        if (kind := _kind(path)) is None:
            if _ending(path) == "json":
                raise ValueError(f"{path} is {_ONE_OBJECT}")
            raise ValueError(f"{path} is of a kind that is not taken: taken are {TAKEN}")
        found.append((kind, path))
    if not found:
        what = "is a folder with" if os.path.isdir(source) else "matches"
        why = [f"passed over: {files.some(others)}"] if others else []
        if not others or any(_UNKNOWN in other for other in others):
            why.append(f"taken are {TAKEN}")
        raise ValueError(f"{source} {what} no file that is taken: {'; '.join(why)}")
    return found, others


def _walk(folder: str, seen: set[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (kind, path) of a folder's files, sorted, and the paths of others with the reason.

    Links are followed, and no file is taken twice: `seen` are the true paths of those that were. Hidden files and
    folders, and datasets, are passed over.
    """

    def stop(error: OSError) -> None:
        raise error

    paths, others = [], []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        is_dataset = {"dataset.json", "build.jsonl"} <= set(names)
        if is_dataset:
            others.append(f"{os.path.join(root, '')} (a dataset)")
        if is_dataset or os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted((name for name in folders if name[0] != "."), key=os.fsencode)
        paths += [os.path.join(root, name) for name in names if name[0] != "."]
    found = []
    for path in sorted(paths, key=os.fsencode):
        kind = _kind(path) if os.path.isfile(path) else None
        if kind is None:
            reason = "no regular file" if os.path.exists(path) else "a link to nothing"
            if os.path.isfile(path):
                reason = _ONE_OBJECT if _ending(path) == "json" else _UNKNOWN
            others.append(f"{path} ({reason})")
        elif (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            found.append((kind, path))
    return found, others


def _ending(path: str) -> str:
    """Return what a file's name says of its kind: "txt" of a.TXT.gz."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    inner = os.path.splitext(stem)[1] if ending in opening.COMPRESSED else ending
    return "" if inner == ".parquet" != ending else inner[1:]


def _kind(path: str) -> str | None:
    """Return a file's kind; None if it is of no known kind. Raises ValueError if it is a pointer of git."""
    kind = KINDS.get(_ending(path))
    if kind is not None and os.path.getsize(path) < 1024:
        with open(path, "rb") as file:
            start = file.read(64)
        for pointer, what in _POINTERS.items():
            if start.startswith(pointer):
                raise ValueError(f"{path} is {what}")
    if kind == "json":
        with opening.open_bytes(path) as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf\xfe\xff\0 \t\r\n")
        if not start.startswith(b"["):  # C4's .json has JSON lines; `{` alone begins one object of many lines
            kind = None if re.match(rb"\{\0*[ \t\0]*[\r\n]", start) else "jsonl"
    return kind


def read(unit: Unit) -> Iterator[Batch]:
    """Yield the documents of a unit. Raises ValueError or OSError that names the file, and in JSON the line."""
    if unit.kind == "parquet":
        batches = files.read_parquet(unit.files[0], unit.column, unit.start, unit.stop)
    else:
        batches = files.gather(_parts(unit))
    remaining = unit.limit
    for batch in batches:
        if remaining is not None and not batch.continues:
            if remaining == 0:
                return
            more = batch.documents - remaining
            batch = batch.rows(0, min(remaining, batch.documents))
            remaining -= batch.documents
            if more > 0 or (remaining == 0 and unit.kind != "txt"):  # the rest of a long text may follow
                yield batch
                return
        yield batch


def stands_in(separator: str, paths: list[str], encoding: str | None) -> bool:
    """True if the separator stands in one of these text files; they are read until then."""
    parts = (part for path in paths for part in files.read_text(path, encoding, separator, keep=True))
    return any((part.text or "").endswith(separator) for part in parts)


def _parts(unit: Unit) -> Iterator[Part]:
    path = unit.files[0]
    if unit.kind == "jsonl":
        yield from files.read_jsonl(path, unit.column, unit.start, unit.stop, unit.encoding)
    elif unit.kind == "json":
        yield from files.read_json(path, unit.column, unit.encoding)
    elif unit.kind == "csv":
        yield from files.read_csv(path, unit.column, unit.encoding)
    elif unit.kind == "txt":
        for path in unit.files:
            yield from files.read_text(path, unit.encoding, unit.split_on or "")
    elif unit.kind == "pydocs":
        yield from (Part(text) for _, text in pydocs.documents()[unit.start : unit.stop])
    elif unit.kind == "tinyshakespeare":  # documents as llm.c has them: between blank lines, with the blank line
        yield from files.read_text(path, separator="\n\n", keep=True)
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
    if unit.kind == "txt" and unit.split_on is None and number < len(unit.files):
        return unit.files[number]
    return f"{unit.name}: document {number:,} of it, counted from 0"
