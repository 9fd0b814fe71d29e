"""Run the tasks of a build in processes here, or on a Ray cluster. Either may die without the build."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_LOOKS_EVERY = 0.2  # seconds between looks at whether a task that had to wait is ready
_NODE_DEATHS = 100  # a task whose machine is lost, through no fault of its own, runs again, but not for ever


@dataclass(frozen=True)
class Job(Generic[T, R]):
    """A function to run on each of the tasks, and what goes with it.

    Attributes:
        function: does a task. It may run twice where a process died, so twice must do no harm. This and `again`
            go to other processes: they must be importable by name.
        again: does a task that may have killed its process, and leaves a trace of where it is.
        blame: names what a task was at that killed a process twice.
        done: is told, in this process, of each result.
        ready: says, in this process, if a task can begin, whenever it is asked. What it raises ends the run.
    """

    function: Callable[[T], R]
    again: Callable[[T], R]
    blame: Callable[[T], str]
    done: Callable[[T, R], None] = lambda task, result: None
    ready: Callable[[T], bool] = lambda task: True

    def take_ready(self, tasks: Sequence[T], waiting: list[int]) -> int | None:
        """Take the first task off `waiting` if it can begin, else return None.

        Not a later one: tasks are in the order in which the files that they wait for are fetched.
        """
        return waiting.pop(0) if waiting and self.ready(tasks[waiting[0]]) else None

    def killed_twice(self, task: T) -> OSError:
        """Return the error of a task that kills whoever works on it."""
        return OSError(
            f"{self.blame(task)}: the process that worked on it died twice (out of memory, or a crash): "
            "fix or remove it, or try --workers 1"
        )


def run(job: Job[T, R], tasks: Sequence[T], workers: int) -> list[R]:
    """Do the tasks in processes of this machine and return their results in the order of the tasks.

    An exception ends the run at once. If a worker dies, the tasks that ran are done again, each alone in a fresh
    process; one that kills that process too raises OSError with what it was at.
    """
    results: dict[int, R] = {}

    def finish(i: int, result: R) -> None:
        results[i] = result
        job.done(tasks[i], result)

    waiting = list(range(len(tasks)))
    if workers == 1 or len(tasks) <= 1:  # here
        for i, task in enumerate(tasks):
            while not job.ready(task):
                time.sleep(_LOOKS_EVERY)
            finish(i, job.function(task))
        waiting = []
    while waiting:
        for i in _run_pool(job, tasks, waiting, min(workers, len(waiting)), finish):
            with _pool(1) as pool:
                try:
                    finish(i, pool.submit(job.again, tasks[i]).result())
                except BrokenProcessPool:
                    raise job.killed_twice(tasks[i]) from None
    return [results[i] for i in range(len(tasks))]


def _run_pool(
    job: Job[T, R], tasks: Sequence[T], waiting: list[int], workers: int, finish: Callable[[int, R], None]
) -> list[int]:
    """Take tasks off `waiting` until it is empty or a worker dies; return the tasks that were running then."""
    running: dict[Future[R], int] = {}
    with _pool(workers) as pool:
        try:
            while waiting or running:
                # No more than run at a time, so that few are suspects if a worker dies.
                while len(running) < workers and (i := job.take_ready(tasks, waiting)) is not None:
                    try:
                        running[pool.submit(job.function, tasks[i])] = i
                    except BrokenProcessPool:
                        waiting.insert(0, i)
                        raise
                if not running:
                    time.sleep(_LOOKS_EVERY)
                idle = bool(waiting) and len(running) < workers
                for future in wait(running, _LOOKS_EVERY if idle else None, FIRST_COMPLETED).done:
                    result = future.result()
                    finish(running.pop(future), result)
        except BrokenProcessPool:
            pool.shutdown(wait=True)
    return sorted(running.values())


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes; they are ended with the block, without waiting for work that nobody wants."""
    # Not fork: a copy of a process with threads (Arrow's, the tokenizer's) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()  # Python before 3.14 has no public way to say so
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=False)  # the workers' end takes 0.2 s, in which the shards are begun


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not stay behind, waiting, when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only wait, busily
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- Ray


def run_on_ray(job: Job[T, R], tasks: Sequence[T], workers: int | None) -> list[R]:
    """Do the tasks as `run` does, on a Ray cluster.

    The cluster is the one that RAY_ADDRESS names, or that runs on this machine, or else one of this machine alone.
    Only tasks and results travel, both small: the rest is in the dataset's folder, which every machine must see
    under the same path.

    Args:
        workers: tasks at a time. None: one for each of the cluster's CPUs.
    """
    ray = _connect()
    function, again = (ray.remote(max_retries=0, num_cpus=1)(call) for call in (job.function, job.again))
    results: dict[int, R] = {}
    waiting, running = list(range(len(tasks))), dict[Any, int]()
    killers: set[int] = set()
    losses = dict.fromkeys(waiting, 0)
    try:
        while waiting or running:
            room = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))  # machines come and go
            while len(running) < room and (i := job.take_ready(tasks, waiting)) is not None:
                running[(again if i in killers else function).remote(tasks[i])] = i
            for reference in ray.wait(list(running), timeout=_LOOKS_EVERY)[0] if running else []:
                i = running.pop(reference)
                try:
                    results[i] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    if i in killers:
                        raise job.killed_twice(tasks[i]) from None
                    killers.add(i)
                    waiting.insert(0, i)
                except ray.exceptions.RayError as error:  # its machine is gone
                    losses[i] += 1
                    if losses[i] > _NODE_DEATHS:
                        raise OSError(f"the Ray cluster lost one machine after another: {error}") from None
                    waiting.insert(0, i)
                else:
                    job.done(tasks[i], results[i])
    finally:
        for reference in running:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
    return [results[i] for i in range(len(tasks))]


def _connect() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of what is to change
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'gpt2-data[ray]'") from None
    if not ray.is_initialized():
        _check_that_it_answers(os.environ.get("RAY_ADDRESS", ""))
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return ray


def _check_that_it_answers(address: str) -> None:
    """Try the cluster's address for ten seconds: Ray itself tries for minutes."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match is not None:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise OSError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from None
