"""The processes of a run meet here, by the variables of torchrun or a cluster, in torch's process group."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from gpt2_model.command import one_line

FIRST_WORD, NEXT_WORD = 3.0, 10.0  # seconds before a rank says for whom it waits, and between two such lines
GRACE = 2.0  # seconds in which ranks that were started together meet, though a signal came
_LAUNCH = "start the processes with torchrun, or unset RANK and WORLD_SIZE"


def read_ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks that torchrun or a cluster set; (0, 1) without them.

    Raises ValueError if the variables do not fit together.
    """
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name in numbers:
        text = os.environ.get(name, str(numbers[name]))
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}={text!r} in the environment is not a whole number: {_LAUNCH}")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        others = f"WORLD_SIZE={size}" if "WORLD_SIZE" in os.environ else "no WORLD_SIZE"
        raise ValueError(f"RANK={rank} and {others} in the environment: {_LAUNCH}")
    return rank, size


def join_ranks(
    backend: str, patience: timedelta, name: str = "gpt2", stop: Callable[[], bool] = lambda: False
) -> bool:
    """Join torch's process group once all ranks are there, and say meanwhile for whom this one waits.

    A signal ends the waiting, which is Python's: torch's own, in C++, answers none for ten minutes. Where a signal
    only makes `stop` true, ranks that are about to meet still do, so as to end together; False says that they did
    not. Raises ValueError if the environment does not say where to meet, OSError if rank 0 is gone or nobody comes
    within `patience`.
    """
    import torch.distributed as dist

    rank, size = read_ranks()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT, rank 0's host and port: {_LAUNCH}")
    place, c10d = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)", cast(Any, dist)

    def wait(here: Callable[[], bool], whom: Callable[[], str]) -> bool:
        return _wait(here, lambda: f"rank {rank} waits for {whom()} at {place}", patience.total_seconds(), stop)

    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process answers there
    is_server = rank == 0 and not by_agent
    if not is_server and not wait(lambda: _answers(host, int(port)), lambda: "torchrun" if by_agent else "rank 0"):
        return False
    try:
        seconds = timedelta(seconds=30)  # if something else answers at this port
        store = c10d.TCPStore(host, int(port), size, is_server, seconds, wait_for_workers=False)
        # torchrun (2.13) restarts workers with the store in which the dead ones left their addresses: the first
        # worker connects to one of these, and is refused. On several nodes the agents count restarts differently,
        # so there torchrun itself must be told to make new stores: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if by_agent and os.environ.get("GROUP_WORLD_SIZE") == "1":
            name = f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = c10d.PrefixStore(name, store)
        keys = [f"rank {number}" for number in range(size)]
        store.set(keys[rank], "")
        if not wait(lambda: store.check(keys), lambda: _missing(store, keys)):
            return False
    except RuntimeError as error:
        raise OSError(f"rank {rank} cannot meet the others at {place}: {one_line(error)[:200]}") from None
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    return True


def _wait(here: Callable[[], bool], words: Callable[[], str], patience: float, stop: Callable[[], bool]) -> bool:
    """Wait until `here` is true, and say so now and then; False if `stop` became true before."""
    began = time.monotonic()
    next_word = began + FIRST_WORD
    while not here():
        now = time.monotonic()
        if stop() and now - began > GRACE:
            return False
        if now - began > patience:
            raise OSError(f"{words()}: in vain for {patience:.0f} s")
        ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
        if now > next_word and "0" in ranks:  # one of each machine
            next_word = now + NEXT_WORD
            with suppress(OSError, ValueError):  # nobody may be listening
                print(words(), file=sys.stderr, flush=True)
        time.sleep(0.05)
    return True


def _answers(host: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((host, port), timeout=1.0).close()
        return True
    except OSError:  # perhaps its name is not known yet, as in a cluster whose machines are starting
        return False


def _missing(store: Any, keys: list[str]) -> str:
    """Return "3 of 8 ranks (rank 1, rank 2, rank 5)"; of many only the first."""
    names = [key for key in keys if not store.check([key])]
    return f"{len(names)} of {len(keys)} ranks ({', '.join(names[:8])}{', ...' * (len(names) > 8)})"
