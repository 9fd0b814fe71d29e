"""Files read as batches of documents in Arrow arrays, in the file's own order and in bounded memory.

A batch is about 4 MB of text, or one document where that is longer; a text file is cut further. Arrow arrays, not
Python strings: the tokenizers take UTF-8, and making a str of each document costs as much as reading Parquet does.
"""

import codecs
import contextlib
import io
import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpt2_data import tokenizer

BLOCK = 4_000_000  # bytes read at once, and about the text of a batch
_BATCH_PARTS = 4096
MAX_LINE = 1 << 27  # bytes; a small compressed file may expand to more than fits in memory
_LONG_LINE = 1 << 24  # bytes; in a longer line, no more than this many may be outside of strings
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_READ = 1 << 20  # bytes of a compressed column read at once
_SHOWN = 300  # characters of a list in a message; a file may have any number of columns


class Part(NamedTuple):
    """A document, or a part of one that is too long to hold in memory. The fields are those of a Batch."""

    text: str | None
    replaced: bool = False
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents, or one part of a long document.

    Attributes:
        texts: pyarrow string or large_string array: valid UTF-8, no nulls.
        replaced: texts in which bytes that are not UTF-8, or surrogates without a partner, became U+FFFD.
        continues: True if the only text belongs to the last document of the batch before.
    """

    texts: Any
    replaced: tuple[int, ...]
    continues: bool = False

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
        return Batch(self.texts.slice(start, stop - start), replaced)


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
    return Batch(array, tuple(sorted(replaced)), parts[0].continues)


def open_parquet(source: Any, column: str, name: str = "") -> Any:
    """Open a Parquet file, or a file object that errors call `name`; it must have this column of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = name or source
    try:
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
    if kind not in (pa.string(), pa.large_string()):
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
    if column.null_count:
        column = column.fill_null("")
    try:
        column.validate(full=True)  # Arrow does not check what it reads
    except pa.ArrowInvalid:
        return _batch([Part(*_decode(data)) for data in column.cast(pa.large_binary()).to_pylist()])
    return Batch(column, ())


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Open a file, decompressed if its name says so. Raises ValueError, naming it, if it cannot be read."""
    import pyarrow as pa

    try:
        with io.BufferedReader(pa.input_stream(path, compression="detect"), BLOCK) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error


def is_compressed(path: str) -> bool:
    """True if the file can be read from its start only."""
    return path.endswith((".gz", ".zst"))


def read_jsonl(path: str, key: str, start: int, stop: int) -> Iterator[Part]:
    """Yield the documents of bytes [start, stop), both at the starts of lines; stop 0 means the end."""
    for number, line in enumerate(_lines(path, start, stop), 1):
        if line.isspace():
            continue
        try:
            part = _json_part(line, key)
        except ValueError as error:
            before = sum(1 for _ in _lines(path, 0, start)) if start else 0
            raise ValueError(f"{path}:{before + number}: {error}") from None
        yield part


def _lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines of bytes [start, stop) of a file, without a byte order mark."""
    with open_bytes(path) as file:
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
    # A number or bracket becomes 20 times its size in memory, a string of a text no more than 10 times.
    if len(line) > _LONG_LINE and len(_STRINGS.sub(b"", line)) > _LONG_LINE:
        raise ValueError(f"more than {_LONG_LINE:,} bytes of JSON that are not in strings")
    text, replaced = _decode(line)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ValueError(f"not JSON: {reason}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(row).__name__}")
    if key not in row:
        keys = textwrap.shorten(", ".join(row), _SHOWN, placeholder=" ...")
        raise ValueError(f"no key {key!r}; the keys are {keys}: name the key of the text with --column")
    if not isinstance(row[key], str | None):
        raise ValueError(f"{key!r} holds {type(row[key]).__name__}, not a string")
    return Part(row[key], replaced)


def read_text(path: str) -> Iterator[Part]:
    """Yield the file as one document. A long one is cut where that changes no token: see tokenizer.find_cut."""
    with open_bytes(path) as file:
        continues = False
        rest = file.read(BLOCK).removeprefix(codecs.BOM_UTF8)
        while block := file.read(BLOCK):
            if len(rest) >= tokenizer.MAX_UNCUT:
                raise OSError(f"no white space in {tokenizer.MAX_UNCUT:,} bytes")
            searched = len(rest)
            rest += block
            cut = tokenizer.find_cut(memoryview(rest), searched, len(rest))
            if cut > 0:
                yield Part(*_decode(rest[:cut]), continues=continues)
                continues, rest = True, rest[cut:]
        yield Part(*_decode(rest), continues=continues)


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def first_line(error: BaseException) -> str:
    """The first line of an error's text: Arrow's have several."""
    return str(error).strip().partition("\n")[0]
