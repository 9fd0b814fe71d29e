"""Files read as batches of documents in Arrow arrays, in the file's own order and in bounded memory.

A batch is about 4 MB of text, or one document where that is longer; a text file is cut further. Arrow arrays, not
Python strings: the tokenizers take UTF-8, and making a str of each document costs as much as reading Parquet does.
"""

import codecs
import csv
import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpt2_data import tokenizer
from gpt2_data.sources.opening import first_line, open_bytes, open_text

BLOCK = 4_000_000  # bytes read at once, and about the text of a batch
_BATCH_PARTS = 4096
MAX_LINE = 1 << 27  # bytes; a small compressed file may expand to more than fits in memory
_LONG_LINE = 1 << 24  # bytes; in a longer line, no more than this many may be outside of strings
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_READ = 1 << 20  # bytes of a compressed column read at once
_SHOWN = 300  # characters of a list in a message; a file may have any number of columns
_SPACE = re.compile(r"[ \t\r\n]*+")


class Part(NamedTuple):
    """A document, or a part of one that is too long to hold in memory. The fields are those of a Batch."""

    text: str | None
    replaced: bool = False
    continues: bool = False
    path: str | None = None  # of its file, if it is replaced and its unit has several files


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents, or one part of a long document.

    Attributes:
        texts: pyarrow string or large_string array: valid UTF-8, no nulls.
        replaced: texts in which bytes that are not UTF-8, or surrogates without a partner, became U+FFFD.
        continues: True if the only text belongs to the last document of the batch before.
        replaced_in: the files of such texts, if the unit has several.
    """

    texts: Any
    replaced: tuple[int, ...]
    continues: bool = False
    replaced_in: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """The number of documents that begin in it."""
        return len(self.texts) - self.continues

    @property
    def empty(self) -> int:
        """The number of documents without text; they are kept."""
        _, offsets = tokenizer.text_buffers(self.texts)
        return 0 if self.continues else int(np.count_nonzero(np.diff(offsets) == 0))

    @property
    def text_bytes(self) -> int:
        """The bytes of all texts in UTF-8."""
        return len(tokenizer.text_buffers(self.texts)[0])

    def rows(self, start: int, stop: int) -> "Batch":
        """Return a batch of its documents [start, stop)."""
        replaced = tuple(i - start for i in self.replaced if start <= i < stop)
        return Batch(self.texts.slice(start, stop - start), replaced, self.continues, self.replaced_in)


def gather(parts: Iterable[Part]) -> Iterator[Batch]:
    """Yield parts in batches. A part that continues a document is a batch of its own."""
    some: list[Part] = []
    characters = 0
    for part in parts:
        size = len(part.text or "")
        full = characters + size > BLOCK or len(some) >= _BATCH_PARTS
        if some and (full or part.continues or some[0].continues):
            yield _batch(some)
            some, characters = [], 0
        some.append(part)
        characters += size
    if some:
        yield _batch(some)


def join(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield the batches with each document whole, unless it has over `most` bytes."""
    import pyarrow as pa

    held: list[Batch] = []
    for batch in itertools.chain(batches, [None]):
        if batch is not None and batch.continues and sum(one.text_bytes for one in held) <= most:
            held.append(batch)
            continue
        if len(held) > 1:
            texts = held[0].texts.to_pylist()
            texts[-1] += "".join(part.texts[0].as_py() for part in held[1:])
            last = {len(texts) - 1} if any(part.replaced for part in held[1:]) else set()
            held = [Batch(pa.array(texts, pa.large_string()), tuple(sorted(last.union(held[0].replaced))))]
        yield from held
        held = [] if batch is None else [batch]


def _batch(parts: list[Part]) -> Batch:
    import pyarrow as pa

    texts = [part.text or "" for part in parts]
    replaced = {i for i, part in enumerate(parts) if part.replaced}
    try:
        array = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # surrogates, which JSON can write as "\ud800"
        fixed = [tokenizer.repair_surrogates(text) for text in texts]
        replaced |= {i for i, text in enumerate(fixed) if "\ufffd" in text and text != texts[i]}
        array = pa.array(fixed, pa.large_string())
    paths = dict.fromkeys(part.path for part in parts if part.path is not None)
    return Batch(array, tuple(sorted(replaced)), parts[0].continues, tuple(paths))


