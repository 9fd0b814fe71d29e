"""Share an evaluation between processes: each one's rank, and the records of all of them in order."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from operator import itemgetter
from typing import Any, TypeVar

import torch.distributed as dist

from gpt2_eval.rendezvous import join_ranks

T = TypeVar("T")


class Interrupted(Exception):
    """`stop` said True on some rank before all was scored. Raised on every rank: there is no partial result."""


@contextmanager
def process_group() -> Iterator[int]:
    """Yield this process's rank, in torchrun's process group while the block runs; 0 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    join_ranks("gloo", timedelta(minutes=30))  # only records of a few bytes travel, and they are on the CPU
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_records(
    own: Mapping[int, T], total: int, interrupted: bool = False, failure: Exception | None = None
) -> list[T]:
    """Return the records 0 to total - 1 in order, on every rank, from the share that each rank has.

    Records are gathered, not averages: so an item that counts twice or is lost is noticed (RuntimeError). A rank
    that was interrupted or failed must call this too, or the others would wait for it in vain; then all raise
    Interrupted, or the first rank's failure.
    """
    rank, world_size = rank_and_world_size()
    plain = isinstance(failure, ValueError | OSError)  # others need not be picklable
    share = (interrupted, dict(own), None if failure is None else (f"rank {rank}: {failure}", plain))
    shares: list[Any] = [share] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, share)
    if failure is not None:
        raise failure
    if failures := [broken for _, _, broken in shares if broken]:
        raise (ValueError if failures[0][1] else RuntimeError)(failures[0][0])
    if any(stopped for stopped, _, _ in shares):
        raise Interrupted("the evaluation was stopped before it finished: there is no result")
    records = sorted((pair for _, part, _ in shares for pair in part.items()), key=itemgetter(0))
    if [index for index, _ in records] != list(range(total)):
        raise RuntimeError(f"{total} records expected, each once, but the ranks hold {len(records)} with gaps")
    return [record for _, record in records]
