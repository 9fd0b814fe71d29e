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


def documents(listing: Listing, shard: int, column: str = "text") -> Iterator[list[str | None]]:
    """Yield the documents of a shard, in batches and in order; null is None.

    Raises:
        ValueError: the column is missing or holds no strings, the data cannot be read, or `datasets` is not
            installed.
        OSError: the hub is not reached.
    """
    with _one_line_errors(listing):
        opened = _open(listing)
        part = opened.shard(num_shards=opened.num_shards, index=shard)
        names = opened.column_names
        if names is not None and column not in names:
            raise ValueError(_no_column(listing, column, names))
        if names is not None:
            part = part.select_columns([column])  # the others need not be decoded
        for batch in part.iter(batch_size=BATCH):
            if column not in batch:
                raise ValueError(_no_column(listing, column, batch))
            texts = list(batch[column])
            for text in texts:
                if not isinstance(text, str | None):
                    kind = type(text).__name__
                    raise ValueError(f"hub dataset {listing.repo}: column {column!r} holds {kind}, not strings")
            yield texts


def _no_column(listing: Listing, column: str, names: Any) -> str:
    return f"hub dataset {listing.repo}: no column {column!r}; the columns are {', '.join(names)}"


@functools.lru_cache(maxsize=1)  # it takes ten requests, and shards are read one after the other
def _open(listing: Listing) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"hub dataset {listing.repo} is not Parquet: pip install 'gpt2-data[datasets]' to read it"
        ) from error
    if listing.config is not None:  # its options, such as a CSV's separator, are in the card
        name, files = listing.config, None
    else:
        name, files = None, {listing.split: [file.path for file in listing.files]}
    return datasets.load_dataset(
        listing.repo, name=name, data_files=files, split=listing.split, revision=listing.commit, streaming=True
    )


@contextlib.contextmanager
def _one_line_errors(listing: Listing) -> Iterator[None]:
    """Turn the dozen kinds that `datasets` raises, some of many lines, into one of two, in one line."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and str(error).startswith("hub dataset"):
            raise
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"hub dataset {listing.repo}: `datasets` cannot read it: {first}") from error
