"""Files -> batches of documents as Arrow arrays, in the file's own order and in bounded memory.

A batch is about 4 MB of text, or one document where that is longer; a text file is cut further. Arrow arrays, not
Python strings: the tokenizers take UTF-8, and making a str of each document costs as much as reading Parquet does.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from gpt2_data import tokenizer

BLOCK = 4_000_000  # bytes read at once, and about the text of a batch
_BATCH_PARTS = 4096
_MOST = 2**28  # bytes of a line: a small compressed file may stand for more than any memory holds
_CUT = re.compile(rb"[!-~][ \n]")  # no token spans the place in the middle: see tokenizer.find_cut


@dataclass(frozen=True, slots=True)
class Part:
    """A document or, of one too long to hold, a part: its tokens are those of its parts, one after the other."""

    text: str | None
    replaced: bool = False  # bytes that are not UTF-8 became U+FFFD
    continues: bool = False  # goes on with the document of the part before


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents, or of a long one a part."""

    texts: Any
    """pyarrow string or large_string array: valid UTF-8, no nulls."""
    empty: int
    """Documents without text in it; they are kept."""
    replaced: tuple[int, ...]
    """Which of the texts had bytes that are not UTF-8, or surrogates without a partner: they became U+FFFD."""
    continues: bool = False
    """The only text goes on with the last document of the batch before."""

    @property
    def documents(self) -> int:
        """How many documents begin in it."""
        return len(self.texts) - self.continues

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes."""
        _, offsets = tokenizer.text_buffers(self.texts)
        return int(offsets[-1] - offsets[0])

    def head(self, documents: int) -> "Batch":
        """The first `documents` of it."""
        texts = self.texts.slice(0, documents)
        return Batch(texts, _count_empty(texts), tuple(i for i in self.replaced if i < documents))

    def row(self, i: int) -> "Batch":
        """Document i of it alone."""
        texts = self.texts.slice(i, 1)
        return Batch(texts, _count_empty(texts), (0,) if i in self.replaced else ())


def gather(parts: Iterable[Part]) -> Iterator[Batch]:
    """Parts -> batches. A part that continues a document is a batch of its own."""
    texts: list[str] = []
    replaced: list[int] = []
    characters = 0
    for part in parts:
        text = part.text or ""
        if texts and (part.continues or characters + len(text) > BLOCK or len(texts) >= _BATCH_PARTS):
            yield _batch(texts, replaced)
            texts, replaced, characters = [], [], 0
        if part.replaced:
            replaced.append(len(texts))
        texts.append(text)
        characters += len(text)
        if part.continues:
            yield dataclasses.replace(_batch(texts, replaced), empty=0, continues=True)
            texts, replaced, characters = [], [], 0
    if texts:
        yield _batch(texts, replaced)


def _batch(texts: list[str], replaced: list[int]) -> Batch:
    import pyarrow as pa

    try:
        array = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # surrogates, which JSON can write as "\ud800"
        fixed = [tokenizer.repair_surrogates(text) for text in texts]
        replaced = [i for i, text in enumerate(fixed) if ("\ufffd" in text and text != texts[i]) or i in replaced]
        array = pa.array(fixed, pa.large_string())
    return Batch(array, _count_empty(array), tuple(replaced))


def _count_empty(texts: Any) -> int:
    _, offsets = tokenizer.text_buffers(texts)
    return int(np.count_nonzero(offsets[1:] == offsets[:-1]))


# --- Parquet


def parquet_file(path: str, column: str, file: Any = None) -> Any:
    """Open a Parquet file (pyarrow.parquet.ParquetFile) that has this column of strings, or say why not.

    `file` is what to read it from, if not from `path`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(path if file is None else file, pre_buffer=False)  # a copy less
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {first_line(error)}") from error
    schema = opened.schema_arrow
    if column not in schema.names:
        hint = "" if column != "text" else ": name the column of the text with --column"
        raise ValueError(f"{path}: no column {column!r}; the columns are {', '.join(schema.names)}{hint}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {column!r} holds {kind}, not strings")
    return opened


