"""A trace of a few steps, for chrome://tracing and ui.perfetto.dev."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# The first steps of a process compile, choose kernels and fill caches.
SKIPPED = 10


class Profiler:
    """Traces some steps of this process into `folder`/profile/steps-A-B.json.gz, Chrome's trace format.

    Used around each step, and as a context around the run, so that a run that stops in between has its trace too:

        with Profiler(folder, 3, left=config.steps - step, enabled=is_main, say=log.say) as profiler:
            with profiler.step(step + 1):
                ...

    Args:
        folder: of the run.
        steps: to trace; 0 for none.
        left: steps that this process is going to do. The first ten are passed over, or, if that leaves too few,
            the first one.
        enabled: on rank 0.
        say: is told where the trace is, or why there is none: no reason to stop a run.
    """

    def __init__(self, folder: Path, steps: int, left: int, enabled: bool, say: Callable[[str], None]) -> None:
        self.folder, self.enabled, self.say = folder / "profile", enabled and steps > 0 and left > 0, say
        skipped = SKIPPED if left >= SKIPPED + steps else min(1, left - 1)
        self.first, self.last = (
            skipped + 1,
            skipped + min(steps, left - skipped),
        )  # counted from this process's first
        self.done = 0
        self._profile: profile | None = None
        self._numbers: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number` of the run."""
        if not self.enabled:
            yield
            return
        self.done += 1
        if self.done == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, acc_events=True)
            self._profile.start()
        if self._profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self._numbers.append(number)
        if self.done == self.last:
            self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        tracing, self._profile, self.enabled = self._profile, None, False
        tracing.stop()
        if not self._numbers:
            return
        path = self.folder / f"steps-{self._numbers[0]}-{self._numbers[-1]}.json.gz"
        temporary = self.folder / f".tmp-{path.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tracing.export_chrome_trace(str(temporary))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            self.say(f"profile: {path}, for chrome://tracing and ui.perfetto.dev")
        except OSError as error:
            self.say(f"warning: no profile: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write()
