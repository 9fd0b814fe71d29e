"""What a Parquet column chunk is made of, by its pages' own headers, before Arrow allocates what they ask for.

A file of kilobytes may hold a page of 2 GB, and its footer may say anything. A page's header is a Thrift struct in
the compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md and
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_PAGE = 1 << 28
"""Bytes of a page, uncompressed: writers make pages of a megabyte, or of a thousand documents."""

_MAX_ROWS = 2**31 - 1
_HEADER = 1 << 14  # bytes that are read for a header, and more if it is longer
_MAX_HEADER = 1 << 20
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_ENCODING_IN = {_DATA_PAGE: 2, _DATA_PAGE_V2: 4}  # the field of that header
_BY_NUMBER = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY
_VALUES_IN = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}  # the field with the header of that kind


@dataclass(frozen=True)
class Page:
    """A page as its header describes it. A dictionary's values are no rows."""

    rows: int
    bytes: int  # uncompressed
    dictionary: bool
    numbers: bool = False  # its rows are numbers of the dictionary's values


def check_claims(group: Any, column: int, file_bytes: int) -> None:
    """Raise ValueError if a row group's description (pyarrow's RowGroupMetaData) cannot be of such a file."""
    chunk = group.column(column)
    start, size = chunk_range(chunk)
    if not 0 <= group.num_rows <= _MAX_ROWS or chunk.num_values != group.num_rows:
        raise ValueError(f"{group.num_rows:,} rows with {chunk.num_values:,} values cannot be")
    if group.num_rows == 0:
        return
    if start < 4 or size < 0 or start + size > file_bytes:
        raise ValueError(f"its text is at bytes {start:,} to {start + size:,}, the file has {file_bytes:,}")
    if chunk.total_uncompressed_size < 0:
        raise ValueError(f"{chunk.total_uncompressed_size:,} bytes of text cannot be")


def chunk_range(chunk: Any) -> tuple[int, int]:
    """Where a column chunk (pyarrow's ColumnChunkMetaData) starts in the file, and its size, in bytes."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    return start, chunk.total_compressed_size


def read_pages(file: BinaryIO, chunk: Any) -> list[Page]:
    """The pages of a column chunk. Raises ValueError if one is not in it or larger than MAX_PAGE, or if they do
    not hold the rows that the footer says."""
    at, size = chunk_range(chunk)
    stop, rows = at + size, 0
    pages = []
    while rows < chunk.num_values:
        kind, page, length = _read_header(file, at, stop)
        at += length
        if page is not None:
            pages.append(page)
            rows += 0 if page.dictionary else page.rows
            if page.bytes > MAX_PAGE:
                raise ValueError(f"a page of {page.bytes:,} bytes, {MAX_PAGE:,} are the most: write smaller ones")
        elif kind in _VALUES_IN:
            raise ValueError("damaged: a page of a negative size")
    if rows != chunk.num_values:
        raise ValueError(f"damaged: pages of {rows:,} rows, not {chunk.num_values:,}")
    return pages


def copies_are_few(pages: list[Page]) -> bool:
    """Whether the dictionary's values, written out for each row that names one, cannot take much memory."""
    dictionary = sum(page.bytes for page in pages if page.dictionary)
    return dictionary * sum(page.rows for page in pages if page.numbers) <= 2 * MAX_PAGE


def rows_at_once(pages: list[Page], most: int, wanted_bytes: int, expanding: bool) -> int:
    """How many rows make about `wanted_bytes`, `most` at most; fewer if somewhere so many might need much memory.

    expanding: the encoding (a dictionary, DELTA_BYTE_ARRAY) can make each row as long as a page.
    """
    data = [page for page in pages if not page.dictionary]
    sizes = np.array([page.bytes for page in data], np.int64)
    ends = np.cumsum([page.rows for page in data])
    total = sum(page.bytes for page in pages)
    rows = max(1, min(most, wanted_bytes * int(ends[-1]) // max(total, 1))) if data else 1
    if expanding and total:
        return max(1, min(rows, MAX_PAGE // 4 // max(page.bytes for page in pages)))
    starts, sums = np.append(0, ends[:-1]), np.append(0, np.cumsum(sizes))
    while rows > 1:
        last = np.searchsorted(starts, ends - 1 + rows)  # what begins in page i may need those before last[i]
        if int((sums[last] - sums[:-1]).max()) <= 2 * MAX_PAGE:
            break
        rows //= 2
    return rows


def _read_header(file: BinaryIO, at: int, stop: int) -> tuple[int, Page | None, int]:
    """The page's kind, what it holds (None: nothing of interest) and its length in the file."""
    size = _HEADER
    while True:
        file.seek(at)
        data = file.read(min(size, stop - at))
        try:
            header, length = _struct(data, 0, 0)
            break
        except IndexError:
            if len(data) < size or size >= _MAX_HEADER:
                raise ValueError("damaged: a page's header goes on behind its end") from None
            size *= 8
    kind, uncompressed, compressed = (header.get(i) for i in (1, 2, 3))
    if not isinstance(kind, int) or not isinstance(uncompressed, int) or not isinstance(compressed, int):
        raise ValueError("damaged: a page's header without its sizes")
    length += compressed
    if compressed < 0 or at + length > stop:
        raise ValueError(f"damaged: a page of {compressed:,} bytes, {stop - at:,} are left")
    inner = header.get(_VALUES_IN.get(kind, -1))
    rows = inner.get(1) if isinstance(inner, dict) else None
    if not isinstance(rows, int) or rows < 0 or uncompressed < 0:
        return kind, None, length
    numbers = inner.get(_ENCODING_IN.get(kind, -1)) in _BY_NUMBER if isinstance(inner, dict) else False
    return kind, Page(rows, uncompressed, kind == _DICTIONARY_PAGE, numbers), length


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of a Thrift struct, strings left out, and where it ends. IndexError if data ends before."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, head & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12 and depth < 3:
        return _struct(data, at, depth + 1)
    raise ValueError("damaged: a page's header that is none")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("damaged: a page's header that is none")