def open_parquet(source: Any, column: str, name: str = "") -> Any:
    """Open a Parquet file, or a file object that errors call `name`; it must have this column of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = name or source
    try:
        if isinstance(source, str):  # Arrow takes a name that is not UTF-8 as bytes only
            source = pa.OSFile(os.fsencode(source))
        # The column of a row group is read in pieces, since it may be gigabytes.
        file = pq.ParquetFile(source, buffer_size=_READ, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{name}: not a readable Parquet file: {first_line(error)}") from error
    if column not in schema.names:
        columns = textwrap.shorten(", ".join(schema.names), _SHOWN, placeholder=" ...")
        raise ValueError(f"{name}: no column {column!r}; the columns are {columns}: choose one with --column")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"{name}: column {column!r} holds {kind}, not strings")
    return file


def row_groups(source: Any, column: str, name: str = "") -> list[tuple[int, int]]:
    """Return (rows, uncompressed bytes of text) of each row group of a Parquet file, from its footer."""
    with open_parquet(source, column, name) as file:
        metadata = file.metadata
    # Nested columns before it count for several leaves.
    number = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [(group.num_rows, group.column(number).total_uncompressed_size) for group in groups]
    for i, (rows, size) in enumerate(sizes):
        if not 0 <= rows < 2**31 or size < 0:
            problem = f"{rows:,} rows of {size:,} bytes are impossible"
            raise ValueError(f"{name or source}: row group {i} is damaged: {problem}")
    return sizes


def read_parquet(path: str, column: str, start: int, stop: int) -> Iterator[Batch]:
    """Yield the documents of row groups [start, stop)."""
    import pyarrow as pa

    sizes = row_groups(path, column)
    with open_parquet(path, column) as file:
        for group in range(start, stop):
            rows, size = sizes[group]
            at_once = max(1, min(8 * _BATCH_PARTS, 4 * BLOCK * rows // max(size, 1)))
            try:
                for batch in file.iter_batches(at_once, row_groups=[group], columns=[column], use_threads=False):
                    yield _from_column(batch.column(0))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"{path}: row group {group} cannot be read: {first_line(error)}") from error


def _from_column(column: Any) -> Batch:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type == pa.string_view():
        column = column.cast(pa.large_string())
    if column.null_count:
        column = column.fill_null("")
    try:
        column.validate(full=True)  # Arrow does not check what it reads
    except pa.ArrowInvalid:
        return _batch([Part(*_decode(data)) for data in column.cast(pa.large_binary()).to_pylist()])
    return Batch(column, ())


def read_jsonl(path: str, key: str, start: int, stop: int, encoding: str | None = None) -> Iterator[Part]:
    """Yield the documents of bytes [start, stop), both at the starts of lines; stop 0 means the end."""
    for number, line in enumerate(_lines(path, start, stop, encoding), 1):
        if line.isspace():
            continue
        try:
            part = _json_part(line, key)
        except ValueError as error:
            before = sum(1 for _ in _lines(path, 0, start)) if start else 0
            raise ValueError(f"{path}:{before + number}: {error}") from None
        yield part


def _lines(path: str, start: int, stop: int, encoding: str | None = None) -> Iterator[bytes]:
    """Yield the lines of bytes [start, stop) of a file, without a byte order mark."""
    with open_bytes(path) if start else open_text(path, encoding) as file:
        position = start
        if position:
            file.seek(position)
        while (not stop or position < stop) and (line := file.readline(MAX_LINE)):
            if len(line) == MAX_LINE:
                raise OSError(f"a line of {MAX_LINE:,} bytes or more")
            yield line if position else line.removeprefix(codecs.BOM_UTF8)
            position += len(line)


def next_line(file: BinaryIO) -> int:
    """Return where the next line begins, or the file ends; stop in a line that is too long."""
    read = 0
    while (some := file.readline(BLOCK)) and not some.endswith(b"\n") and read < MAX_LINE:
        read += len(some)
    return file.tell()


def _json_part(line: bytes, key: str) -> Part:
    _check_nesting(line)
    text, replaced = _decode(line)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(row).__name__}")
    return Part(_field(row, key), replaced)


def _check_nesting(data: bytes) -> None:
    # A number or bracket becomes 20 times its size in memory, a string of a text no more than 10 times.
    if len(data) > _LONG_LINE and len(_STRINGS.sub(b"", data)) > _LONG_LINE:
        raise ValueError(f"more than {_LONG_LINE:,} bytes of JSON that are not in strings")


def _not_json(error: Exception) -> ValueError:
    return ValueError(
        f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else first_line(error)}"
    )


def _field(row: dict[str, Any], key: str) -> str | None:
    if key not in row:
        keys = textwrap.shorten(", ".join(row), _SHOWN, placeholder=" ...")
        raise ValueError(f"no key {key!r}; the keys are {keys}: name the key of the text with --column")
    text = row[key]
    if not isinstance(text, str | None):
        raise ValueError(f"{key!r} holds {type(text).__name__}, not a string")
    return text


def read_json(path: str, key: str, encoding: str | None = None) -> Iterator[Part]:
    """Yield the documents of a JSON array of objects or of strings, in bounded memory."""
    decode = json.JSONDecoder().raw_decode
    number = 0
    with open_text(path, encoding) as file:
        file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")  # type: ignore[assignment]
        text: str = file.read(_READ)  # type: ignore[assignment]
        at = text.index("[")
        while True:
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]  # after the bracket or a comma
            try:
                if text.startswith("]", at) and not number:
                    return
                row, end = decode(text, at)
                end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("a comma or the array's end is missing", text, end)
                yield _recovered(_field(row, key) if isinstance(row, dict) else _string(row))
            except (json.JSONDecodeError, RecursionError) as error:
                more: str = file.read(max(len(text) - at, _READ))  # type: ignore[assignment]
                if not more or len(text) - at > MAX_LINE:
                    raise ValueError(f"{path}: element {number:,}, counted from 0: {_not_json(error)}") from None
                text, at = text[at:] + more, -1
                _check_nesting(text.encode("utf-8", "surrogatepass"))
                continue
            except ValueError as error:
                raise ValueError(f"{path}: element {number:,}, counted from 0: {error}") from None
            number, at = number + 1, end
            if text[end] == "]":
                return


def _string(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise ValueError(f"objects or strings are wanted, this is {type(value).__name__}")
    return value


def _recovered(text: str | None) -> Part:
    """Return a text in which bytes that are not UTF-8 were read as surrogates."""
    if text is None or text.isascii():
        return Part(text)
    try:
        return Part(*_decode(text.encode("utf-8", "surrogateescape")))
    except UnicodeEncodeError:  # surrogates that JSON wrote as such
        return Part(text)


def read_csv(path: str, column: str, encoding: str | None = None) -> Iterator[Part]:
    """Yield a column of a table whose first line names the columns: separated by commas, semicolons or tabs."""
    csv.field_size_limit(MAX_LINE)
    with open_text(path, encoding) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        first = text.readline(MAX_LINE)
        separators = "\t,;" if ".tsv" in os.path.basename(path).lower() else ",;\t"
        names = {sep: next(csv.reader([first], delimiter=sep), []) for sep in separators}
        separator = next((sep for sep in separators if column in names[sep]), separators[0])
        rows = csv.reader(itertools.chain([first], _limited(text)), delimiter=separator, strict=True)
        try:
            header = next(rows, [])
            if column not in header:
                columns = textwrap.shorten(", ".join(header), _SHOWN, placeholder=" ...") or "none"
                raise ValueError(
                    f"no column {column!r}; the columns, which the first line names, are {columns}: "
                    "choose one with --column"
                )
            number = header.index(column)
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(f"{len(row):,} fields, but the first line names {len(header):,} columns")
                if row:
                    yield _recovered(row[number])
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}:{max(rows.line_num, 1)}: {first_line(error)}") from None


def _limited(file: io.TextIOWrapper) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line of {MAX_LINE:,} characters or more")
        yield line


def read_text(path: str, encoding: str | None = None, separator: str = "", keep: bool = False) -> Iterator[Part]:
    """Yield the file as one document, or as those between separators; blank ones are left out.

    A long document is cut where that changes no token: see tokenizer.find_cut.

    Args:
        keep: keep the separators, each at the end of its document, and blank documents.
    """
    mark = separator.encode()
    with open_text(path, encoding, lines=True) as file:
        continues = False
        rest = b""
        block = file.read(BLOCK).removeprefix(codecs.BOM_UTF8)
        while block:
            if len(rest) >= tokenizer.MAX_UNCUT:
                raise OSError(f"no white space in {tokenizer.MAX_UNCUT:,} bytes")
            searched = len(rest)
            rest += block
            if mark and len(documents := rest.split(mark)) > 1:
                searched, rest = 0, documents.pop()
                for data in documents:
                    if continues or keep or data.strip():
                        yield Part(*_decode(data + mark if keep else data), continues=continues)
                    continues = False
            # A cut before the last bytes, so that none is in a separator which the next block completes.
            cut = tokenizer.find_cut(memoryview(rest), searched, len(rest) - max(len(mark) - 1, 0))
            if searched and cut > 0:
                yield Part(*_decode(rest[:cut]), continues=continues)
                continues, rest = True, rest[cut:]
            block = file.read(BLOCK)
        if continues or keep or not mark or rest.strip():
            yield Part(*_decode(rest), continues=continues)


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True
