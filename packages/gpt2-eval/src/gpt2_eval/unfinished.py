"""Scores on disk while an evaluation runs, so that one which was killed goes on where it was.

Beside the file that is to be written, NAME, each rank appends to .NAME.rows-RANK: a line that says what is
scored, then a line a batch. All are read at the start, however many ranks wrote them, and deleted at the end.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

Score = tuple[float | int, ...]


def fingerprint(weights: Mapping[str, Tensor], dtype: torch.dtype | None, scored: Iterable[object]) -> str:
    """What scores depend on: the weights, the precision and what is scored. SHA-256 in hex.

    Of each weight the integer sum of its bits, which is computed where it lies: it tells one checkpoint from the
    next; against someone who means to deceive it does nothing.
    """
    digest = hashlib.sha256(str(dtype).encode())
    for name, weight in weights.items():
        bits = weight.detach().view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
        )
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total}".encode())
    for part in scored:
        digest.update(repr(part).encode())
    return digest.hexdigest()


@contextmanager
def going_on(
    path: Path, of: str, rank: int, world_size: int
) -> Iterator[tuple[dict[int, Score], Callable[[Mapping[int, Score]], None]]]:
    """What is known already, by the number of the row or window, and a function that keeps the scores of a batch.

    Args:
        path: the file that is to be written in the end.
        of: what is scored, as `fingerprint` has it; scores of anything else are not read, and written over.
        rank, world_size: of the processes, all of which must call this.
    """
    known: dict[int, Score] = {}
    for file in _files(path):
        known |= _read(file, of)
    if world_size > 1:
        dist.barrier()  # all have read before one begins to write
    file = path.with_name(f".{path.name}.rows-{rank}")
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:

        def keep(scores: Mapping[int, Score]) -> None:
            try:
                out.write(json.dumps(scores) + "\n")
                out.flush()  # from here on a kill does not lose them
            except OSError as error:
                raise OSError(f"{file}: {error.strerror}; the same command goes on from there") from error

        out.write(json.dumps({"of": of}) + "\n")
        keep(known)
        temporary.replace(file)
        yield known, keep


def _read(file: Path, of: str) -> dict[int, Score]:
    known: dict[int, Score] = {}
    lines = file.read_bytes().split(b"\n")[:-1]  # the last may be cut off
    try:
        if lines and json.loads(lines[0]) == {"of": of}:
            for line in lines[1:]:
                known |= {int(number): tuple(score) for number, score in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError):
        pass  # a damaged line: what comes after it is scored again
    return known


def remove_unfinished(path: Path) -> None:
    """Delete what was kept for `path`: all is done, and written there."""
    for file in _files(path):
        file.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.rows-"))
