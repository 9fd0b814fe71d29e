"""A step that hangs ends the run: stacks are printed, and torchrun can start it again."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

STDERR = 2
FIRST_SECONDS = 1800.0  # for what was never timed: the first step compiles


class Watchdog:
    """Ends this process, with exit code 1, when what it watches takes much longer than usual.

    One process that hangs leaves the others waiting in their next exchange, so each finds out by itself, and each
    prints its own stacks. A Python thread says where training is. Should the interpreter be locked, faulthandler's
    own thread, which needs no lock, prints the stacks two seconds later and exits.

    Args:
        rank: this process, for the message.
        seconds: that anything may take; so may ten times the median of its last times. 0 watches nothing.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self._times: dict[str, deque[float]] = {}
        self._deadline = float("inf")
        self._what = ""
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self, what: str, step: int, first_seconds: float = FIRST_SECONDS) -> Iterator[None]:
        """Watch what is done within; `first_seconds` is the limit while `what` was never timed."""
        if not self.seconds:
            yield
            return
        times = self._times.setdefault(what, deque(maxlen=64))
        limit = max(self.seconds, 10 * median(times)) if times else max(self.seconds, first_seconds)
        started = time.monotonic()
        self._what = f"no progress for {limit:.3g} s in step {step} ({what})"
        self._deadline = started + limit
        if limit < 3e6:  # more does not fit into faulthandler's clock
            faulthandler.dump_traceback_later(limit + 2, exit=True, file=STDERR)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._deadline = float("inf")
        times.append(time.monotonic() - started)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            if time.monotonic() > self._deadline:
                text = f"rank {self.rank}: {self._what}; the stacks of this process, then it ends:\n"
                os.write(STDERR, text.encode())
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                sys.stdout.flush()
                time.sleep(1)  # when this one ends, the others' exchange breaks: they print their stacks before
                os._exit(1)
