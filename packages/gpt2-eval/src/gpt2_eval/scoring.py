"""Score items of (context, continuation) rows, in batches and over ranks. Nothing here depends on a task."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gpt2_eval.models import LanguageModel, encoder_of
from gpt2_eval.packing import Batch, Layout, Pack, Row, RowScore, fill_lines, lay_out, pack
from gpt2_eval.progress import speaking
from gpt2_eval.ranks import gather_records, rank_and_world_size
from gpt2_eval.resume import Score, resuming
from gpt2_model import GPT

# Positions and tokens of the vocabulary that logits are computed for at once, so that those of a whole batch
# never exist: 8 windows of 1,024 would be 1.6 GB in fp32, and log-softmax makes a second copy. On a CPU a block is
# 16 MB: it stays in the cache, and below 32 MB malloc hands it out again instead of mapping it anew. The whole
# vocabulary for 128 positions at a time takes 1.2 times as long (124M, two cores).
CPU_HEAD_BLOCK = (1024, 4096)
HEAD_BLOCK = (2048, 65_536)
# Tokens in a forward pass. For the same reason 64 rows of HellaSwag with 124M cost 1.4 times the CPU time of 16.
CPU_BATCH_TOKENS = 2048
BATCH_TOKENS = 65_536
# Tokens of a sequence where all must have one length: HellaSwag's items have 167 on average, and at most 450.
FIXED_LENGTH = 512


class PassOptions(TypedDict, total=False):
    """Options of every evaluation, which `score_items` explains."""

    autocast_dtype: torch.dtype | None
    resume: Path | None
    progress: bool | Callable[[int, int], None]
    stop: Callable[[], bool] | None


class ScoringOptions(PassOptions, total=False):
    """The options of `score_items`, which the functions that evaluate pass on."""

    batch_size: int | None
    compile: bool


def score_items(
    model: LanguageModel,
    items: Sequence[Sequence[Row]],
    *,
    batch_size: int | None = None,
    compile: bool = False,
    **options: Unpack[PassOptions],
) -> list[list[RowScore]]:
    """Score the continuation of each row given its context: a list of scores for each item, in their order.

    The rows of an item are those that are compared with each other; a GPT, whose attention takes a mask, computes
    their common beginning once. Each token's log-softmax is in fp32, their sum in float64. A row too long for the
    model loses its first tokens (`count_truncated` counts such rows). Where torch.distributed is initialised,
    every rank must call this with the same items; each scores its share, and all get all scores.

    Args:
        batch_size: sequences in a forward pass, where an item's rows with a common beginning are one; None makes
            it about 2,048 tokens on a CPU and 65,536 elsewhere. In fp32 it changes only a score's last digits.
        compile: run the model compiled, on sequences of one length (several items in each), so that nothing is
            compiled again from one batch or evaluation to the next.
        autocast_dtype: torch.bfloat16 to run under autocast; None runs in the weights' own precision.
        resume: the file that the caller will write. Scores are saved beside it after each batch, and those that a
            killed call has saved are not computed again; `remove_scores` deletes them.
        progress: show progress on stderr: a bar on a terminal, elsewhere a line every ten seconds. Or a function
            that is called with the number of this rank's batches that are done, and of all of them.
        stop: called before each batch, on each rank; True on one of them ends the scoring on all.

    Raises:
        ValueError: a row cannot be scored, or scores are not finite.
        Interrupted: `stop` said True, here or on another rank.
    """
    if not all(row.context for item in items for row in item):
        prefix = encoder_of(model).prefix
        items = [[row if row.context else Row([prefix], row.continuation) for row in item] for item in items]
    rows = [row for item in items for row in item]
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    for index, row in enumerate(rows):
        if not 0 < len(row.continuation) <= block_size:
            raise ValueError(
                f"row {index}: a continuation of {len(row.continuation)} tokens cannot be scored; "
                f"it must have 1 to {block_size}, the model's context"
            )
        if max(*row.context, *row.continuation) >= vocab_size:
            raise ValueError(f"row {index} has a token id beyond the model's vocabulary of {vocab_size}")
    batches = plan_batches(model, items, batch_size, compile)

    def score(number: int) -> dict[int, RowScore]:
        return _score_batch(model, batches[number], rows, compile)

    numbers = [batch.rows for batch in batches]
    records = score_batches(model, numbers, score, scored=rows, unit="rows", **options)
    scores = iter([RowScore(nats, bool(greedy), bool(last)) for nats, greedy, last in records])
    return [[next(scores) for _ in item] for item in items]


def score_batches(
    model: LanguageModel,
    batches: Sequence[Sequence[int]],
    score: Callable[[int], Mapping[int, Score]],
    *,
    scored: Iterable[object],
    unit: str,
    autocast_dtype: torch.dtype | None = None,
    resume: Path | None = None,
    progress: bool | Callable[[int, int], None] = False,
    stop: Callable[[], bool] | None = None,
) -> list[Score]:
    """Score batches, each on one of the ranks; return the scores of all rows or windows, in order, on every rank.

    Args:
        batches: for each batch, the numbers of the rows or windows in it.
        score: number of a batch -> the scores of its rows or windows, by number; called within `evaluating`.
        scored: what is scored, for the fingerprint of the scores on disk.
        unit: what messages count, such as "rows".
    """
    rank, world_size = rank_and_world_size()
    # Whole batches are dealt to the ranks: each has the same rows, and so the same bits, on any number of ranks.
    # So it is after a resume: if anything of a batch is missing, all of it is computed.
    numbers = range(rank, len(batches), world_size)
    total, own, interrupted = sum(map(len, batches)), dict[int, Score](), False
    failure: Exception | None = None
    with resuming(resume, model, autocast_dtype, scored) as (known, keep), evaluating(model, autocast_dtype):
        if known and progress:
            print(f"{len(known):,} of {total:,} {unit} were scored before", file=sys.stderr)
        bar = _progress(numbers, f"scoring {unit}") if progress is True else nullcontext(numbers)
        try:
            with bar as shown:
                for done, number in enumerate(shown):
                    if callable(progress):
                        progress(done, len(numbers))
                    if interrupted := stop is not None and stop():
                        break
                    scores: Mapping[int, Score] = {row: known[row] for row in batches[number] if row in known}
                    if len(scores) < len(batches[number]):
                        scores = score(number)
                        keep(scores)
                    own.update(scores)
        except Exception as error:  # the other ranks wait for this one's share, and must learn of it
            failure = error
    records = gather_records(own, total, interrupted, failure)
    bad = [number for number, (nats, *_) in enumerate(records) if not math.isfinite(nats)]
    if bad:  # NaN would lose every comparison, and yet give an accuracy
        raise ValueError(
            f"{len(bad)} of {total} {unit} have a log-likelihood of NaN or infinity (the first is number "
            f"{bad[0]}): the model's weights are damaged, or overflow in this precision"
        )
    return records


@contextmanager
def _progress(batches: Sequence[int], what: str) -> Iterator[Iterable[int]]:
    """Yield the batches, with a bar on a terminal, and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        with tqdm(batches, desc=what, unit="batch", leave=False) as bar:
            yield bar
        return
    start, done = time.monotonic(), 0

    def line() -> str:
        text = f"{what}: {done:,} of {len(batches):,} batches"
        remaining = (time.monotonic() - start) / max(done, 1) * (len(batches) - done)
        return f"{text}, {tqdm.format_interval(remaining)} left" if done else text

    def counted() -> Iterator[int]:
        nonlocal done
        for batch in batches:
            yield batch
            done += 1

    with speaking(line):
        yield counted()


