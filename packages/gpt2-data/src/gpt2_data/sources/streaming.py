"""Datasets of the hub that are not Parquet (JSON lines, CSV, text, Arrow, ...), streamed by library `datasets`.

A shard is what `datasets` makes of a data file: shard i of n holds the same documents in the same order in
whichever process reads it. Nothing is stored on the way.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from gpt2_data.sources.hub import Listing

BATCH = 256  # rows


def num_shards(listing: Listing) -> int:
    """Return how many shards `documents` knows. Raises ValueError or OSError in one line."""
    with _one_line_errors(listing):
        return int(_open(listing).num_shards)


def documents(listing: Listing, shard: int, column: str = "text") -> Iterator[str | None]:
    """Yield the documents of a shard in order; null is None.

    Raises:
        ValueError: the column is missing or holds no strings, the data cannot be read, or `datasets` is not
            installed.
        OSError: the hub is not reached.
    """
    with _one_line_errors(listing):
        opened = _open(listing)
        part = opened.shard(num_shards=opened.num_shards, index=shard)
        if opened.column_names is not None and column in opened.column_names:
            part = part.select_columns([column])  # the others need not be decoded
        for batch in part.iter(batch_size=BATCH):
            if column not in batch:
                raise _Refused(f"no column {column!r}; the columns are {', '.join(batch)}")
            for text in batch[column]:
                if not isinstance(text, str | None):
                    raise _Refused(f"column {column!r} holds {type(text).__name__}, not strings")
                yield text


@functools.lru_cache(maxsize=1)  # it takes ten requests, and shards are read one after the other
def _open(listing: Listing) -> Any:
    try:
        import datasets
    except ImportError:
        raise _Refused("it is not Parquet: pip install 'gpt2-data[datasets]' to read it") from None
    name, files = listing.config, None  # its options, such as a CSV's separator, are in the card
    if name is None:
        files = {listing.split: [file.path for file in listing.files]}
    return datasets.load_dataset(
        listing.repo, name=name, data_files=files, split=listing.split, revision=listing.commit, streaming=True
    )


class _Refused(Exception):
    """Says what is wrong in one line."""


@contextlib.contextmanager
def _one_line_errors(listing: Listing) -> Iterator[None]:
    """Turn the dozen kinds that `datasets` raises, some of many lines, into one of two, in one line."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"hub dataset {listing.repo}: {error}") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"hub dataset {listing.repo}: `datasets` cannot read it: {first}") from error
