"""What may go wrong while a run trains: it is asked to stop, it hangs, or a number is not finite."""

import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import Any

# Slurm can send SIGUSR1 some minutes before the end of a job's time (sbatch --signal).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STDERR = 2
FIRST_SECONDS = 1800.0  # limit for work that was never timed: the first step compiles
WINDOW = 128  # the last steps, which define what is usual, as in llm.c and OLMo
FEWEST = 20  # with fewer steps a deviation means nothing


class StopSignal:
    """Notes the first signal that asks the run to save and end; the loop looks at its `number` once a step.

    A second SIGINT ends the process at once, which is safe since files appear whole or not at all. Within a second
    it counts as the same one: at a Ctrl-C the terminal sends it to all processes, and torchrun sends it again.
    """

    def __init__(self) -> None:
        self.number = 0
        self._when = 0.0

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Note signals while the block runs, so that they do not end the process."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.number and number == signal.SIGINT and time.monotonic() - self._when > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self._when = number, time.monotonic()
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                with suppress(OSError, ValueError):
                    if select.select([], [STDERR], [], 0.0)[1]:  # a stuck reader must not block us
                        os.write(STDERR, b"finishing the step, then saving; Ctrl-C again ends at once\n")


class Watchdog:
    """Ends this process, with exit code 1, when the work it watches takes much longer than usual.

    The limit is `seconds` (0: no limit) or, if longer, ten times the median of the last times. One process that
    hangs leaves the others waiting in their next exchange, so each notices by itself and prints its own stacks. A
    Python thread says where training is. If the interpreter's lock is held, faulthandler's own thread, which needs
    no lock, prints the stacks two seconds later and exits.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self._times: dict[str, deque[float]] = {}
        self._deadline = float("inf")
        self._what = ""
        self._closed = threading.Event()
        self.close = self._closed.set
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self, what: str, step: int, first_seconds: float = FIRST_SECONDS) -> Iterator[None]:
        """Watch the work in the block; while `what` was never timed, the limit is at least `first_seconds`."""
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

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            if time.monotonic() > self._deadline:
                text = f"rank {self.rank}: {self._what}; this process prints its stacks and ends:\n"
                os.write(STDERR, text.encode())
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                sys.stdout.flush()
                time.sleep(1)  # our end breaks the others' exchange: let them print their stacks before
                os._exit(1)


@dataclass
class Guard:
    """Judges each step by its mean loss and gradient norm, which all processes share: so all decide alike."""

    sigma: float = 0.0  # skip a step more than this many deviations above the mean of the window; 0: never
    # Those of the last steps that were not skipped: an outlier must not widen what counts as usual.
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skips: int = 0  # updates skipped in a row
    total_skips: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Note a step; return why its update must be skipped, or None if it may be made."""
        if reason := self._reason(loss, norm):
            self.skips += 1
            self.total_skips += 1
            return reason
        self.skips = 0
        if self.sigma:
            self.losses = [*self.losses, loss][-WINDOW:]
            self.norms = [*self.norms, norm][-WINDOW:]
        return None

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        for name, value, usual in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if self.sigma and len(usual) >= FEWEST and (score := deviations(value, usual)) > self.sigma:
                return f"{name} {value:.4g} is {score:.1f} deviations above the last {len(usual)}"
        return None


def deviations(value: float, usual: Sequence[float]) -> float:
    """Return by how many standard deviations (at least a thousandth of the mean) `value` is above the mean."""
    mean = fmean(usual)
    return (value - mean) / max(pstdev(usual, mean), 1e-3 * abs(mean), 1e-12)
