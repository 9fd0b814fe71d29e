"""Cases are timed in processes of their own, which take turns: the side that answers, and the side that asks.

So contenders, or two revisions of the packages, are measured as if each were alone, and a machine that drifts
drifts for all of them.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.machine import rate
from benchmarks.report import bar, ratio_of, say, spread

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE_SECONDS, MOST_REPEATS = 0.5, 50


@dataclass(frozen=True)
class Bench:
    """How all cases of a benchmark are measured. They share files, such as a model, in `folder`."""

    folder: str
    threads: int
    device: str
    rounds: int

    def place(self, name: str) -> Path:
        return Path(self.folder) / name


@dataclass(frozen=True)
class Ready:
    """What is timed, when everything is loaded.

    Attributes:
        call: does it once. It may return its own seconds, or a dictionary of "seconds" and an "answer": lists of
            numbers by name, which all cases of a group must agree on.
        amount: units of a call.
        ceiling: the rate of the machine that bounds it, if one does; `cost`: what that counts, of a call.
        warm_up: calls before the timed ones; without any, a sample is one call, however short.
        memory: returns the most bytes that a call took, where that is not this process's own memory.
    """

    call: Callable[[], object]
    amount: float
    ceiling: str | None = None
    cost: float = 0.0
    warm_up: int = 2
    memory: Callable[[], int] | None = None


@dataclass(frozen=True)
class Case:
    """A contender: in a process of its own `prepare(bench, **options)` makes it ready."""

    name: str
    text: str
    unit: str
    prepare: Callable[..., Ready]
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")


def answer() -> None:
    """Answer each line of the input with a line of JSON: one sample, between two measurements of the machine."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    module, function, options, settings = sys.argv[1:]
    bench = Bench(**json.loads(settings))
    tempfile.tempdir = bench.folder
    ready: Ready = getattr(import_module(module), function)(bench, **json.loads(options))
    memory = ready.memory or (lambda: _peak_memory(bench.device))
    _peak_memory(bench.device, forget=True)
    last = 0.0
    for _ in range(ready.warm_up):
        last = _sample(ready.call)["seconds"]
    peak = memory()  # before the machine is measured, which takes memory itself
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE_SECONDS / last))) if last else 1
    ceiling = ready.ceiling and (ready.ceiling, bench.threads, bench.device)
    print(json.dumps({"amount": ready.amount, "ceiling": ready.ceiling}), file=answers, flush=True)
    for _ in sys.stdin:
        before = rate(*ceiling) if ceiling else 0.0
        samples = [_sample(ready.call) for _ in range(repeats)]
        sample = samples[-1] | {"seconds": sum(one["seconds"] for one in samples) / repeats}
        sample["peak_memory"] = peak if ready.warm_up else memory()
        if ceiling:
            best = max(before, rate(*ceiling))
            sample |= {"machine": best, "share": ready.cost / sample["seconds"] / best}
        print(json.dumps(sample), file=answers, flush=True)


def _sample(call: Callable[[], object]) -> dict[str, Any]:
    started = time.perf_counter()
    result = call()
    seconds = result if isinstance(result, float) else time.perf_counter() - started
    return {"seconds": seconds, **(result if isinstance(result, dict) else {})}


def _peak_memory(device: str, forget: bool = False) -> int:
    """The most bytes that the GPU, or this process, had; `forget`: what making ready took."""
    if forget:
        with suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        import torch

        if forget:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    return largest(resource.getrusage(resource.RUSAGE_SELF))


def largest(usage: resource.struct_rusage) -> int:
    """The most bytes of memory that a process, or the largest of several, had."""
    return usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss


