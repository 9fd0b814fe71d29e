"""Parquet files of the hub read without a download, by ranges over HTTP: footers and single columns."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt2_data.sources import files, web
from gpt2_data.sources.web import WebFile


class RemoteFile(io.RawIOBase):
    """A file on the hub, for reading by pyarrow: each read is one request for a range, a Parquet footer takes two.

    huggingface_hub's HfFileSystem asks the hub for a link at each read, 10,000 times for FineWeb-Edu's sample.
    Raises OSError in one line.
    """

    def __init__(self, file: WebFile, link: web.Link | None = None) -> None:
        self.file, self.link = file, link or web.Link(file.url)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.file.size)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self.file.size if size is None or size < 0 else min(self.file.size, self._position + size)
        if stop <= self._position:
            return b""
        data = web.read_range(self.link, self._position, stop)
        self._position = stop
        return data


def row_groups(file: WebFile, column: str = "text") -> list[tuple[int, int]]:
    """Return (rows, bytes of text uncompressed) of each row group, from the footer alone.

    Raises:
        ValueError: the file is no Parquet, or `column` holds no strings.
        OSError: the file is not reached.
    """
    parquet = _parquet(RemoteFile(file))
    try:
        files.check_text_column(parquet.schema_arrow, column)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return files.row_groups_of(parquet.metadata, column)


def token_counts(
    parquet_files: list[WebFile],
    column: str = "token_count",
    threads: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Iterator[int | None]:
    """Yield for each file the sum of an integer column, or None if it has none; a few kB a row group are read.

    The sum over FineWeb-Edu's token_count is that of GPT-2's tokens without one <|endoftext|> a row. `progress` is
    called with the number of row groups just read. One file's footer is held at a time.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    with ThreadPoolExecutor(threads) as pool:
        for file in parquet_files:
            remote = RemoteFile(file)
            metadata = _parquet(remote).metadata
            schema = metadata.schema.to_arrow_schema()
            if column not in schema.names or not pa.types.is_integer(schema.field(column).type):
                yield None
                continue

            def count(first: int, remote: RemoteFile = remote, metadata: Any = metadata) -> int:
                """Sum every `threads`-th row group: each is read by one request."""
                parquet = _parquet(RemoteFile(remote.file, remote.link), metadata)
                total = 0
                for group in range(first, metadata.num_row_groups, threads):
                    try:
                        values = parquet.read_row_group(group, columns=[column], use_threads=False).column(0)
                    except pa.ArrowException as error:
                        where = f"{remote.file.path}: row group {group}"
                        raise ValueError(f"{where}: {files.first_line(error)}") from error
                    total += pc.sum(values).as_py() or 0
                    if progress is not None:
                        progress(1)
                return total

            yield sum(pool.map(count, range(min(threads, metadata.num_row_groups))))


def _parquet(remote: RemoteFile, metadata: Any = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(remote, metadata=metadata)
    except pa.ArrowException as error:
        raise ValueError(f"{remote.file.path}: not a readable Parquet file: {files.first_line(error)}") from error
