"""What every command of gpt2-data does: it reads sizes and paths, ends in one line, and obeys signals."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "auto_envvar_prefix": "GPT2_DATA",
    "max_content_width": 100,
}


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
    """Turns what a user can mend (ValueError, OSError) into one line and exit code 1; --debug shows the rest.

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
