"""Files read as batches of documents in Arrow arrays, in the file's own order and in bounded memory.

A batch is about 4 MB of text, or one document where that is longer; a text file is cut further. Arrow arrays, not
Python strings: the tokenizers take UTF-8, and making a str of each document costs as much as reading Parquet does.
"""

import collections
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
from gpt2_data.sources.opening import MARK_UNREADABLE, UNREADABLE, first_line, open_text

BLOCK = 4_000_000  # bytes read at once, and about the text of a batch
_BATCH_PARTS = 4096
MAX_LINE = 1 << 27  # characters; a small compressed file may expand to more than fits in memory
_LONG_LINE = 1 << 24  # characters; in a longer line, no more than this many may be outside of strings
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BETWEEN = re.compile(r"[ \t\r\n\ufeff]*")  # what may stand between JSON arrays
_READ = 1 << 20  # bytes of a compressed column read at once
_CUT = re.compile(r"(?<=\S)[ \t-\r]")
_SHOWN = 300  # characters of a list in a message; a file may have any number of columns


class Part(NamedTuple):
    """A document, or a part of one that is too long to hold in memory. The fields are those of a Batch."""

    text: str | None  # with a lone surrogate for bytes that cannot be read
    continues: bool = False
    path: str | None = None  # of its file, if its unit may have several


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents, or one part of a long document.

    Attributes:
        texts: pyarrow string or large_string array: valid UTF-8, no nulls.
        replaced: texts in which bytes that are not UTF-8, or surrogates without a partner, became U+FFFD.
        continues: True if the only text belongs to the last document of the batch before.
        replaced_in: the files of such texts, if the unit has several.
        lone: True if all that was replaced are surrogates without a partner.
    """

    texts: Any
    replaced: tuple[int, ...]
    continues: bool = False
    replaced_in: tuple[str, ...] = ()
    lone: bool = False

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
        return Batch(self.texts.slice(start, stop - start), replaced, self.continues, self.replaced_in, self.lone)


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

    texts, replaced = [part.text or "" for part in parts], []
    try:
        array = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # surrogates, which JSON can also write, as "\ud800"
        fixed = [tokenizer.repair_surrogates(text) for text in texts]
        replaced = [i for i, text in enumerate(fixed) if "\ufffd" in text and text != texts[i]]
        array = pa.array(fixed, pa.large_string())
    paths = dict.fromkeys(path for i in replaced if (path := parts[i].path) is not None)
    lone = not any(UNREADABLE in texts[i] for i in replaced)
    return Batch(array, tuple(replaced), parts[0].continues, tuple(paths), lone)


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
        columns = some(schema.names)
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
        data = column.cast(pa.large_binary()).to_pylist()
        return _batch([Part(text.decode("utf-8", MARK_UNREADABLE)) for text in data])
    return Batch(column, ())


def read_jsonl(path: str, key: str, start: int, stop: int, encoding: str | None = None) -> Iterator[Part]:
    """Yield the documents of bytes [start, stop), both at the starts of lines; stop 0 means the end."""
    with open_text(path, encoding, start=start, stop=stop) as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                if not line.isspace():
                    yield Part(_field(_parse(line), key))
            except ValueError as error:
                number += _lines_before(path, start)
                advice = ": if this is a JSON array, rename it to .json" if (number, line[0]) == (1, "[") else ""
                raise ValueError(f"{path}:{number}: {error}{advice}") from None


def _lines(file: io.TextIOWrapper) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise OSError(f"a line of {MAX_LINE:,} characters or more")
        yield line


def _lines_before(path: str, position: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while file.tell() < position and file.readline():
            count += 1
    return count


def next_line(file: BinaryIO) -> int:
    """Return where the next line begins, or the file ends; stop in a line that is too long."""
    read = 0
    while (some := file.readline(BLOCK)) and not some.endswith(b"\n") and read < MAX_LINE:
        read += len(some)
    return file.tell()


def _parse(line: str) -> Any:
    _check_nesting(line)
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from None


def _check_nesting(text: str) -> None:
    # A number or bracket becomes 20 times its size in memory, a string of a text no more than 10 times.
    if len(text) > _LONG_LINE and len(_STRINGS.sub("", text)) > _LONG_LINE:
        raise ValueError(f"more than {_LONG_LINE:,} characters of JSON that are not in strings")


def _not_json(error: Exception) -> ValueError:
    what = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    return ValueError(f"not JSON: {getattr(error, 'msg', what)}")  # `msg` is without the line in its piece


def _field(row: Any, key: str) -> str | None:
    """Return the text of a JSON object, or a string as it is."""
    if not isinstance(row, dict | str | None):
        raise ValueError(f"an object or a string is wanted, this is {type(row).__name__}")
    if isinstance(row, dict) and key not in row:
        raise ValueError(f"no key {key!r}; the keys are {some(row)}: name the key of the text with --column")
    text = row[key] if isinstance(row, dict) else row
    if not isinstance(text, str | None):
        raise ValueError(f"{key!r} holds {type(text).__name__}, not a string")
    return text


def some(names: Iterable[str]) -> str:
    """Return a list for a message, cut if it is long."""
    return textwrap.shorten(", ".join(names), _SHOWN, placeholder=" ...") or "none"


def read_json(path: str, key: str, encoding: str | None = None) -> Iterator[Part]:
    """Yield the documents of JSON arrays of objects or of strings, joined by cat, in bounded memory."""
    decode, skip = json.JSONDecoder().raw_decode, json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    number, text, at = 0, "", 0
    with open_text(path, encoding) as file:
        while True:
            while (at := _BETWEEN.match(text, at).end()) == len(text):  # type: ignore[union-attr]
                if not (text := file.read(_READ)):
                    return
                at = 0
            if text[at] != "[":
                raise ValueError(f"{path}: {text[at : at + 20]!r} after {number:,} elements is no JSON array")
            empty = True
            while text[at] != "]":
                at = skip(text, at + 1).end()  # after the bracket or a comma
                try:
                    if empty and text.startswith("]", at):
                        break
                    row, end = decode(text, at)
                    end = skip(text, end).end()
                    if text[end : end + 1] not in (",", "]"):
                        raise json.JSONDecodeError("a comma or the array's end is missing", text, end)
                    yield Part(_field(row, key))
                except (json.JSONDecodeError, RecursionError) as error:  # or the element is not read to its end
                    more = file.read(max(len(text) - at, _READ))
                    if not more or len(text) - at > MAX_LINE:
                        raise ValueError(
                            f"{path}: element {number:,}, counted from 0: {_not_json(error)}"
                        ) from None
                    text, at = f"[{text[at:]}{more}", 0
                    _check_nesting(text)
                    continue
                except ValueError as error:
                    raise ValueError(f"{path}: element {number:,}, counted from 0: {error}") from None
                number, at, empty = number + 1, end, False
            at += 1


def read_csv(path: str, column: str, encoding: str | None = None, quoted: bool | None = None) -> Iterator[Part]:
    """Yield a column of a table whose first line names the columns: separated by commas, semicolons or tabs.

    In a .tsv that would be faulty if quotes enclosed fields they are characters as others: most are not quoted.
    """
    csv.field_size_limit(MAX_LINE)
    tabs = ".tsv" in os.path.basename(path).lower()
    if quoted is None and tabs:
        try:
            collections.deque(read_csv(path, column, encoding, True), 0)
        except ValueError:
            quoted = False
    quotes: Any = {"quoting": csv.QUOTE_NONE if quoted is False else csv.QUOTE_MINIMAL}
    with open_text(path, encoding, newline="") as file:
        lines = _lines(file)
        first = next(lines, "")
        separators = "\t,;" if tabs else ",;\t"
        names = {sep: next(csv.reader([first], delimiter=sep, **quotes), []) for sep in separators}
        separator = next((sep for sep in separators if column in names[sep]), separators[0])
        rows = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True, **quotes)
        try:
            header = next(rows, [])
            if column not in header:
                raise ValueError(
                    f"no column {column!r}; the columns, which the first line names, are {some(header)}: "
                    "choose one with --column"
                )
            number = header.index(column)
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ValueError(f"{len(row):,} fields, but the first line names {len(header):,} columns")
                yield Part(row[number])
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}:{max(rows.line_num, 1)}: {first_line(error)}") from None


def read_text(path: str, encoding: str | None = None, separator: str = "", keep: bool = False) -> Iterator[Part]:
    """Yield the file as one document, or as those between separators; blank ones are left out.

    A long document is cut where that changes no token: see tokenizer.find_cut.

    Args:
        keep: keep the separators, each at the end of its document, and blank documents.
    """
    with open_text(path, encoding, newline=None) as file:
        continues = False
        rest = ""
        while block := file.read(BLOCK):
            if len(rest) >= tokenizer.MAX_UNCUT:
                raise OSError(f"no white space in {tokenizer.MAX_UNCUT:,} characters")
            searched = len(rest)
            rest += block
            if separator and len(documents := rest.split(separator)) > 1:
                searched, rest = 0, documents.pop()
                for text in documents:
                    if continues or keep or text.strip():
                        yield Part(text + separator if keep else text, continues, path)
                    continues = False
            # A cut before the last characters, so that none is in a separator which the next block completes.
            cut = _CUT.search(rest, searched, len(rest) - max(len(separator) - 1, 0))
            if searched and cut:
                yield Part(rest[: cut.start()], continues, path)
                continues, rest = True, rest[cut.start() :]
        if continues or keep or not separator or rest.strip():
            yield Part(rest, continues, path)
