"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and end."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Slurm can send SIGUSR1 some minutes before the end of a job's time (sbatch --signal).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Notes the first of the signals that come; the loop asks for it once a step.

    A second SIGINT ends the process at once, since files appear whole or not at all. Within a second it is the
    same one: at a Ctrl-C the terminal sends it to all processes, and torchrun sends it to its own again.

    Attributes:
        number: of the signal that came to this process, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._when = 0.0

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Note the signals that come within, instead of dying of them."""
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
