"""Time cases in turns, each in a process of its own: the process that asks, and the processes that answer.

So each contender, or revision of the packages, is measured as if it were alone, and if the machine's speed
drifts, it drifts for all of them.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import IO, Any

import click

from benchmarks.report import bar, ratio_of, spread

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE_SECONDS, MOST_REPEATS = 0.5, 50
READ_BYTES, COPY_BYTES, HASH_BYTES = 512 << 20, 256 << 20, 32 << 20


@dataclass(frozen=True)
class Bench:
    """How all cases of a benchmark are measured. They share files, such as a model, in `folder`."""

    folder: str
    threads: int
    device: str
    rounds: int


@dataclass(frozen=True)
class Ready:
    """A case that is loaded and ready to be timed.

    Attributes:
        call: does the work once. It may return a dictionary with its own "seconds", the "peak_memory" of another
            process, and an "answer": lists of numbers by name, which all cases of a group must agree on.
        amount: units per call.
        ceiling: the name of the machine's rate that limits it, if there is one.
        cost: operations or bytes that a call takes of the ceiling.
        warm_up: calls before the timed ones; if 0, a sample is one call, however short.
    """

    call: Callable[[], object]
    amount: float
    ceiling: str | None = None
    cost: float = 0.0
    warm_up: int = 2


@dataclass(frozen=True)
class Case:
    """A contender. Its own process calls `prepare`, such as "benchmarks.data.loading", with Bench and options."""

    name: str
    text: str
    unit: str
    prepare: str
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")


def answer() -> None:
    """Answer each input line with a line of JSON: the first line when all is ready, each other with a sample."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    prepare, options, settings = sys.argv[1:]
    bench, requests = Bench(**json.loads(settings)), iter(sys.stdin)
    next(requests)
    tempfile.tempdir = bench.folder
    ready: Ready = resolve_name(prepare)(bench, **json.loads(options))
    _peak_memory(bench.device, forget=True)
    last = 0.0
    for _ in range(ready.warm_up):
        last = _sample(ready.call)["seconds"]
    peak = _peak_memory(bench.device)  # read before the machine is measured, which takes memory, too
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE_SECONDS / last))) if last else 1
    ceiling = ready.ceiling and (ready.ceiling, bench.threads, bench.device)
    print(json.dumps({"amount": ready.amount, "ceiling": ready.ceiling}), file=answers, flush=True)
    for _ in requests:
        before = rate(*ceiling) if ceiling else 0.0
        samples = [_sample(ready.call) for _ in range(repeats)]
        memory = peak if ready.warm_up else _peak_memory(bench.device)
        seconds = sum(one["seconds"] for one in samples) / repeats
        sample = {"peak_memory": memory, **samples[-1], "seconds": seconds}
        if ceiling:
            best = max(before, rate(*ceiling))
            sample |= {"machine": best, "share": ready.cost / seconds / best}
        print(json.dumps(sample), file=answers, flush=True)


def _sample(call: Callable[[], object]) -> dict[str, Any]:
    started = time.perf_counter()
    result = call()
    return {"seconds": time.perf_counter() - started, **(result if isinstance(result, dict) else {})}


def _peak_memory(device: str, forget: bool = False) -> int:
    """Return the peak memory in bytes, of the GPU or of this process; `forget` resets it."""
    if forget:
        with suppress(OSError):  # only Linux has it
            Path("/proc/self/clear_refs").write_text("5")
    if device == "cuda":
        import torch

        if forget:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    return largest(resource.getrusage(resource.RUSAGE_SELF))


def largest(usage: resource.struct_rusage) -> int:
    """Return the peak memory in bytes of a process, or of the largest of several."""
    return usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss


def rate(name: str, threads: int, device: str) -> float:
    """Return what the machine itself reaches, the best of a few tries, to compare speeds with on any machine.

    Operations per second for "matrix fp32" and "matrix bf16"; bytes per second for "read" and "copy", which use
    memory, and for "sha256", with a hash on each thread.
    """
    amount, call = _machine(name, threads, device)
    return amount / min(timeit.repeat(call, number=1, repeat=16 if name == "read" else 3))


@cache
def _machine(name: str, threads: int, device: str) -> tuple[float, Callable[[], object]]:
    """Return the operations or bytes of a call, and the call."""
    import numpy as np

    if name == "copy":
        source, target = np.ones(COPY_BYTES, np.int8), np.ones(COPY_BYTES, np.int8)
        return COPY_BYTES, lambda: np.copyto(target, source)
    if name == "sha256":
        pool, buffers = ThreadPoolExecutor(threads), [bytes(HASH_BYTES)] * threads
        return threads * HASH_BYTES, lambda: list(pool.map(hashlib.sha256, buffers))
    import torch

    if name == "read":
        # NumPy asks for large pages, which read faster. torch.dot reads as fast as a loop in C with prefetching:
        # 36.6 and 35.6 GB/s on two cores. `item` waits until a GPU has finished.
        memory = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32)).to(device)
        return READ_BYTES, lambda: torch.dot(memory, memory).item()
    side = 8192 if device == "cuda" else 2048
    kind = {"matrix fp32": torch.float32, "matrix bf16": torch.bfloat16}[name]
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in "ab")
    return 2.0 * side**3, lambda: (left @ right)[0, 0].item()


