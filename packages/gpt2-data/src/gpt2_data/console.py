"""What `gpt2-data build` shows: a bar, the result. Results go to stdout, progress to stderr."""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult
    from gpt2_data.building.config import BuildConfig

SECONDS_BETWEEN_LINES = 30.0  # where stderr is no terminal: a short build says nothing there
# tqdm's own format leaves one column of 80 for the bar.
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
_LINE = "{desc}: {percentage:.0f}%, {remaining} left{postfix}"


def print_result(result: "BuildResult", config: "BuildConfig", as_json: bool) -> None:
    """Print what was built."""
    if as_json:
        click.echo(json.dumps({**vars(result), "out": str(result.out)}))
        return
    what = f"{plural(result.tokens, 'token')} of {plural(result.documents, 'document')}"
    shards = plural(result.shards, "shard")
    how = f"{result.seconds:.1f} s"
    if result.text_mb_per_second:  # 0 where all had been tokenized before
        how += f", {result.text_mb_per_second:.1f} MB/s with {result.tokenizer}"
    if result.already_built:
        click.echo(f"{result.out}: already built: {what} in {shards}")
    elif not result.finished and config.part is not None:
        number, count = config.part
        click.echo(f"{result.out}: part {number} of {count}: {what}; {how}; other parts are not finished yet")
    else:
        click.echo(
            f"{result.out}: {what} in {shards} ({plural(result.val_tokens, 'token')} for validation); {how}"
        )
        if result.documents_empty:
            click.echo(
                f"{plural(result.documents_empty, 'document')} empty: kept as <|endoftext|> alone", err=True
            )
        if result.documents_replaced:
            note = "not UTF-8: the invalid bytes became U+FFFD"
            click.echo(f"{plural(result.documents_replaced, 'document')} {note}", err=True)


@contextmanager
def bar() -> "Iterator[Callable[..., None]]":
    """Show (what, done, total[, tokens so far]): a bar on a terminal, a line now and then elsewhere; on stderr."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    style: dict[str, Any] = {"bar_format": _BAR}
    if not terminal:  # tqdm counts, and `show` prints
        style = {"bar_format": _LINE, "file": io.StringIO(), "mininterval": math.inf}
    drawn, phase, last_line = tqdm(disable=True), "", time.monotonic()

    def show(what: str, done: int, total: int, tokens: int = 0) -> None:
        nonlocal drawn, phase, last_line
        if what != phase:
            drawn.close()
            phase, unit = what, " tokens" if what == "writing" else "B"
            drawn = tqdm(desc=what, total=total, initial=done, unit=unit, unit_scale=True, leave=False, **style)
        if tokens:
            drawn.set_postfix_str(f"{format_count(tokens)} tokens", refresh=False)
        drawn.update(done - drawn.n)
        if not terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            click.echo(str(drawn), err=True)

    try:
        yield show
    finally:
        drawn.close()


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_count(number: int) -> str:
    """A count for reading: "9,999", "38.7M", "9.95B"."""
    for unit, factor in ("B", 1e9), ("M", 1e6), ("k", 1e3):
        if number >= max(0.9995 * factor, 10_000):
            return f"{number / factor:.3g}{unit}"
    return f"{number:,}"


def format_bytes(size: int) -> str:
    """Bytes for reading: "512 bytes", "1.2 GB"."""
    for unit, factor in ("GB", 1e9), ("MB", 1e6), ("kB", 1e3):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"


def format_seconds(seconds: float) -> str:
    """A time for reading: "40 seconds", "12 minutes", "3.5 hours", "2.1 days"."""
    for unit, length in ("days", 86_400), ("hours", 3600), ("minutes", 60):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(round(seconds), 1)} seconds" if seconds > 1.5 else "a second"
