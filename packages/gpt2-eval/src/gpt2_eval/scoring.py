"""(context, continuation) rows -> log-likelihoods, in batches and over ranks. Knows nothing of tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gpt2_model import EOT

T = TypeVar("T")

# Positions that go through the head at once, so that the logits of a whole batch never exist: 8 windows of 1,024
# would be 1.6 GB in fp32, and log-softmax makes a second copy. On a CPU 128 positions are 26 MB, which malloc
# hands out again; above 32 MB each block is mapped anew, and a model 64 wide scores 1.6 times slower.
CPU_HEAD_POSITIONS = 128
HEAD_POSITIONS = 2048
# Rows in a forward pass. For the same reason 64 rows of HellaSwag with 124M cost 1.4 times the CPU time of 16.
CPU_BATCH_SIZE = 16
BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What is given and what is scored, both as token ids. An empty context stands for `<|endoftext|>`."""

    context: list[int]
    continuation: list[int]


class Interrupted(Exception):
    """`stop` said True on some rank before all was scored. Raised on every rank: there is no partial result."""


class ModelConfig(Protocol):
    """The two sizes that inputs are checked against."""

    @property
    def block_size(self) -> int:
        """Longest sequence, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""


class LanguageModel(Protocol):
    """What is asked of a model: the two halves of gpt2_model.GPT, and what any nn.Module has."""

    training: bool

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""

    def hidden(self, tokens: Tensor, /) -> Tensor:
        """(batch, time) ids -> (batch, time, n_embd); position t depends on tokens up to t alone."""

    def head(self, hidden: Tensor, /) -> Tensor:
        """(..., n_embd) -> (..., vocab_size) logits."""

    def train(self, mode: bool = True, /) -> Any:
        """Switch training mode on or off."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""


