"""The tasks of a build on a Ray cluster: the same as engines.run, with other machines' processes.

Only the tasks and their results travel, both small: what is made is written to the dataset's folder, which every
machine must see under the same path.
"""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

from gpt2_data.building.workers import LOOKS_EVERY, Job, killed_twice, take_ready

T = TypeVar("T")
R = TypeVar("R")

_NODE_DEATHS = 100
"""A task is done again when its machine is lost, through no fault of its own, but not for ever."""


def run(job: Job[T, R], tasks: Sequence[T], workers: int | None) -> list[R]:
    """As engines.run, on the cluster that RAY_ADDRESS names (or that runs on this machine, or else one of this
    machine alone); `workers` tasks at a time, None: one for each of the cluster's CPUs."""
    ray = _connect()
    calls = {name: ray.remote(max_retries=0, num_cpus=1)(getattr(job, name)) for name in ("function", "again")}
    results: dict[int, R] = {}
    waiting, running = list(range(len(tasks))), dict[Any, int]()
    killed: set[int] = set()
    lost = dict.fromkeys(waiting, 0)
    try:
        while waiting or running:
            room = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))  # machines come and go
            while len(running) < room and (i := take_ready(job, tasks, waiting)) is not None:
                running[calls["again" if i in killed else "function"].remote(tasks[i])] = i
            for reference in ray.wait(list(running), timeout=LOOKS_EVERY)[0] if running else []:
                i = running.pop(reference)
                try:
                    results[i] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    if i in killed:
                        raise OSError(killed_twice(job, tasks[i])) from None
                    killed.add(i)
                    waiting.insert(0, i)
                except ray.exceptions.RayError as error:  # its machine is gone
                    lost[i] += 1
                    if lost[i] > _NODE_DEATHS:
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
    """Ray itself tries for minutes."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match is not None:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise OSError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from None
