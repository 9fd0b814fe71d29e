"""Where documents come from: local files, and what every Python carries.

A source is read one work unit at a time (plan.py cuts them), as a stream of `Part`s, so that no big file is ever
held whole. Every reader yields the documents in the source's own order.
"""

import codecs
import contextlib
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gpt2_data import pydocs

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".txt": "txt",
    ".txt.gz": "txt",
}
KNOWN = f"pydocs, and files or globs ending in {' '.join(KINDS)}"

_BLOCK = 4_000_000  # bytes read at once
_ROWS = 256  # rows decoded at once
_MOST = 2**30  # bytes of a line: a small compressed file may stand for more than any memory holds


@dataclass(frozen=True, slots=True)
class Part:
    """A document or, of one too long to hold, a part: its tokens are those of its parts, one after the other."""

    text: str | None
    replaced: bool = False  # bytes that are not UTF-8 became U+FFFD
    continues: bool = False  # goes on with the document of the part before


@dataclass(frozen=True)
class Unit:
    """A piece of work: a range of one source's documents. What is in it depends on the source alone."""

    index: int
    kind: str  # pydocs, parquet, jsonl or txt
    files: tuple[str, ...]  # one, but for txt
    start: int = 0  # first row group (parquet), byte (jsonl) or document (pydocs)
    stop: int = 0  # behind the last; 0: to the end
    limit: int | None = None  # read no more than this many documents
    documents: int | None = None  # how many there are, empty ones counted, if that is known without reading
    text_bytes: int = 0  # about how much text, for progress and estimates

    @property
    def name(self) -> str:
        """For messages."""
        what = {"parquet": "row groups", "jsonl": "bytes", "txt": "files", "pydocs": "documents"}[self.kind]
        where = f", {what} {self.start:,} to {self.stop:,}" if self.stop else ""
        files = self.files[0] + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        return f"unit {self.index} ({files}{where})"


def expand(sources: tuple[str, ...]) -> list[tuple[str, str]]:
    """SOURCE arguments -> (kind, path) in order; globs expand sorted. Raises ValueError naming what is wrong."""
    found: list[tuple[str, str]] = []
    for source in sources:
        if source == "pydocs":
            found.append(("pydocs", "pydocs"))
            continue
        if os.path.isdir(source):
            raise ValueError(f"{source} is a folder: name the files in it, as in '{source.rstrip('/')}/*.parquet'")
        kind = _kind(source)
        if kind is None:
            raise ValueError(f"unknown source {source!r}: known are {KNOWN}")
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            raise ValueError(f"no file matches {source!r}")
        found += [(kind, path) for path in paths]
    seen: set[str] = set()
    for _, path in found:
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{path} is named twice: its documents would stand twice in the dataset")
        seen.add(real)
    return found


def _kind(path: str) -> str | None:
    return next((kind for ending, kind in KINDS.items() if path.endswith(ending)), None)


def sha256_of(kind: str, path: str) -> str:
    """The content hash that dataset.json records of an input."""
    if kind == "pydocs":
        return pydocs.sha256()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(unit: Unit) -> Iterator[Part]:
    """The documents of a unit. Raises ValueError or OSError that names the file, and in JSON the line."""
    parts = _READERS[unit.kind](unit)
    if unit.limit is None:
        yield from parts
        return
    left = unit.limit
    for part in parts:
        left -= not part.continues
        if left < 0:
            return
        yield part


def _read_pydocs(unit: Unit) -> Iterator[Part]:
    for _, text in pydocs.documents()[unit.start : unit.stop]:
        yield Part(text)


# --- Parquet


