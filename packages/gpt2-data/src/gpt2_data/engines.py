"""Where the work units run: here, in processes that may die without taking the build with them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

TRIES = 3  # how often a task may kill its worker before we give up


def run(
    function: Callable[[T], R],
    tasks: Sequence[T],
    workers: int,
    name: Callable[[T], str],
    done: Callable[[T, R], None],
) -> list[R]:
    """`function` of each task, the results in the order of the tasks; `done` is told of each as it ends.

    An exception ends the run at once. A worker that dies is noticed: what it may have been at is done again, each
    task alone in a fresh process, and a task that kills its worker again and again raises OSError with its name.
    So a task must be one that can be done twice.
    """
    results: dict[int, R] = {}

    def finish(i: int, result: R) -> None:
        results[i] = result
        done(tasks[i], result)

    if workers == 1 or len(tasks) <= 1:
        for i, task in enumerate(tasks):
            finish(i, function(task))
        return [results[i] for i in range(len(tasks))]
    waiting = list(range(len(tasks)))[::-1]
    while waiting:
        suspects = _run_pool(function, tasks, waiting, min(workers, len(waiting)), finish)
        for i in suspects:  # which of them killed the worker is not known
            finish(i, _run_alone(function, tasks[i], name))
    return [results[i] for i in range(len(tasks))]


def _run_pool(
    function: Callable[[T], R],
    tasks: Sequence[T],
    waiting: list[int],
    workers: int,
    finish: Callable[[int, R], None],
) -> list[int]:
    """Take tasks off `waiting` until it is empty or a worker dies; returns the tasks that were running then."""
    running: dict[Future[R], int] = {}
    pool = _pool(workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:  # no more than run, so that few are suspects
                running[pool.submit(function, tasks[waiting[-1]])] = waiting[-1]
                waiting.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                finish(running.pop(future), result)
    except BrokenProcessPool:
        return sorted(running.values())
    except BaseException:
        _terminate(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return []


def _run_alone(function: Callable[[T], R], task: T, name: Callable[[T], str]) -> R:
    for _ in range(TRIES - 1):
        with _pool(1) as pool:
            try:
                return pool.submit(function, task).result()
            except BrokenProcessPool:
                continue
            except BaseException:
                _terminate(pool)
                raise
    raise OSError(
        f"{name(task)}: the process at work on it died {TRIES} times, "
        "as if killed for its memory or crashed: try --workers 1"
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: a copy of a process with threads (Arrow's, the tokenizer's) may hang.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _terminate(pool: ProcessPoolExecutor) -> None:
    """Do not wait for work that nobody wants. Python before 3.14 has no public way to say so."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed must not stay behind, waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
