"""Run the tasks of a build in local processes or on a Ray cluster. The build survives the death of a worker."""

import contextlib
import functools
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_LOOKS_EVERY = 0.2  # seconds between checks whether a waiting task is ready
_NODE_DEATHS = 100  # times that a task runs again because its machine was lost


@dataclass(frozen=True)
class Job(Generic[T, R]):
    """A function to run on each of the tasks, and its callbacks.

    Attributes:
        function: does a task; it must be importable by name. If its process dies, it runs again,
            with True as its second argument: it should then record where it is.
        blame: says what a task was working on when it killed its process for the second time.
        done: is called in this process with each result.
        ready: is called in this process; True if a task can begin. An exception from it ends the run.
    """

    function: Callable[[T, bool], R]
    blame: Callable[[T], str]
    done: Callable[[T, R], None] = lambda task, result: None
    ready: Callable[[T], bool] = lambda task: True


def run(job: Job[T, R], tasks: Sequence[T], workers: int | None, on_ray: bool = False) -> list[R]:
    """Do the tasks in processes and return their results in the order of the tasks.

    An exception ends the run at once. If a process dies, the tasks that it may have worked on are done again, one
    at a time. If a task kills its process again, OSError says what it was working on.

    Args:
        workers: tasks at a time; on Ray, None means one per CPU of the cluster.
        on_ray: run on the cluster that RAY_ADDRESS names, else on one that runs on this machine, else on a new
            one of this machine alone. Every machine must see the dataset's folder under the same path.
    """
    if on_ray:
        return _run(job, tasks, _Cluster(workers))
    assert workers is not None
    if workers > 1 and len(tasks) > 1:
        return _run(job, tasks, _Processes(min(workers, len(tasks))))
    results = []
    for task in tasks:
        while not job.ready(task):
            time.sleep(_LOOKS_EVERY)
        results.append(job.function(task, False))
        job.done(task, results[-1])
    return results


def _run(job: Job[T, R], tasks: Sequence[T], machine: "_Processes | _Cluster") -> list[R]:
    results: dict[int, R] = {}
    waiting, running = deque(range(len(tasks))), dict[Future[R], int]()
    suspects: set[int] = set()  # tasks that may have killed their process
    losses = Counter[int]()
    try:
        while waiting or running:
            # Submit no more tasks than run at a time, so that few are suspects if a worker dies; and in order, as
            # the files that they wait for are fetched in order.
            room = 1 if suspects else machine.room
            while waiting and len(running) < room and job.ready(tasks[waiting[0]]):
                i = waiting.popleft()
                running[machine.submit(job.function, tasks[i], i in suspects)] = i
            if not running:
                time.sleep(_LOOKS_EVERY)
            for future in wait(running, _LOOKS_EVERY, FIRST_COMPLETED).done:
                i = running.pop(future)
                try:
                    results[i] = future.result()
                except machine.failed as error:
                    raise error.cause from None
                except machine.died:
                    if i in suspects:
                        raise OSError(
                            f"{job.blame(tasks[i])}: the process that worked on it died twice "
                            "(out of memory, or a crash): fix or remove it, or try --workers 1"
                        ) from None
                    suspects.add(i)
                    waiting.appendleft(i)
                except machine.lost as error:
                    losses[i] += 1
                    if losses[i] > _NODE_DEATHS:
                        raise OSError(f"the Ray cluster lost one machine after another: {error}") from None
                    waiting.appendleft(i)
                else:
                    suspects.discard(i)
                    job.done(tasks[i], results[i])
    finally:
        machine.stop(running)
    return [results[i] for i in range(len(tasks))]


class _Processes:
    """Processes of this machine. When one dies, all are replaced."""

    died: Any = BrokenProcessPool
    failed: Any = ()
    lost: Any = ()

    def __init__(self, workers: int) -> None:
        # Not fork: a copy of a process with threads (Arrow's, the tokenizer's) may hang.
        spawn = multiprocessing.get_context("spawn")
        self._new_pool = functools.partial(ProcessPoolExecutor, workers, spawn, _start_worker)
        self.room, self._pool = workers, self._new_pool()

    def submit(self, function: Callable[[T, bool], R], task: T, careful: bool) -> Future[R]:
        try:
            return self._pool.submit(function, task, careful)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._new_pool()
            return self._pool.submit(function, task, careful)

    def stop(self, running: Collection[Future[Any]]) -> None:
        """End the processes, without waiting for work that nobody wants."""
        if running:
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.terminate()  # Python before 3.14 has no public way to do it
        # The workers take 0.2 s to end; writing the shards begins meanwhile.
        self._pool.shutdown(wait=bool(running), cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would only wait, using CPU time
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


class _Cluster:
    """A Ray cluster."""

    def __init__(self, workers: int | None) -> None:
        self._workers, self._ray = workers, _connect()
        self._remote = functools.cache(self._ray.remote(max_retries=0, num_cpus=1))
        errors = self._ray.exceptions
        self.died: Any = (errors.WorkerCrashedError, errors.OutOfMemoryError)
        self.failed: Any = errors.RayTaskError
        self.lost: Any = errors.RayError  # the others

    @property
    def room(self) -> int:  # machines come and go
        return self._workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, function: Callable[[T, bool], R], task: T, careful: bool) -> Any:
        return self._remote(function).remote(task, careful).future()

    def stop(self, running: Collection[Any]) -> None:
        for future in running:
            with contextlib.suppress(Exception):
                self._ray.cancel(future.object_ref, force=True)


def _connect() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a coming change
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'gpt2-data[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        if (match := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)) is not None:
            try:  # for ten seconds: Ray itself would try for minutes
                socket.create_connection((match[1], int(match[2])), timeout=10).close()
            except OSError as error:
                raise OSError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from None
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return ray