def score_rows(
    model: LanguageModel,
    rows: Sequence[Row],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> NDArray[np.float64]:
    """Log-likelihood of each row's continuation given its context: (len(rows),), in nats.

    Each token's log-softmax is fp32, their sum float64. Of a row that does not fit the model's context, the
    left of its context is dropped (`count_truncated` says how many do not). Where torch.distributed is
    initialised, every rank must call this with the same rows; each scores its share and all get all scores.

    Args:
        batch_size: rows in a forward pass; None is 16 on a CPU and 64 elsewhere. It changes the speed and, in
            fp32, no more than the last digits of a score.
        device: where the inputs go; the model's own device if None.
        autocast_dtype: torch.bfloat16 to run under autocast; None runs in the weights' own precision.
        progress: draw a bar on stderr.
        stop: asked before each batch, on each rank for itself; True on one of them ends the scoring on all.

    Raises:
        ValueError: a row that cannot be scored, or scores that are not finite.
        Interrupted: `stop` said True, here or on another rank.
    """
    _check_rows(rows, model.config)
    device = device_of(model, device)
    if batch_size is None:
        batch_size = CPU_BATCH_SIZE if device.type == "cpu" else BATCH_SIZE
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    # Sorted by length, padding is under 1 % of HellaSwag's positions instead of 38 % (batches of 64 in file
    # order); longest first, what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].context) - len(rows[i].continuation), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, world_size = rank_and_world_size()
    # Whole batches are dealt to the ranks: each holds the same rows, and so the same bits, on any number of them.
    mine: dict[int, float] = {}
    interrupted = False
    with evaluating(model, device, autocast_dtype):
        for batch in tqdm(
            batches[rank::world_size], desc="scoring", unit="batch", leave=False, disable=not progress
        ):
            if interrupted := stop is not None and stop():
                break
            sums = _score_batch(model, [rows[i] for i in batch], device)
            mine.update(zip(batch, sums.tolist(), strict=True))
    scores = np.array(gather_records(mine, len(rows), interrupted), dtype=np.float64)
    require_finite(scores, "rows")
    return scores


def count_truncated(rows: Sequence[Row], block_size: int) -> int:
    """Rows whose context loses its left end to fit `block_size` inputs; the last token of a row is no input."""
    return sum((len(row.context) or 1) + len(row.continuation) - 1 > block_size for row in rows)


def _check_rows(rows: Sequence[Row], config: ModelConfig) -> None:
    for index, row in enumerate(rows):
        if not 0 < len(row.continuation) <= config.block_size:
            raise ValueError(
                f"row {index}: a continuation of {len(row.continuation)} tokens cannot be scored; "
                f"it must have 1 to {config.block_size}, the model's context"
            )
        if max(max(row.context, default=EOT), max(row.continuation)) >= config.vocab_size:
            raise ValueError(f"row {index} has a token id beyond the model's vocabulary of {config.vocab_size}")


def _score_batch(model: LanguageModel, rows: Sequence[Row], device: torch.device) -> NDArray[np.float64]:
    """Rows -> (len(rows),) sums. Padding is on the right, where causal attention never looks."""
    sequences = [[*(row.context or [EOT]), *row.continuation] for row in rows]
    inputs = [sequence[-(model.config.block_size + 1) : -1] for sequence in sequences]
    tokens = np.zeros((len(rows), max(map(len, inputs))), dtype=np.int64)
    for index, ids in enumerate(inputs):
        tokens[index, : len(ids)] = ids

    # The last n positions of a row's input predict its n continuation tokens.
    lengths = np.array([len(row.continuation) for row in rows])
    owner = np.repeat(np.arange(len(rows)), lengths)
    position = np.concatenate([np.arange(len(ids) - n, len(ids)) for ids, n in zip(inputs, lengths, strict=True)])
    targets = np.concatenate([row.continuation for row in rows])

    hidden = model.hidden(torch.from_numpy(tokens).to(device))
    # Only these go on to the head: 37 % of HellaSwag's positions, and the head is 31 % of the 124M model's work.
    hidden = hidden[torch.from_numpy(owner).to(device), torch.from_numpy(position).to(device)]
    log_probs = token_log_probs(model, hidden, torch.from_numpy(targets).to(device))
    return np.bincount(owner, weights=log_probs.cpu().double().numpy()).astype(np.float64)


def token_log_probs(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(target) at each position, fp32: hidden (positions, n_embd), targets (positions,) -> (positions,)."""
    size = CPU_HEAD_POSITIONS if hidden.device.type == "cpu" else HEAD_POSITIONS
    parts = [
        -F.cross_entropy(model.head(states).float(), ids, reduction="none")
        for states, ids in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    return torch.cat(parts)


@contextmanager
def evaluating(model: LanguageModel, device: torch.device, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Eval mode, no gradients, and exactly the precision asked for; the model's mode comes back afterwards.

    An autocast around the caller does not reach in. The cache of cast weights is off, since a training step
    that found this function's inference tensors in it could not go backward through them.
    """
    was_training = model.training
    model.train(False)
    try:
        enabled = autocast_dtype is not None
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=autocast_dtype, enabled=enabled, cache_enabled=False),
        ):
            yield
    finally:
        model.train(was_training)


def device_of(model: LanguageModel, device: torch.device | str | None) -> torch.device:
    """`device`, or where the model's weights are, or the CPU for a model without any."""
    if device is not None:
        return torch.device(device)
    weight = next(iter(model.parameters()), None)
    return torch.device("cpu") if weight is None else weight.device


def require_finite(scores: NDArray[np.float64], what: str) -> None:
    """Stop before a NaN loses every comparison and is published as an accuracy.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {scores.size} {what} have a log-likelihood of NaN or infinity (the first is number "
            f"{bad[0]}): the model's weights are damaged, or overflow in this precision"
        )


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of them: (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_records(mine: Mapping[int, T], total: int, interrupted: bool = False) -> list[T]:
    """The records 0 to total - 1 in order, on every rank, from the share that each rank holds.

    Records are gathered and not averages, so that no item counts twice or is lost without notice. A rank that was
    interrupted comes here too: the others, which are here or on their way, would wait for it in vain.

    Raises:
        Interrupted: this rank or another was interrupted.
        RuntimeError: a record is missing, or came from two ranks.
    """
    share = (interrupted, dict(mine))
    _, world_size = rank_and_world_size()
    shares: list[Any] = [share] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, share)
    if any(stopped for stopped, _ in shares):
        raise Interrupted("the evaluation was told to stop before it was through: there is no result")
    parts = [part for _, part in shares]
    indices = sorted(index for part in parts for index in part)
    if indices != list(range(total)):
        raise RuntimeError(f"{total} records expected, each once, but the ranks hold {len(indices)} with gaps")
    merged = {index: record for part in parts for index, record in part.items()}
    return [merged[index] for index in range(total)]