@dataclass
class Worker:
    """A case's process, seen from the asking side. The first answer has amount and ceiling, others are samples."""

    case: Case
    process: subprocess.Popen[str]
    errors: IO[bytes]
    answers: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""

    def ask(self) -> None:
        """Take the next answer. If the process has ended instead, set `failed` to its last line."""
        if self.failed:
            return
        assert self.process.stdout
        with suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            self.answers.append(json.loads(line))
            return
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"ended with {code}"]
        if code == -signal.SIGKILL:
            lines = ["killed by the system, perhaps out of memory: use --only to time fewer at once"]
        self.failed = lines[-1].removeprefix("ValueError: ")

    def result(self) -> dict[str, Any]:
        """Return the statistics of the samples: median, least, most and all of them."""
        (amount, ceiling), samples = self.answers[0].values(), self.answers[1:]
        names = ("seconds", "machine", "share") if ceiling else ("seconds",)
        return {
            "name": self.case.name,
            "unit": self.case.unit,
            "per_second": spread([amount / sample["seconds"] for sample in samples]),
            "peak_memory": max(sample["peak_memory"] for sample in samples),
            "ceiling": ceiling,
            **{name: spread([sample[name] for sample in samples]) for name in names},
        }


@contextmanager
def started(case: Case, bench: Bench, tree: Path) -> Iterator[Worker]:
    """Yield a case's process with the packages of a tree, ready or failed."""
    path = [packages_of(tree), str(ROOT / "tools"), *filter(None, [os.getenv("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(bench.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-c", "from benchmarks.harness import answer; answer()"]
    command += [case.prepare, json.dumps(case.options), json.dumps(asdict(bench))]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
        try:
            worker = Worker(case, process, errors)
            worker.ask()
            yield worker
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()  # also closes its pipes


def take_turns(cases: Iterable[tuple[Case, Path]], bench: Bench) -> list[Worker]:
    """Time cases, each with the packages of a tree; whoever begins a round ends the next one."""
    with ExitStack() as stack:  # they start one by one: the first makes the files that all read
        workers = [stack.enter_context(started(case, bench, tree)) for case, tree in cases]
        for turn in range(bench.rounds):
            for worker in workers[:: 1 if turn % 2 else -1]:
                worker.ask()
    return workers


def measure(groups: Iterable[Sequence[Case]], bench: Bench, tolerance: float = 0.0) -> dict[str, Any]:
    """Time cases: those of a group take turns, and are compared with the group's first case.

    Raises:
        ValueError: answers differ by more than the tolerance, so that speeds mean nothing.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for group in groups:
        click.echo("; ".join(case.name for case in group), err=True)
        workers = take_turns([(case, ROOT) for case in group], bench)
        absent |= {worker.case.name: worker.failed for worker in workers if worker.failed}
        present = [worker for worker in workers if not worker.failed]
        same_answers({worker.case.name: worker.answers[1:] for worker in present}, tolerance)
        of_group = [worker.result() for worker in present]
        for result in [] if workers[0].failed else of_group[1:]:
            result["ratio"] = ratio_of(of_group[0], result)
        results += of_group
    return {"settings": asdict(bench), "results": results, "absent": absent}


def same_answers(samples: Mapping[str, Sequence[Mapping[str, Any]]], tolerance: float) -> None:
    """Raise ValueError if a case's answers are not those of the others."""
    known: dict[str, list[float]] = {}
    for name, of_case in samples.items():
        for key, values in (pair for sample in of_case for pair in sample.get("answer", {}).items()):
            pairs = zip(values, known.setdefault(key, values), strict=True)
            if any(abs(one - other) > tolerance for one, other in pairs):
                raise ValueError(f"{name} gives another {key} than the others: its speed means nothing")


def compare(groups: Iterable[Sequence[Case]], bench: Bench, base: str, least: float) -> dict[str, Any]:
    """Time the cases with the packages of a revision and with those of the working tree, in turn.

    A case that fails with the revision is absent; one that fails with the working tree alone breaks a bar.

    Raises:
        ValueError: there is no such revision, or all cases are absent.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    bars = []
    with checkout(base) as tree:
        for case in chain.from_iterable(groups):
            click.echo(case.name, err=True)
            old, new = take_turns([(case, tree), (case, ROOT)], bench)
            if old.failed:
                absent[case.name] = f"with {base}: {old.failed}"
            elif new.failed:
                bars.append(bar(f"{case.name}: works ({new.failed})", 0, 1))
            else:
                before, after = old.result(), new.result()
                ratio = ratio_of(after, before)
                results.append(after | {"base_seconds": before["seconds"], "ratio": ratio})
                bars.append(bar(f"{case.name}: {least:g} of the speed of {base}", ratio["median"], least))
    if not bars:
        raise ValueError(f"nothing could be compared: {'; '.join(f'{k}: {v}' for k, v in absent.items())}")
    return {"base": base, "settings": asdict(bench), "results": results, "absent": absent, "bars": bars}


def packages_of(tree: Path) -> str:
    """Return the sources of a tree's packages, as a PYTHONPATH."""
    return os.pathsep.join(map(str, sorted(tree.glob("packages/*/src"))))


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Yield the tree of a commit, a folder named by its hash, which is removed afterwards.

    Raises:
        ValueError: there is no such commit.
    """
    git = ["git", "-C", str(ROOT)]
    words = [*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    if not commit:
        raise ValueError(f"{revision!r} is no commit of {ROOT}: give a branch, a tag or a hash")
    with tempfile.TemporaryDirectory(prefix="gpt2-tree-") as temporary:
        tree = Path(temporary) / commit
        subprocess.run([*git, "worktree", "prune"], check=True)  # removes what a killed run left
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)
