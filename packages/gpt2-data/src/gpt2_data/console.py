"""A progress bar, and numbers formatted for people."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

SECONDS_BETWEEN_LINES = 30.0  # if stderr is not a terminal; a short build prints none
# tqdm's own format leaves one column of 80 for the bar.
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
_LINE = "{desc}: {percentage:.0f}%, {remaining} left{postfix}"


@contextmanager
def bar(seconds: float | None = None) -> Iterator[Callable[..., None]]:
    """Yield a function that shows (what, done, total[, tokens so far]) on stderr, as a bar or as lines.

    A total of 0 stands for work whose end is unknown. Lines come every `seconds` (SECONDS_BETWEEN_LINES).
    """
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
            some = style if total else style | {"bar_format": "{desc}, {elapsed}"}
            drawn = tqdm(desc=what, total=total, initial=done, unit=unit, unit_scale=True, leave=False, **some)
        if tokens:
            drawn.set_postfix_str(f"{format_count(tokens)} tokens", refresh=False)
        drawn.update(done - drawn.n)
        if terminal and not total:
            drawn.refresh()
        if not terminal and time.monotonic() - last_line >= (
            SECONDS_BETWEEN_LINES if seconds is None else seconds
        ):
            last_line = time.monotonic()
            click.echo(str(drawn), err=True)

    try:
        yield show
    finally:
        drawn.close()


def print_json(value: Any) -> None:
    """Print one JSON document."""
    import json

    click.echo(json.dumps(value))


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_count(number: int) -> str:
    """Format a count: "9,999", "38.7M", "9.95B"."""
    for unit, factor in ("B", 1e9), ("M", 1e6), ("k", 1e3):
        if number >= max(0.9995 * factor, 10_000):
            return f"{number / factor:.3g}{unit}"
    return f"{number:,}"


def format_bytes(size: int) -> str:
    """Format a number of bytes: "512 bytes", "1.2 GB"."""
    for unit, factor in ("GB", 1e9), ("MB", 1e6), ("kB", 1e3):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"


def format_seconds(seconds: float) -> str:
    """Format a duration: "40 seconds", "12 minutes", "3.5 hours", "2.1 days"."""
    for unit, length in ("days", 86_400), ("hours", 3600), ("minutes", 60):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(round(seconds), 1)} seconds" if seconds > 1.5 else "a second"