def count_truncated(items: Iterable[Iterable[Row]], block_size: int) -> int:
    """Count the rows that lose their first tokens to fit `block_size` inputs; a row's last token is no input."""
    return sum((len(row.context) or 1) + len(row.continuation) - 1 > block_size for rows in items for row in rows)


def plan_batches(
    model: LanguageModel, items: Sequence[Sequence[Row]], batch_size: int | None = None, compile: bool = False
) -> list[Batch]:
    """Plan the batches in which `score_items`, with the same options, computes these items: longest rows first.

    Sorting reduces HellaSwag's padding to 2 % of all positions, from 38 % (batches of 64 rows in file order).
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    packs = list[Pack]()
    for item in items:
        first = packs[-1].rows[-1] + 1 if packs else 0
        packs += pack(item, first, model.config.block_size, share=isinstance(model, GPT))
    packs.sort(key=lambda part: (-len(part.tokens), part.rows[0]))
    if not packs:
        return []
    # A model without `head_weight` gives logits for all positions: 2 GB for 2,048 and a vocabulary of 256,000.
    small = device_of(model).type == "cpu" or model.head_weight is None
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


def _score_batch(model: LanguageModel, batch: Batch, rows: Sequence[Row], compile: bool) -> dict[int, RowScore]:
    """Return each row's score, by the row's number."""
    device = device_of(model)
    tokens = torch.from_numpy(batch.tokens).to(device)
    if compile:
        hidden = compiled(_hidden)(model, tokens, batch.layout(device))
    else:
        hidden = model.hidden(tokens) if batch.causal else model.hidden(tokens, batch.layout(device))
    packs = zip(batch.packs, batch.starts, strict=True)
    places = [np.array(scored) + start for part, start in packs for scored in part.scored]
    lengths = np.array([len(scored) for scored in places])
    targets = np.concatenate([rows[number].continuation for number in batch.rows])
    # The head computes only these: 37 % of HellaSwag's positions, and the head is 31 % of the 124M model's work.
    hidden = hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(places)).to(device)]
    log_probs, greedy = token_scores(hidden, model.head_weight, torch.from_numpy(targets).to(device))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(owner, weights=log_probs.cpu().double().numpy())
    hits = greedy.cpu().numpy()
    all_hit = np.bincount(owner, weights=hits) == lengths
    last_hit = hits[np.cumsum(lengths) - 1]
    scores = map(RowScore, sums.tolist(), all_hit.tolist(), last_hit.tolist())
    return dict(zip(batch.rows, scores, strict=True))


def _hidden(model: LanguageModel, tokens: Tensor, layout: Layout) -> Tensor:
    # Not `model.hidden` itself, which `evaluate_loss` compiles: each use would make the other compile again.
    return model.hidden(tokens, layout)


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function compiled, once in a process, for each shape of its arguments."""
    return torch.compile(function, dynamic=False)


def token_scores(hidden: Tensor, weight: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(target) at each position, fp32, and True where no other token is likelier.

    hidden (positions, n_embd), weight as a model's `head_weight`, targets (positions,) -> two of (positions,).
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
def evaluating(model: LanguageModel, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Run the block in eval mode, without gradients, in this precision even if the caller uses autocast."""
    was_training = model.training
    model.train(False)
    # A training step that found inference tensors in the cache of cast weights could not go backward through them.
    kind = device_of(model).type
    precision = torch.autocast(kind, autocast_dtype, autocast_dtype is not None, cache_enabled=False)
    try:
        with torch.inference_mode(), precision:
            yield
    finally:
        model.train(was_training)


def device_of(model: LanguageModel) -> torch.device:
    """Return where the model's weights are, or the CPU for a model without any."""
    return next(model.parameters(), torch.empty(0)).device
