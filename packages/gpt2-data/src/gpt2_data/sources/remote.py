"""Reading files of the hub without downloading them: Parquet footers and single columns, by ranges over HTTP."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt2_data.sources import files as readers
from gpt2_data.sources import web
from gpt2_data.sources.hub import HubFile


class RemoteFile(io.RawIOBase):
    """A file on the hub, for reading by pyarrow: each read is one request for a range, a Parquet footer takes two.

    Raises OSError in one line.
    """

    def __init__(self, file: HubFile | web.WebFile, link: web.Link | None = None) -> None:
        self.file, self.link = file, link or web.Link(file.url)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.file.size}[whence]
        )
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self.file.size if size is None or size < 0 else min(self.file.size, self._position + size)
        if stop <= self._position:
            return b""
        data = web.read_range(self.link, self._position, stop, web.Patience(self.file.url))
        self._position = stop
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def row_groups(file: HubFile | web.WebFile, column: str = "text") -> list[tuple[int, int]]:
    """(rows, bytes of text uncompressed) of each row group, from the footer alone.

    Raises ValueError where the file is no Parquet or `column` holds no strings, OSError where it is not reached.
    """
    opened = _parquet(RemoteFile(file), file)
    try:
        readers.check_text_column(opened.schema_arrow, column)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    number = readers.column_number(opened.metadata, column)
    groups = (opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups))
    return [(group.num_rows, group.column(number).total_uncompressed_size) for group in groups]


def token_counts(
    files: list[HubFile],
    column: str = "token_count",
    threads: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Iterator[int | None]:
    """For each file the sum of an integer column, or None where it has none; a few kB a row group are read.

    The sum over FineWeb-Edu's token_count is that of GPT-2's tokens without one <|endoftext|> a row. `progress` is
    called with the number of row groups just read. One file's footer is held at a time, and the next one's.
    """
    with ThreadPoolExecutor(threads + 1) as pool:
        ahead = pool.submit(_footer, files[0]) if files else None
        for i, file in enumerate(files):
            assert ahead is not None
            link, metadata = ahead.result()
            ahead = pool.submit(_footer, files[i + 1]) if i + 1 < len(files) else None
            yield _token_count(pool, file, link, metadata, column, threads, progress)


def _footer(file: HubFile) -> tuple[web.Link, Any]:
    remote = RemoteFile(file)
    return remote.link, _parquet(remote, file).metadata


def _token_count(
    pool: ThreadPoolExecutor,
    file: HubFile,
    link: web.Link,
    metadata: Any,
    column: str,
    threads: int,
    progress: Callable[[int], object] | None,
) -> int | None:
    import pyarrow as pa
    import pyarrow.compute as pc

    schema = metadata.schema.to_arrow_schema()
    if column not in schema.names or not pa.types.is_integer(schema.field(column).type):
        return None

    def some(first: int) -> int:
        """The sum over every `threads`-th row group: each is read by one request."""
        opened = _parquet(RemoteFile(file, link), file, metadata)
        total = 0
        for group in range(first, metadata.num_row_groups, threads):
            try:
                values = opened.read_row_group(group, columns=[column], use_threads=False).column(0)
            except pa.ArrowException as error:
                raise ValueError(f"{file.path}: row group {group}: {readers.first_line(error)}") from error
            total += pc.sum(values).as_py() or 0
            if progress is not None:
                progress(1)
        return total

    return sum(pool.map(some, range(min(threads, metadata.num_row_groups))))


def _parquet(remote: RemoteFile, file: HubFile | web.WebFile, metadata: Any = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(remote, metadata=metadata)
    except pa.ArrowException as error:
        raise ValueError(f"{file.path}: not a readable Parquet file: {readers.first_line(error)}") from error
