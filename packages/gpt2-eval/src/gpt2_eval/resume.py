"""Keep scores on disk while an evaluation runs, so that it can resume if it is killed.

Beside the result file, NAME, each rank appends to .NAME.rows-RANK: a line that says what is scored, then one for
each batch. All these files are read at the start, however many ranks wrote them, and deleted at the end.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2_eval.models import LanguageModel
from gpt2_eval.ranks import rank_and_world_size
from gpt2_model.command import locked

Score = tuple[float | int, ...]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(weights: Mapping[str, Tensor], dtype: torch.dtype | None, scored: Iterable[object]) -> str:
    """Return the SHA-256, in hex, of all that scores depend on: weights, precision and what is scored.

    A weight counts as the integer sum of its bits, computed on its own device. That distinguishes one checkpoint
    from the next, but does not protect against forgery.
    """
    digest = hashlib.sha256(str(dtype).encode())
    for name, weight in weights.items():
        total = int(weight.detach().view(_INTEGERS[weight.itemsize]).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total}".encode())
    for part in scored:
        digest.update(repr(part).encode())
    return digest.hexdigest()


@contextmanager
def resuming(
    path: Path | None, model: LanguageModel, dtype: torch.dtype | None, scored: Iterable[object]
) -> Iterator[tuple[dict[int, Score], Callable[[Mapping[int, Score]], None]]]:
    """Yield the scores on disk, by the number of the row or window, and a function that adds a batch's scores.

    `path` is the result file, written at the end; None keeps nothing. Scores of another model, or of anything but
    `scored`, are ignored and overwritten. Every rank must call this.
    """
    if path is None:
        yield {}, lambda scores: None
        return
    rank, world_size = rank_and_world_size()
    what = fingerprint(model.state_dict(), dtype, scored)
    known = dict[int, Score]()
    for file in _files(path):
        known |= _read(file, what)
    if world_size > 1:
        dist.barrier()  # all ranks must have read before one begins to write
    file = path.with_name(f".{path.name}.rows-{rank}")
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as out:

        def add(scores: Mapping[int, Score]) -> None:
            try:
                out.write(json.dumps(scores) + "\n")
                out.flush()  # a kill after this does not lose them
            except OSError as error:
                raise OSError(f"{file}: {error.strerror}; the same command resumes from there") from error

        out.write(json.dumps({"of": what}) + "\n")
        add(known)
        temporary.replace(file)
        yield known, add


def _read(file: Path, what: str) -> dict[int, Score]:
    known = dict[int, Score]()
    lines = file.read_bytes().split(b"\n")[:-1]  # the last may be cut off
    try:
        if lines and json.loads(lines[0]) == {"of": what}:
            for line in lines[1:]:
                known |= {int(number): tuple(score) for number, score in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError):
        pass  # a damaged line: what comes after it is scored again
    return known


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold a result file during the block; a ValueError says that another evaluation writes it."""
    folder = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), str(path))) from None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)  # while it is still locked
        yield


def remove_scores(path: Path) -> None:
    """Delete the scores beside `path`, which holds all of them now."""
    for file in _files(path):
        file.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.rows-"))
