"""A call that is timed in a process of its own: the side that answers, and the side that asks.

So contenders, or two revisions of the packages, can take turns, each as if it were alone.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_report import spread

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS, MOST_REPEATS = 0.5, 50


@dataclass(frozen=True)
class Ready:
    """What is timed.

    Attributes:
        call: does it once. Seconds that it returns count instead of the clock's.
        amount: units of a call; speeds are units a second.
        ceiling: the machine's rate that bounds it, as bench_machine.Machine.rate knows it; None if nothing does.
        cost: of a call, in what the rate counts: floating-point operations or bytes.
        warm_up: calls that are not timed, before.
        memory: bytes that a call took at most, where that is not this process's.
    """

    call: Callable[[], object]
    amount: float
    ceiling: str | None = None
    cost: float = 0.0
    warm_up: int = 2
    memory: Callable[[], int] | None = None


def answer(prepare: Callable[[], Ready], folder: Path, threads: int, device: str) -> None:
    """Answer each line of the input with one of JSON: what a call takes, between two measurements of the machine.

    A call that is shorter than half a second is made several times for one answer, which is their mean.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    from bench_machine import Machine

    ready = prepare()
    _forget_peak(device)
    last = 0.0
    for _ in range(ready.warm_up):
        last = _seconds(ready.call)
    memory = ready.memory or (lambda: _peak_memory(device))
    peak = memory()  # before the machine is measured, which takes memory itself
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE_SECONDS / last))) if last else 1
    machine, ceiling = Machine(folder, threads, device), ready.ceiling
    print(json.dumps({"amount": ready.amount, "ceiling": ceiling}), file=answers, flush=True)
    for _ in sys.stdin:
        before = machine.rate(ceiling) if ceiling else 0.0
        seconds = sum(_seconds(ready.call) for _ in range(repeats)) / repeats
        sample = {"seconds": seconds, "peak_memory": peak if ready.warm_up else memory()}
        if ceiling:
            rate = max(before, machine.rate(ceiling))
            sample |= {"machine": rate, "share": ready.cost / seconds / rate}
        print(json.dumps(sample), file=answers, flush=True)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    told = call()
    return told if isinstance(told, float) else time.perf_counter() - started


def _forget_peak(device: str) -> None:
    """Of memory, what making ready took: weights as they were loaded, a dataset that was built."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: str) -> int:
    """Bytes, at most, since then: of the GPU, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return largest(resource.getrusage(resource.RUSAGE_SELF))


def largest(usage: resource.struct_rusage) -> int:
    """Bytes of memory that a process, or the largest of several, had at most."""
    return usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss


class Worker:
    """The other side: a process that answers."""

    def __init__(self, name: str, command: Sequence[str | Path], threads: int, tree: Path = ROOT) -> None:
        sources = [str(path) for path in sorted(tree.glob("packages/*/src"))]
        path = os.pathsep.join([*sources, str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self.name, self._errors = name, tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env=environment,
        )  # fmt: skip
        self._asked = self._process.stdin
        self.facts: dict[str, Any] = {}
        self.failed = ""

    def wait(self) -> None:
        """Until it is warm, or has `failed`: why, is in there."""
        try:
            self.facts = self._answer()
        except ValueError as error:
            self.failed = str(error)

    def time(self) -> dict[str, float]:
        """A call's seconds, peak memory in bytes and, under a ceiling, the machine's rate and our share of it.

        Raises:
            ValueError: the process ended; the last line that it wrote is in the message.
        """
        assert self._asked
        with suppress(BrokenPipeError):  # it is gone: why, comes with the answer that it does not give
            self._asked.write("time\n")
            self._asked.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with self._errors, suppress(BrokenPipeError):
            self._process.communicate()  # and closes its pipes

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)  # type: ignore[no-any-return]
        code = self._process.wait()
        if code == -signal.SIGKILL:
            raise ValueError("killed by the system, of too little memory perhaps: use --only for fewer at a time")
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or [f"ended with {code}"]
        raise ValueError(words[0].removeprefix("ValueError: "))


@contextmanager
def workers(started: Iterable[Worker]) -> Iterator[list[Worker]]:
    """Warm. From a generator they start one after the other: the first makes the files that all read."""
    with ExitStack() as held:
        warm = []
        for worker in started:
            held.callback(worker.close)
            worker.wait()
            warm.append(worker)
        yield warm


def take_turns(contenders: Sequence[Worker], rounds: int) -> list[list[dict[str, float]]]:
    """Samples of each contender, `rounds` of them; whoever begins a round ends the next one.

    One that fails takes no more part, and `failed` says why.
    """
    samples: list[list[dict[str, float]]] = [[] for _ in contenders]
    for turn in range(rounds):
        order = range(len(contenders))
        for index in order if turn % 2 else reversed(order):
            contender = contenders[index]
            if not contender.failed:
                try:
                    samples[index].append(contender.time())
                except ValueError as error:
                    contender.failed = str(error)
    return samples


def result_of(worker: Worker, unit: str, samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What follows from the samples: median, least, most, and all of them."""
    result: dict[str, Any] = {
        "name": worker.name,
        "unit": unit,
        "per_second": spread([worker.facts["amount"] / sample["seconds"] for sample in samples]),
        "seconds": spread([sample["seconds"] for sample in samples]),
        "peak_memory": max(sample["peak_memory"] for sample in samples),
        "ceiling": worker.facts["ceiling"],
    }
    if worker.facts["ceiling"]:
        result["machine"] = spread([sample["machine"] for sample in samples])
        result["share"] = spread([sample["share"] for sample in samples])
    return result
