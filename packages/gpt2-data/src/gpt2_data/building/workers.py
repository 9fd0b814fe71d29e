"""Where the tasks of a build run: here, in processes that may die without taking the build with them.

ray_engine.py has the same function for a cluster.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

LOOKS_EVERY = 0.2
"""Seconds between looks at whether a task that had to wait is ready."""


def cores() -> int:
    """Cores that this process may use: of a container or a job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job(Generic[T, R]):
    """What to run. Its functions are importable by name, since they go to other processes."""

    function: Callable[[T], R]
    """Done once for each task, or again where its process died: so doing it twice must do no harm."""
    again: Callable[[T], R]
    """The same for a task that may have killed its process: it leaves a trace of what it is at."""
    blame: Callable[[T], str]
    """Names what a task that killed a process twice was at."""
    done: Callable[[T, R], None] = lambda task, result: None
    """Told, here, of each result."""
    ready: Callable[[T], bool] = lambda task: True
    """Whether the task can begin; asked again and again, here. What it raises ends the run."""


def run(job: Job[T, R], tasks: Sequence[T], workers: int) -> list[R]:
    """The results in the order of the tasks.

    An exception ends the run at once. A worker that dies is noticed: what it may have been at is done again, each
    task alone in a fresh process; one that kills that process too raises OSError with what it was at.
    """
    results: dict[int, R] = {}

    def finish(i: int, result: R) -> None:
        results[i] = result
        job.done(tasks[i], result)

    if workers == 1 or len(tasks) <= 1:
        discard_early()
        for i, task in enumerate(tasks):
            while not job.ready(task):
                threading.Event().wait(LOOKS_EVERY)
            finish(i, job.function(task))
        return [results[i] for i in range(len(tasks))]
    waiting = list(range(len(tasks)))
    while waiting:
        suspects = _run_pool(job, tasks, waiting, min(workers, len(waiting)), finish)
        for i in suspects:  # which of them killed the worker is not known
            finish(i, _run_alone(job, tasks[i]))
    return [results[i] for i in range(len(tasks))]


def take_ready(job: Job[T, R], tasks: Sequence[T], waiting: list[int]) -> int | None:
    """Take the first task that can begin off `waiting`; None if none can.

    Only as far as the first that cannot: tasks are in the order in which what they wait for is fetched.
    """
    return waiting.pop(0) if waiting and job.ready(tasks[waiting[0]]) else None


def _run_pool(
    job: Job[T, R], tasks: Sequence[T], waiting: list[int], workers: int, finish: Callable[[int, R], None]
) -> list[int]:
    """Take tasks off `waiting` until it is empty or a worker dies; returns the tasks that were running then."""
    running: dict[Future[R], int] = {}
    pool = _take_early(workers) or _pool(workers)
    try:
        while waiting or running:
            # No more than run at a time, so that few are suspects if a worker dies.
            while len(running) < workers and (i := take_ready(job, tasks, waiting)) is not None:
                try:
                    running[pool.submit(job.function, tasks[i])] = i
                except BrokenProcessPool:
                    waiting.insert(0, i)
                    raise
            if not running:
                threading.Event().wait(LOOKS_EVERY)
            idle = bool(waiting) and len(running) < workers
            for future in wait(running, LOOKS_EVERY if idle else None, FIRST_COMPLETED).done:
                result = future.result()
                finish(running.pop(future), result)
    except BrokenProcessPool:
        pool.shutdown(wait=True)
        return sorted(running.values())
    except BaseException:
        _terminate(pool)
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=False)  # the workers' end takes 0.2 s, in which the shards are begun
    return []


def _run_alone(job: Job[T, R], task: T) -> R:
    with _pool(1) as pool:
        try:
            return pool.submit(job.again, task).result()
        except BrokenProcessPool:
            raise OSError(killed_twice(job, task)) from None
        except BaseException:
            _terminate(pool)
            raise


def killed_twice(job: Job[T, R], task: T) -> str:
    """The message for a task that kills whoever works on it."""
    return (
        f"{job.blame(task)}: the process at work on it died twice, as if killed for its memory or crashed: "
        "mend or remove it, or try --workers 1"
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: a copy of a process with threads (Arrow's, the tokenizer's) may hang.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


_early: tuple[int, ProcessPoolExecutor] | None = None


def start_early(workers: int, backend: str) -> None:
    """Start the workers of the run to come. They load what they need while the caller still plans: 0.7 s less."""
    global _early
    _early = workers, _pool(workers)
    for _ in range(workers):
        _early[1].submit(_load, backend)


def discard_early() -> None:
    """End the workers that were started early and not used."""
    global _early
    if _early is not None:
        _terminate(_early[1])
        _early = None


def _take_early(workers: int) -> ProcessPoolExecutor | None:
    global _early
    if _early is None or _early[0] < workers:
        discard_early()
        return None
    (_, pool), _early = _early, None
    return pool


def _load(backend: str) -> None:
    import pyarrow as pa

    from gpt2_data import tokenizer

    for name in "pyarrow.parquet", "gpt2_data.building.tokenize_units":
        importlib.import_module(name)
    with contextlib.suppress(ValueError):  # the caller will say so
        tokenizer.encode_texts(pa.array(["warm"]), tokenizer.choose_backend(backend))


def _terminate(pool: ProcessPoolExecutor) -> None:
    """Do not wait for work that nobody wants. Python before 3.14 has no public way to say so."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed must not stay behind, waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy's threads have nothing to do here but to wait busily
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
