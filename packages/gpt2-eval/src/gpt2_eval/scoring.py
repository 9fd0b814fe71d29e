"""Items of (context, continuation) rows -> log-likelihoods, in batches and over ranks. Knows nothing of tasks."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gpt2_eval.packing import Batch, Layout, Pack, Row, RowScore, fill_lines, lay_out, pack
from gpt2_eval.unfinished import Score, fingerprint, going_on
from gpt2_model import EOT, GPT

T = TypeVar("T")

# Positions and tokens of the vocabulary that logits are computed for at once, so that those of a whole batch
# never exist: 8 windows of 1,024 would be 1.6 GB in fp32, and log-softmax makes a second copy. On a CPU a block is
# 16 MB: it stays in the cache, and below 32 MB malloc hands it out again instead of mapping it anew. The whole
# vocabulary for 128 positions at a time takes 1.2 times as long (124M, two cores).
CPU_HEAD_BLOCK = (1024, 4096)
HEAD_BLOCK = (2048, 65_536)
# Tokens in a forward pass. For the same reason 64 rows of HellaSwag with 124M cost 1.4 times the CPU time of 16.
CPU_BATCH_TOKENS = 2048
BATCH_TOKENS = 65_536
# Of a sequence where all must be of one length: HellaSwag's items take 167 on average, and at most 450.
FIXED_LENGTH = 512


class Interrupted(Exception):
    """`stop` said True on some rank before all was scored. Raised on every rank: there is no partial result."""


class ScoringOptions(TypedDict, total=False):
    """What the functions that evaluate pass on to `score_items`, which explains it."""

    batch_size: int | None
    device: torch.device | str | None
    autocast_dtype: torch.dtype | None
    share_prefixes: bool | None
    compile: bool
    resume: Path | None
    progress: bool
    stop: Callable[[], bool] | None


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

    def hidden(self, tokens: Tensor, cache: Layout | None = None, /) -> Tensor:
        """(batch, time) ids -> (batch, time, n_embd); position t depends on tokens up to t alone.

        With a layout, on those that its mask shows.
        """

    @property
    def head_weight(self) -> Tensor | None:
        """(vocab_size, n_embd), whose product with hidden states is their logits; None if they are logits."""

    def train(self, mode: bool = True, /) -> Any:
        """Switch training mode on or off."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""

    def state_dict(self) -> dict[str, Any]:
        """Its weights by name."""


