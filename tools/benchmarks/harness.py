"""Cases are timed in processes of their own, which take turns: the side that answers, and the side that asks.

So contenders, or two revisions of the packages, are measured as if each were alone, and a machine that drifts
drifts for all of them.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
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

    def place(self, name: str) -> Path:
        return Path(self.folder) / name


@dataclass(frozen=True)
class Ready:
    """What is timed, when everything is loaded.

    Attributes:
        call: does it once. It may return a dictionary of its own "seconds", the "peak_memory" of another process,
            and an "answer": lists of numbers by name, which all cases of a group must agree on.
        amount: units of a call.
        ceiling: the rate of the machine that bounds it, if one does; `cost`: what that counts, of a call.
        warm_up: calls before the timed ones; without any, a sample is one call, however short.
    """

    call: Callable[[], object]
    amount: float
    ceiling: str | None = None
    cost: float = 0.0
    warm_up: int = 2


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
    _peak_memory(bench.device, forget=True)
    last = 0.0
    for _ in range(ready.warm_up):
        last = _sample(ready.call)["seconds"]
    peak = _peak_memory(bench.device)  # before the machine is measured, which takes memory itself
    repeats = max(1, min(MOST_REPEATS, round(SAMPLE_SECONDS / last))) if last else 1
    ceiling = ready.ceiling and (ready.ceiling, bench.threads, bench.device)
    print(json.dumps({"amount": ready.amount, "ceiling": ready.ceiling}), file=answers, flush=True)
    for _ in sys.stdin:
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


def rate(name: str, threads: int, device: str) -> float:
    """What the machine reaches itself, the best of a few tries: beside it a speed means something anywhere.

    Operations a second of "matrix fp32" or "matrix bf16"; bytes of "read" and "copy", which are of memory, and of
    "sha256", a hash on each thread.
    """
    amount, call = _machine(name, threads, device)
    best = float("inf")
    for _ in range(16 if name == "read" else 3):
        started = time.perf_counter()
        call()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return amount / best


@cache
def _machine(name: str, threads: int, device: str) -> tuple[float, Callable[[], object]]:
    """What a call does, and the call."""
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
        # 36.6 and 35.6 GB/s on two cores.
        memory = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32)).to(device)
        return READ_BYTES, lambda: torch.dot(memory, memory)
    side = 8192 if device == "cuda" else 2048
    kind = {"matrix fp32": torch.float32, "matrix bf16": torch.bfloat16}[name]
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in "ab")
    return 2.0 * side**3, lambda: left @ right


@dataclass
class Worker:
    """The asking side of a case's process. `failed` says why that has ended."""

    case: Case
    process: subprocess.Popen[str]
    errors: IO[bytes]
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""

    def time(self) -> None:
        """Take a sample, unless it has failed."""
        if not self.failed:
            with suppress(BrokenPipeError):  # the answer that does not come says why
                print("time", file=self.process.stdin, flush=True)
            if sample := self.listen():
                self.samples.append(sample)

    def listen(self) -> dict[str, Any]:
        """Return what the process says next: nothing if it has ended, of which its last line is the reason."""
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)  # type: ignore[no-any-return]
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or [f"ended with {code}"]
        if code == -signal.SIGKILL:
            lines = ["killed by the system, of too little memory perhaps: use --only for fewer at a time"]
        self.failed = lines[-1].removeprefix("ValueError: ")
        return {}

    def result(self) -> dict[str, Any]:
        """Return what follows from the samples: median, least, most and all of them."""
        ceiling = self.facts["ceiling"]
        names = ("seconds", "machine", "share") if ceiling else ("seconds",)
        return {
            "name": self.case.name,
            "unit": self.case.unit,
            "per_second": spread([self.facts["amount"] / sample["seconds"] for sample in self.samples]),
            "peak_memory": max(sample["peak_memory"] for sample in self.samples),
            "ceiling": ceiling,
            **{name: spread([sample[name] for sample in self.samples]) for name in names},
        }


@contextmanager
def started(case: Case, bench: Bench, tree: Path) -> Iterator[Worker]:
    """Yield a case's process with the packages of a tree, warm, or failed."""
    path = [*sorted(tree.glob("packages/*/src")), ROOT / "tools", *filter(None, [os.getenv("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": str(bench.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [case.prepare.__module__, case.prepare.__name__, json.dumps(case.options), json.dumps(asdict(bench))]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.harness import answer; answer()", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        try:
            worker = Worker(case, process, errors)
            worker.facts = worker.listen()
            yield worker
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()  # and closes its pipes


def take_turns(cases: Iterable[tuple[Case, Path]], bench: Bench) -> list[Worker]:
    """Time cases, each with the packages of a tree; whoever begins a round ends the next one.

    They start one after the other: the first makes the files that all read.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(started(case, bench, tree)) for case, tree in cases]
        for turn in range(bench.rounds):
            for worker in workers[:: 1 if turn % 2 else -1]:
                worker.time()
    return workers


def measure(groups: Iterable[Sequence[Case]], bench: Bench, tolerance: float = 0.0) -> dict[str, Any]:
    """Time cases: those of a group take turns, and have ratios to the group's first one.

    Raises:
        ValueError: answers differ by more than the tolerance, so that speeds mean nothing.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for group in groups:
        for case in group:
            click.echo(f"{case.name}: {case.text}", err=True)
        workers = take_turns([(case, ROOT) for case in group], bench)
        absent |= {worker.case.name: worker.failed for worker in workers if worker.failed}
        present = [worker for worker in workers if not worker.failed]
        same_answers({worker.case.name: worker.samples for worker in present}, tolerance)
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
            click.echo(f"{case.name}: {case.text}", err=True)
            old, new = take_turns([(case, tree), (case, ROOT)], bench)
            if new.failed and not old.failed:
                bars.append(bar(f"{case.name}: works ({new.failed})", 0, 1))
            elif old.failed:
                absent[case.name] = old.failed if new.failed else f"with {base}: {old.failed}"
            else:
                before, after = old.result(), new.result()
                ratio = ratio_of(after, before)
                results.append(after | {"base_seconds": before["seconds"], "ratio": ratio})
                bars.append(bar(f"{case.name}: {least:g} of the speed of {base}", ratio["median"], least))
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