def read_parquet(path: str, column: str, start: int, stop: int) -> Iterator[Batch]:
    """Row groups [start, stop)."""
    import pyarrow as pa

    with parquet_file(path, column) as file:
        number = file.metadata.schema.names.index(column)
        for group in range(start, stop):
            description = file.metadata.row_group(group)
            size = max(description.column(number).total_uncompressed_size, 1)
            rows = max(1, min(_BATCH_PARTS, BLOCK * description.num_rows // size))
            try:
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                    yield _from_column(batch.column(0))
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path}: row group {group} cannot be read: {first_line(error)}") from error


def _from_column(column: Any) -> Batch:
    import pyarrow as pa

    if column.null_count:
        column = column.fill_null("")
    replaced: tuple[int, ...] = ()
    try:
        column.validate(full=True)  # Arrow does not look at what it stores
    except pa.ArrowInvalid:
        pairs = [_decode(data) for data in column.cast(pa.large_binary()).to_pylist()]
        column = pa.array([text for text, _ in pairs], pa.large_string())
        replaced = tuple(i for i, (_, bad) in enumerate(pairs) if bad)
    return Batch(column, _count_empty(column), replaced)


# --- JSON lines


def open_bytes(path: str) -> BinaryIO:
    """A file for reading, decompressed if its name says so. A cut-short stream raises OSError on reading."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    if codec is None:
        return open(path, "rb")
    import pyarrow as pa

    raw = cast(io.RawIOBase, pa.input_stream(path, compression=codec))
    return cast(BinaryIO, io.BufferedReader(raw, BLOCK))


def is_compressed(path: str) -> bool:
    """Whether the file can be read from its start only."""
    return path.endswith((".gz", ".zst"))


def read_jsonl(path: str, key: str, start: int, stop: int) -> Iterator[Part]:
    """Bytes [start, stop) of the file, both at the starts of lines; stop 0: to the end."""
    number = 0
    with naming(path), open_bytes(path) as file:
        position = start
        if position:
            file.seek(position)
        for line in _lines(file):
            number += 1
            data = line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
            position += len(line)
            if not data.isspace():
                part = _json_part(data, key)
                if isinstance(part, str):
                    raise ValueError(f"{path}:{_lines_before(path, start) + number}: {part}")
                yield part
            if stop and position >= stop:
                return


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_MOST):
        if len(line) == _MOST:
            raise OSError(f"a line of {_MOST:,} bytes or more")
        yield line


def _json_part(line: bytes, key: str) -> Part | str:
    """The document, or what is wrong."""
    text, replaced = _decode(line)
    try:
        row = json.loads(text)
    except ValueError as error:
        return f"not JSON: {first_line(error)}"
    except RecursionError:
        return "nested too deeply"
    if not isinstance(row, dict):
        return f"a JSON object is wanted, this is {type(row).__name__}"
    if key not in row:
        hint = "" if key != "text" else ": name the key of the text with --column"
        return f"no key {key!r}; the keys are {', '.join(row) or '(none)'}{hint}"
    if not isinstance(row[key], str | None):
        return f"{key!r} holds {type(row[key]).__name__}, not a string"
    return Part(row[key], replaced)


def _lines_before(path: str, position: int) -> int:
    """How many lines of the file stand before a byte; counted only to name a faulty one."""
    count = 0
    with open_bytes(path) as file:
        for _ in range(-(-position // BLOCK)):
            count += file.read(min(BLOCK, position - file.tell())).count(b"\n")
    return count


def count_lines(path: str, start: int, stop: int, limit: int) -> int:
    """How many documents bytes [start, stop) of a JSON lines file hold, counted no further than `limit`."""
    count = 0
    with naming(path), open_bytes(path) as file:
        position = start
        if position:
            file.seek(position)
        for line in _lines(file):
            position += len(line)
            count += not line.isspace()
            if count >= limit or (stop and position >= stop):
                break
    return count


# --- text files


def read_text(path: str) -> Iterator[Part]:
    """The file as one document. A long one is cut between a printable ASCII character and the space or newline
    after it: no character and no token spans such a place, so the cut changes nothing."""
    with naming(path), open_bytes(path) as file:
        continues = False
        rest = file.read(BLOCK).removeprefix(codecs.BOM_UTF8)
        while block := file.read(BLOCK):
            searched = max(len(rest) - 1, 0)
            if searched >= _MOST:
                raise OSError(f"no white space in {_MOST:,} bytes")
            rest += block
            cuts = [match.start() + 1 for match in _CUT.finditer(rest, searched)]
            if cuts:
                yield Part(*_decode(rest[: cuts[-1]]), continues=continues)
                continues, rest = True, rest[cuts[-1] :]
        yield Part(*_decode(rest), continues=continues)


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def first_line(error: BaseException) -> str:
    """Of an error's text: Arrow's go on for several."""
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Arrow's errors about a compressed stream do not say of which file; here they do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error
