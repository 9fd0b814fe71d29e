"""What a run writes to stderr: lines above a progress bar on a terminal, plain lines anywhere else.

Nobody may be reading, the disk behind a redirection may be full, a pipe may be stuck: none of this stops a run.
Intervals use the monotonic clock: the wall clock, which tqdm's own pace follows, is sometimes set back.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from typing import Any, TextIO

from tqdm import tqdm

FIRST_STEPS = 3  # the first steps of a process have a line each, so that one sees at once that it trains
LINE_SECONDS = {True: 1.0, False: 10.0}  # between lines of steps, on a terminal and elsewhere
BAR_SECONDS = 0.1
QUIET_SECONDS = 9.0  # that work lasts without a line, before one says what is being done


class Console:
    """The terminal of a run of `steps` steps; that of another rank than 0 is not enabled, and writes nothing."""

    def __init__(self, steps: int, enabled: bool = True) -> None:
        self.steps = steps
        self.stream: TextIO | None = sys.stderr if enabled else None  # None, too, where a shell closed it
        self.shown, self.last_line, self.last_bar = 0, -float("inf"), -float("inf")
        self.first: tuple[int, float] | None = None  # the first step of this process, and when it ended
        self.bar: tqdm[Any] | None = None
        self.on_terminal = False
        self.last_word = time.monotonic()
        self.task: tuple[str, int, int] = ("", 0, 0)  # what is being done, and how much of it
        self.task_began = self.last_word
        self._closed, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        with suppress(OSError, ValueError):  # a closed stream
            self.on_terminal = self.stream is not None and self.stream.isatty()

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        """Note what is being done, which takes no time. A thread shows it in the bar, or after a silence."""
        if what != self.task[0]:
            self.task_began = time.monotonic()
        self.task = (what, done, total)
        if self._thread.ident is None and self.stream is not None:
            self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(0.5):
            (what, done, total), now = self.task, time.monotonic()
            if not what or now - self.task_began < 1:
                continue
            share = f" {done:,} of {total:,}" if total else ""
            text = f"{what}{share}, {now - self.task_began:.0f} s"
            if self.on_terminal:
                self._show(text)
            elif now - max(self.last_word, self.task_began) >= QUIET_SECONDS:
                self.say(text)

    def _show(self, text: str, step: int = 0) -> None:
        """Show a text behind the bar, which this begins: messages before the first step need no bar."""
        if self.bar is None:
            self._quietly(self._open_bar)
        if self.bar is not None:
            self.bar.n = step or self.bar.n
            self.bar.set_postfix_str(text, refresh=False)
            self._quietly(self.bar.refresh)

    def _open_bar(self) -> None:
        form = "{percentage:3.0f}%|{bar}| {n}/{total}{postfix}"
        self.bar = tqdm(total=self.steps, file=self.stream, dynamic_ncols=True, leave=False, bar_format=form)

    def step(self, row: dict[str, Any]) -> None:
        """Show a training row: as a line if one is due, and in the bar."""
        now, step = time.monotonic(), row["step"]
        self.task = ("", 0, 0)
        time_left = self._time_left(step, now)
        self.shown += 1
        due = now - self.last_line >= LINE_SECONDS[self.on_terminal]
        if due or self.shown <= FIRST_STEPS or step == self.steps or "skipped" in row:
            self.last_line = now
            rest = "" if self.on_terminal or not time_left else f"  {time_left}"
            self.say(step_line(row, self.steps) + rest)
        if self.on_terminal and (now - self.last_bar >= BAR_SECONDS or step == self.steps):
            self.last_bar = now
            self._show(time_left, step)

    def _time_left(self, step: int, now: float) -> str:
        """Return "1:02:03 left", by the mean pace since this process's first step, with evaluations."""
        if self.first is None:
            self.first = (step, now)  # it may include compiling, so it tells no pace
            return ""
        first_step, start = self.first
        return f"{tqdm.format_interval((now - start) * (self.steps - step) / (step - first_step))} left"

    def say(self, text: str) -> None:
        """Write one line, above the bar."""
        self.last_word = time.monotonic()
        self._quietly(lambda: tqdm.write(text, file=self.stream))

    def close(self) -> None:
        """Remove the bar and end the thread; `say` still works."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
        if self.bar is not None:
            self._quietly(self.bar.close)
            self.bar.disable = True
            self.bar = None

    def _quietly(self, write: Callable[[], object]) -> None:
        """Write unless that would have to wait; after a failed write, write nothing any more."""
        if self.stream is None:
            return
        try:
            if _takes_more(self.stream):
                write()
        except (OSError, ValueError):
            # Nobody reads, the disk is full, the terminal was closed, or Python's own stream is closed.
            _discard(self.stream)
            self.stream = None
            if self.bar is not None:
                self.bar.disable = True  # else it writes once more when it is garbage-collected


def _takes_more(stream: TextIO) -> bool:
    """True if a line can be written without waiting for a reader. It is better to lose a line than time."""
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):  # not a file: a notebook's or a test's stream
        return True
    return bool(select.select([], [descriptor], [], 0.0)[1])


def _discard(stream: TextIO) -> None:
    """Discard what is written to a dead stream: flushing its buffer at exit would fail, with exit status 120."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def step_line(row: dict[str, Any], steps: int) -> str:
    """Return a training row as one line, without unknown values; 78 columns with five-digit steps on a GPU."""
    forms: dict[str, Callable[[Any], str]] = {
        "loss": "loss {:.4f}".format, "grad_norm": "norm {:.3f}".format, "lr": "lr {:.2e}".format,
        "tokens_per_second": lambda number: f"{short(number)} tok/s", "mfu": "MFU {:.1%}".format,
        "skipped": "update skipped: {}".format,
    }  # fmt: skip
    parts = [form(row[name]) for name, form in forms.items() if row.get(name) is not None]
    return "  ".join([f"step {row['step']:>{len(str(steps))}}/{steps}", *parts])


def short(number: float) -> str:
    """Return a number in three or four digits: 950, 12.3k, 1.27M, 10.0B."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:,.{2 if number < 10 * scale else 1 if number < 100 * scale else 0}f}{letter}"
    return f"{number:,.0f}"


def duration(hours: float) -> str:
    """Return hours as "3.2 days", "1.5 hours" or "12 minutes"."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    minutes = ceil(60 * hours)
    return f"{hours:.1f} hours" if hours >= 1 else f"{minutes} minute{'s' * (minutes != 1)}"