def parquet_file(path: str) -> Any:
    """Open a Parquet file (pyarrow.parquet.ParquetFile) that has a string column `text`, or say why not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise ValueError(f"{path}: no column 'text'; the columns are {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column 'text' holds {kind}, not strings")
    return file


def _read_parquet(unit: Unit) -> Iterator[Part]:
    import pyarrow as pa

    path = unit.files[0]
    with parquet_file(path) as file:
        try:
            for group in range(unit.start, unit.stop):
                batches = file.iter_batches(_ROWS, row_groups=[group], columns=["text"], use_threads=False)
                for batch in batches:
                    yield from _column_parts(batch.column(0))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: row group {group} cannot be read: {_first_line(error)}") from error


def _column_parts(column: Any) -> Iterator[Part]:
    import pyarrow as pa

    try:
        for text in column.to_pylist():
            yield Part(text)
    except UnicodeDecodeError:  # raised before the first yield: Arrow does not look at what it stores
        for data in column.cast(pa.large_binary()).to_pylist():
            yield Part(None) if data is None else Part(*_decode(data))


# --- JSON lines


def open_bytes(path: str) -> BinaryIO:
    """A file for reading, decompressed if its name says so. A cut-short stream raises OSError on reading."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    if codec is None:
        return open(path, "rb")
    import pyarrow as pa

    raw = cast(io.RawIOBase, pa.input_stream(path, compression=codec))
    return cast(BinaryIO, io.BufferedReader(raw, _BLOCK))


def is_compressed(path: str) -> bool:
    """Whether the file can be read from its start only."""
    return path.endswith((".gz", ".zst"))


def _read_jsonl(unit: Unit) -> Iterator[Part]:
    path = unit.files[0]
    number = 0
    with _naming(path), open_bytes(path) as file:
        position = unit.start
        if position:
            file.seek(position)
        for line in _lines(file):
            number += 1
            first = position == 0
            position += len(line)
            data = line.removeprefix(codecs.BOM_UTF8) if first else line
            if not data.isspace():
                yield _json_part(data, unit, number)
            if unit.stop and position >= unit.stop:
                return


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_MOST):
        if len(line) == _MOST:
            raise OSError(f"a line of {_MOST:,} bytes or more")
        yield line


def _json_part(line: bytes, unit: Unit, number: int) -> Part:
    text, replaced = _decode(line)
    try:
        row = json.loads(text)
        problem = None
    except ValueError as error:
        row, problem = None, f"not JSON: {_first_line(error)}"
    except RecursionError:
        row, problem = None, "nested too deeply"
    if problem is None and not isinstance(row, dict):
        problem = f"a JSON object is wanted, this is {type(row).__name__}"
    elif problem is None and "text" not in row:
        problem = f"no key 'text'; the keys are {', '.join(row) or '(none)'}"
    elif problem is None and not isinstance(row["text"], str | None):
        problem = f"'text' holds {type(row['text']).__name__}, not a string"
    if problem is not None:
        raise ValueError(f"{unit.files[0]}:{_lines_before(unit) + number}: {problem}")
    return Part(row["text"], replaced)


def _lines_before(unit: Unit) -> int:
    """How many lines of the file stand before the unit; counted only to name a faulty one."""
    count = 0
    with open_bytes(unit.files[0]) as file:
        for _ in range(-(-unit.start // _BLOCK)):
            count += file.read(min(_BLOCK, unit.start - file.tell())).count(b"\n")
    return count


def count_lines(unit: Unit, limit: int) -> int:
    """How many documents a jsonl unit holds, counted no further than `limit`."""
    path, count = unit.files[0], 0
    with _naming(path), open_bytes(path) as file:
        position = unit.start
        if position:
            file.seek(position)
        for line in _lines(file):
            position += len(line)
            count += not line.isspace()
            if count >= limit or (unit.stop and position >= unit.stop):
                break
    return count


# --- text files


def _read_txt(unit: Unit) -> Iterator[Part]:
    for path in unit.files:
        with _naming(path), open_bytes(path) as file:
            yield from _text_parts(file)


def _text_parts(file: BinaryIO) -> Iterator[Part]:
    """One document. A long one is cut before a newline that follows a printable ASCII character.

    No character and no token spans such a place (see tokenizer.split_text), so the cut changes nothing.
    """
    continues = False
    rest = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
    while block := file.read(_BLOCK):
        searched = max(len(rest) - 1, 0)
        if searched >= _MOST:
            raise OSError(f"no end of a line in {_MOST:,} bytes")
        rest += block
        cuts = [match.start() + 1 for match in re.finditer(rb"[!-~]\n", rest[searched:])]
        if cuts:
            cut = searched + cuts[-1]
            yield Part(*_decode(rest[:cut]), continues=continues)
            continues, rest = True, rest[cut:]
    yield Part(*_decode(rest), continues=continues)


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Arrow's errors about a compressed stream do not say of which file; here they do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path}: cannot be read: {_first_line(error)}") from error


_READERS = {"pydocs": _read_pydocs, "parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
