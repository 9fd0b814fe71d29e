"""The commands of gpt2-data share this: sizes, paths, errors in one line, signals and a progress bar."""

import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "GPT2_DATA",
    "max_content_width": 100,
}
SECONDS_BETWEEN_LINES = 9.0  # if stderr is not a terminal: nothing is silent for ten seconds
# tqdm's own format leaves one column of 80 for the bar.
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
_LINE = "{desc}: {percentage:.0f}%, {remaining} left{postfix}"


def size(text: str) -> int:
    """Read a count such as 100M, 1.5B or 64k."""
    digits = text.strip().lower()
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(digits[-1:], 1)
    try:
        number = float(digits[:-1] if factor > 1 else digits) * factor
        if number < 0 or number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a count: write 100M, 1.5B, 64k or a whole number") from None
    return int(number)


class UserPath(click.Path):
    """A path in which ~ is the home folder: no shell expands the one in --out=~/data, or in a quoted glob."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):  # "$OUT" of a script that did not set it; Path("") would be this folder
            self.fail("the path is empty", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Group(click.Group):
    """A group turns a ValueError or OSError into one line and exit code 1; --debug shows the traceback.

    Ctrl-C and SIGTERM end a command with 128 + their number. No terminal's encoding ends its output.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream, errors in (sys.stdout, "replace"), (sys.stderr, "backslashreplace"):  # stderr names files
            with suppress(AttributeError, OSError):  # no such stream, or another kind of file behind it
                stream.reconfigure(errors=errors)  # type: ignore[union-attr]
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise SystemExit(128 + _signal_of(interrupt)) from None
        except BrokenPipeError:
            raise  # `| head` has seen enough: click knows
        except (ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            text = " ".join(str(error).split())
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    text += ": make room and run the same command again"
            raise click.ClickException(printable(text)) from error
        finally:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    return signal.Signals(*interrupt.args or (signal.SIGINT,))


def printable(text: str) -> str:
    """Escape what a file's name or content might do to a terminal, or to the one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def stoppable(again: str = ": run the same command again to resume") -> Iterator[None]:
    """Say which signal has ended a command, and that it can be run `again`."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        name = _signal_of(interrupt).name
        click.echo(f"\nstopped by {name}{again}", err=True)
        raise


@contextmanager
def bar() -> Iterator[Callable[..., None]]:
    """Yield a function that shows (what, done, total[, tokens so far]) on stderr, as a bar or as lines.

    A total of 0 stands for work whose end is unknown.
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
        if not terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
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