def score_items(
    model: LanguageModel,
    items: Sequence[Sequence[Row]],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    share_prefixes: bool | None = None,
    compile: bool = False,
    resume: Path | None = None,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> list[list[RowScore]]:
    """Score the continuation of each row given its context: a list of scores for each item, in their order.

    The rows of an item are those that are compared with each other; what they begin with is computed once. Each
    token's log-softmax is fp32, their sum float64. Of a row that does not fit the model's context, the left of its
    context is dropped (`count_truncated` says how many do not). Where torch.distributed is initialised, every rank
    must call this with the same items; each scores its share and all get all scores.

    Args:
        batch_size: sequences in a forward pass, an item's rows being one where they share a beginning; None is
            what makes about 2,048 tokens on a CPU and 65,536 elsewhere. It changes the speed and, in fp32, no more
            than the last digits of a score.
        device: where the inputs go; the model's own device if None.
        autocast_dtype: torch.bfloat16 to run under autocast; None runs in the weights' own precision.
        share_prefixes: None does so for gpt2_model's GPT, whose attention can be told what a token sees.
        compile: run the model compiled, on sequences of one length (several items in each), so that nothing is
            compiled again from one batch or evaluation to the next.
        resume: the file that the caller will write. Scores are kept beside it after each batch, and those that a
            killed call has left there are not computed again; `remove_unfinished` deletes them.
        progress: draw a bar on stderr.
        stop: asked before each batch, on each rank for itself; True on one of them ends the scoring on all.

    Raises:
        ValueError: a row that cannot be scored, or scores that are not finite.
        Interrupted: `stop` said True, here or on another rank.
    """
    rows = [row for item in items for row in item]
    _check_rows(rows, model.config)
    device = device_of(model, device)
    batches = plan_batches(
        model, items, batch_size=batch_size, device=device, share_prefixes=share_prefixes, compile=compile
    )
    found = score_batches(
        model, batches, len(rows), lambda batch: [row for part in batch.packs for row in part.rows],
        lambda batch: _score_batch(model, batch, rows, device, compile), of=rows, name="scoring", device=device,
        autocast_dtype=autocast_dtype, resume=resume, progress=progress, stop=stop,
    )  # fmt: skip
    scored = [RowScore(nats, bool(all_), bool(last)) for nats, all_, last in found]
    require_finite(np.array([score.logprob for score in scored]), "rows")
    in_order = iter(scored)
    return [[next(in_order) for _ in item] for item in items]


def score_batches(
    model: LanguageModel,
    batches: Sequence[T],
    total: int,
    numbers_of: Callable[[T], Sequence[int]],
    score: Callable[[T], Mapping[int, Score]],
    *,
    of: Iterable[object],
    name: str,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    resume: Path | None,
    progress: bool,
    stop: Callable[[], bool] | None,
) -> list[Score]:
    """Scores number 0 to total - 1, each of one batch, on every rank; what the options mean, says `score_items`.

    Args:
        numbers_of: a batch -> the numbers of what is in it.
        score: a batch -> their scores, within `evaluating`.
        of: what is scored, for the fingerprint of what is kept for a resume.
        name: of the bar.
    """
    rank, world_size = rank_and_world_size()
    # Whole batches are dealt to the ranks: each holds the same rows, and so the same bits, on any number of them.
    # The same after a resume: a batch of which anything is missing is computed whole.
    mine: dict[int, Score] = {}
    interrupted, known, keep = False, dict[int, Score](), None
    with ExitStack() as held:
        if resume is not None:
            what = fingerprint(model.state_dict(), autocast_dtype, of)
            known, keep = held.enter_context(going_on(resume, what, rank, world_size))
            if known and progress:
                tqdm.write(f"{len(known):,} of {total:,} were scored before", file=sys.stderr)
        held.enter_context(evaluating(model, device, autocast_dtype))
        for batch in tqdm(batches[rank::world_size], desc=name, unit="batch", leave=False, disable=not progress):
            if interrupted := stop is not None and stop():
                break
            numbers = numbers_of(batch)
            scores: Mapping[int, Score] = {number: known[number] for number in numbers if number in known}
            if len(scores) < len(numbers):
                scores = score(batch)
                if keep is not None:
                    keep(scores)
            mine.update(scores)
    return gather_records(mine, total, interrupted)


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


def plan_batches(
    model: LanguageModel,
    items: Sequence[Sequence[Row]],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    share_prefixes: bool | None = None,
    compile: bool = False,
) -> list[Batch]:
    """The batches in which `score_items`, with the same options, computes these items.

    Sorted by length: padding is then 2 % of HellaSwag's positions, not 38 % (batches of 64 rows in the file's
    order). Longest first: what does not fit into memory fails at once.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    share = isinstance(model, GPT) if share_prefixes is None else share_prefixes
    packs, first = list[Pack](), 0
    for item in items:
        packs += pack(item, first, model.config.block_size, share)
        first += len(item)
    if not packs:
        return []
    packs.sort(key=lambda part: (-len(part.tokens), part.rows[0]))
    # A model that gives logits gives them for all positions: 2 GB for 2,048 of them and a vocabulary of 256,000.
    small = device_of(model, device).type == "cpu" or model.head_weight is None
    max_tokens = CPU_BATCH_TOKENS if small else BATCH_TOKENS
    if compile:
        length = max(FIXED_LENGTH, -(-len(packs[0].tokens) // 128) * 128)
        lines = fill_lines(packs, length)
        num_lines = batch_size or max(1, max_tokens // length)
        return [lay_out(lines[i : i + num_lines], num_lines, length) for i in range(0, len(lines), num_lines)]
    batches, start = list[Batch](), 0
    while start < len(packs):
        count = batch_size or max(1, max_tokens // len(packs[start].tokens))
        batches.append(lay_out([[part] for part in packs[start : start + count]]))
        start += count
    return batches


def _score_batch(
    model: LanguageModel, batch: Batch, rows: Sequence[Row], device: torch.device, compile: bool
) -> dict[int, RowScore]:
    """Scores by the number of the row."""
    tokens = torch.from_numpy(batch.tokens).to(device)
    if compile:
        layout = batch.layout(device)
        hidden = _compiled_hidden()(model, tokens, layout.positions(tokens.shape[1]), layout.mask)
    elif batch.causal:
        hidden = model.hidden(tokens)
    else:
        hidden = model.hidden(tokens, batch.layout(device))

    numbers = [row for part in batch.packs for row in part.rows]
    scored = [places for part in batch.packs for places in part.scored]
    lengths = np.array([len(places) for places in scored])
    corners = [corner for part, corner in zip(batch.packs, batch.starts, strict=True) for _ in part.rows]
    line = np.repeat([corner[0] for corner in corners], lengths)
    place = np.concatenate(scored) + np.repeat([corner[1] for corner in corners], lengths)
    targets = np.concatenate([rows[number].continuation for number in numbers])
    # Only these go on to the head: 37 % of HellaSwag's positions, and the head is 31 % of the 124M model's work.
    hidden = hidden[torch.from_numpy(line).to(device), torch.from_numpy(place).to(device)]
    log_probs, greedy = token_scores(hidden, model.head_weight, torch.from_numpy(targets).to(device))
    owner = np.repeat(np.arange(len(numbers)), lengths)
    sums = np.bincount(owner, weights=log_probs.cpu().double().numpy())
    hits = greedy.cpu().numpy()
    all_hit = np.bincount(owner, weights=hits) == lengths
    last_hit = hits[np.cumsum(lengths) - 1]
    found = zip(sums.tolist(), all_hit.tolist(), last_hit.tolist(), strict=True)
    return {number: RowScore(*score) for number, score in zip(numbers, found, strict=True)}


def _laid_out_hidden(model: LanguageModel, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    return model.hidden(tokens, Layout(positions, mask))


@cache
def _compiled_hidden() -> Callable[..., Tensor]:
    return torch.compile(_laid_out_hidden, dynamic=False)


def token_scores(hidden: Tensor, weight: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) at each position, fp32, and whether no other token is likelier.

    hidden (positions, n_embd), weight as LanguageModel.head_weight, targets (positions,) -> two of (positions,).
    """
    positions, width = CPU_HEAD_BLOCK if hidden.device.type == "cpu" else HEAD_BLOCK
    log_probs, greedy = [], []
    for states, ids in zip(torch.split(hidden, positions), torch.split(targets, positions), strict=True):
        best = states.new_full((len(ids), 1), -torch.inf, dtype=torch.float32)
        total, chosen = torch.zeros_like(best), torch.zeros_like(best)
        for first in range(0, states.shape[1] if weight is None else len(weight), width):
            block = slice(first, first + width)
            logits = (states[:, block] if weight is None else F.linear(states, weight[block])).float()
            place = ids[:, None] - first
            inside = (place >= 0) & (place < logits.shape[1])
            chosen = torch.where(inside, logits.gather(1, place.clamp(0, logits.shape[1] - 1)), chosen)
            # The softmax's sum so far is of exponentials relative to the highest logit so far (Milakov and
            # Gimelshein 2018). In place: the block stays in the cache.
            highest = torch.maximum(best, logits.amax(1, keepdim=True))
            total = total * (best - highest).exp() + logits.sub_(highest).exp_().sum(1, keepdim=True)
            best = highest
        log_probs.append((chosen - best - total.log())[:, 0])
        greedy.append((chosen == best)[:, 0])
    return torch.cat(log_probs), torch.cat(greedy)


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