class Worker:
    """The asking side of a case's process. `failed` says why that has ended."""

    def __init__(self, case: Case, bench: Bench, tree: Path = ROOT) -> None:
        sources = [str(path) for path in sorted(tree.glob("packages/*/src"))]
        path = os.pathsep.join([*sources, str(ROOT / "tools"), *filter(None, [os.getenv("PYTHONPATH")])])
        environment = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": str(bench.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        words = [
            case.prepare.__module__,
            case.prepare.__name__,
            json.dumps(case.options),
            json.dumps(asdict(bench)),
        ]
        self.case, self._errors = case, tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.harness import answer; answer()", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}
        self.failed = ""

    def wait(self) -> None:
        """Wait until it is warm, or has failed."""
        try:
            self.facts = self._answer()
        except ValueError as error:
            self.failed = str(error)

    def time(self) -> dict[str, Any]:
        """Return a sample. Raises ValueError if the process ended, with the last line that it wrote."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # the answer that does not come says why
            self._process.stdin.write("time\n")
            self._process.stdin.flush()
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
    """Yield them warm. They start one after the other: the first makes the files that all read."""
    with ExitStack() as stack:
        warm = []
        for worker in started:
            stack.callback(worker.close)
            worker.wait()
            warm.append(worker)
        yield warm


def take_turns(contenders: Sequence[Worker], rounds: int) -> list[list[dict[str, Any]]]:
    """Return `rounds` samples of each contender; whoever begins a round ends the next one.

    One that fails takes no more part, and `failed` says why.
    """
    samples: list[list[dict[str, Any]]] = [[] for _ in contenders]
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


def measure(groups: Iterable[Sequence[Case]], bench: Bench, tolerance: float = 0.0) -> dict[str, Any]:
    """Time cases: those of a group take turns, and have ratios to the group's first one.

    Raises:
        ValueError: answers differ by more than the tolerance, so that speeds mean nothing.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for group in groups:
        for case in group:
            say(f"{case.name}: {case.text}")
        with workers(Worker(case, bench) for case in group) as contenders:
            samples = take_turns(contenders, bench.rounds)
        present = [(w, taken) for w, taken in zip(contenders, samples, strict=True) if not w.failed]
        absent |= {worker.case.name: worker.failed for worker in contenders if worker.failed}
        same_answers([(worker.case.name, taken) for worker, taken in present], tolerance)
        of_group = [result_of(worker, taken) for worker, taken in present]
        for result in [] if contenders[0].failed else of_group[1:]:
            result["ratio"] = ratio_of(of_group[0], result)
        results += of_group
    return {"settings": asdict(bench), "results": results, "absent": absent}


def same_answers(samples: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], tolerance: float) -> None:
    """Raise ValueError if a case's answers are not those of the others."""
    known: dict[str, list[float]] = {}
    for name, taken in samples:
        for key, values in (pair for sample in taken for pair in sample.get("answer", {}).items()):
            pairs = zip(values, known.setdefault(key, values), strict=True)
            if any(abs(one - other) > tolerance for one, other in pairs):
                raise ValueError(f"{name} gives another {key} than the others: its speed means nothing")


def result_of(worker: Worker, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what follows from the samples: median, least, most and all of them."""
    facts, names = worker.facts, ("seconds", "machine", "share") if worker.facts["ceiling"] else ("seconds",)
    return {
        "name": worker.case.name,
        "unit": worker.case.unit,
        "per_second": spread([facts["amount"] / sample["seconds"] for sample in samples]),
        "peak_memory": max(sample["peak_memory"] for sample in samples),
        "ceiling": facts["ceiling"],
        **{name: spread([sample[name] for sample in samples]) for name in names},
    }


def compare(cases: Sequence[Case], base: str, bench: Bench, least: float) -> dict[str, Any]:
    """Time the cases with the packages of a revision and with those of the working tree, in turn.

    A case that fails on both sides, or with the revision alone, is absent; one that fails with the working tree
    alone is a bar that does not hold.

    Raises:
        ValueError: there is no such revision, or all cases are absent.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    bars = []
    with checkout(base) as tree:
        for case in cases:
            say(f"{case.name}: {case.text}")
            with workers(Worker(case, bench, one) for one in (tree, ROOT)) as (old, new):
                sides = take_turns([old, new], bench.rounds)
            if new.failed and not old.failed:
                bars.append(bar(f"{case.name}: works ({new.failed})", 0, 1))
            elif old.failed:
                absent[case.name] = old.failed if new.failed else f"with {base}: {old.failed}"
            else:
                before, after = result_of(old, sides[0]), result_of(new, sides[1])
                ratio = ratio_of(after, before)
                results.append(after | {"base_seconds": before["seconds"], "ratio": ratio})
                text = f"{case.name}: {least:g} of the speed of {base}"
                bars.append(bar(text, ratio["median"], least))
    if not bars:
        raise ValueError(f"nothing could be compared: {'; '.join(f'{k}: {v}' for k, v in absent.items())}")
    return {"base": base, "settings": asdict(bench), "results": results, "absent": absent, "bars": bars}


def commit_of(revision: str) -> str:
    """The hash of a commit. Raises ValueError if there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{revision!r} is no commit of {ROOT}: give a branch, a tag or a hash")
    return done.stdout.strip()


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Yield the tree of a commit, which is removed afterwards. Raises ValueError if there is none."""
    git, commit = ["git", "-C", str(ROOT), "worktree"], commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="gpt2-tree-") as temporary:
        tree = Path(temporary) / commit
        subprocess.run([*git, "prune"], check=True)  # of one that was killed
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
