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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import Any

# A terminal or ssh that closes sends SIGHUP. Slurm can send SIGUSR1 some minutes before the end of a job's time
# (sbatch --signal); other batch systems and `ulimit -t` send SIGXCPU then.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
STDERR = 2
TICK = 0.2  # seconds between two looks of the watchdog
FIRST_SECONDS = 1800.0  # limit for work that was never timed: the first step compiles
WINDOW = 128  # the last steps, which define what is usual, as in llm.c and OLMo
FEWEST = 20  # with fewer steps a deviation means nothing


class StopSignal:
    """This notes the first signal that asks the run to save and end; the loop asks for its `number` once a step.

    The death of torchrun counts as the SIGTERM that it could not send. A SIGHUP that was ignored at the start, as
    under nohup, stays so. A second SIGINT ends the process at once, which is safe since files appear whole or not
    at all. Within a second it counts as the same one: at a Ctrl-C the terminal sends it to all processes, and
    torchrun sends it again.
    """

    def __init__(self) -> None:
        self._number = 0
        self._when = 0.0
        self.training = False  # set at the first step: before it there is nothing to finish or to save
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def number(self) -> int:
        """The signal's number, or 0."""
        if not self._number and self._launcher and os.getppid() != self._launcher:
            self._number = signal.SIGTERM
            write_stderr(f"rank {this_rank()}: torchrun (process {self._launcher}) has died: stopping\n")
        return self._number

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Note signals while the block runs, so that they do not end the process."""
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self._number and number == signal.SIGINT and time.monotonic() - self._when > 1:
            if this_rank() == 0:
                write_stderr("ended at once; the same command resumes from the last checkpoint, if there is one\n")
            os._exit(128 + number)
        if not self._number:
            self._number, self._when = number, time.monotonic()
            if number == signal.SIGINT and this_rank() == 0:
                way = "finishing the step, then saving" if self.training else "stopping before the first step"
                write_stderr(f"{way}; Ctrl-C again ends at once{' without saving' * self.training}\n")


def this_rank() -> int:
    """Return the rank that a launcher gave this process."""
    return int(os.environ.get("RANK", 0))


def write_stderr(text: str) -> None:
    """Write without Python's stream, which a signal may have interrupted; a terminal may be gone, a pipe stuck."""
    with suppress(OSError, ValueError):
        if select.select([], [STDERR], [], 0.0)[1]:
            os.write(STDERR, text.encode())


class Watchdog:
    """Ends this process, with exit code 1, when the work it watches takes much longer than usual.

    The limit is `seconds` (0: no limit) or, if longer, ten times the median of the last times. One process that
    hangs leaves the others waiting in their next exchange, so each notices by itself and prints its own stacks.
    The time in which the process was stopped (Ctrl-Z, SIGSTOP) does not count.

    A Python thread keeps the time. Where the interpreter's lock is held, it cannot run, and faulthandler's thread,
    which needs no lock, prints the stacks and exits after ten times `seconds`. That one counts a stop as well.
    """

    def __init__(self, rank: int, seconds: float, onward: Callable[[], str] = lambda: "resumes") -> None:
        self.rank, self.seconds, self.onward = rank, seconds, onward  # onward: says what the same command does
        self._times: dict[str, deque[float]] = {}
        self._stopped = 0.0  # seconds in which this process did not run
        self._deadline = float("inf")
        self._what = ""
        self._closed = threading.Event()
        self.close = self._closed.set
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self, what: str, step: int, first_seconds: float = FIRST_SECONDS) -> Iterator[None]:
        """Watch the work in the block; while `what` was never timed, the limit is at least `first_seconds`."""
        times = self._times.setdefault(what, deque(maxlen=64))
        limit = max(self.seconds, 10 * median(times) if times else first_seconds)
        started = self._now()
        self._what = f"no progress for {limit:.3g} s in step {step} ({what})"
        self._deadline = started + limit
        try:
            yield
        finally:
            self._deadline = float("inf")
        times.append(self._now() - started)

    def _now(self) -> float:
        return time.monotonic() - self._stopped

    def _watch(self) -> None:
        last = armed = -float("inf")
        while not self._closed.wait(TICK):
            now = time.monotonic()
            if 1 < now - last < float("inf"):
                self._stopped += now - last - TICK
            if now - armed > 1:
                faulthandler.dump_traceback_later(min(max(10 * self.seconds, 5), 3e6), exit=True, file=STDERR)
                armed = now
            last = now
            if self._now() > self._deadline:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        write_stderr(f"rank {self.rank}: {self._what}; this process prints its stacks and ends:\n")
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        with suppress(Exception):  # whatever the disk says: this thread must come to its end
            write_stderr(f"the same command {self.onward()}\n")
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
