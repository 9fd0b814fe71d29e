"""Validation loss, perplexity and bits per byte on exactly the first tokens of a split."""

import math
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2_eval.models import GPT2, LanguageModel
from gpt2_eval.published import short_hash
from gpt2_eval.report import LossResult, columns_of, perplexity_of
from gpt2_eval.scoring import PassOptions, compiled, device_of, score_batches, token_scores
from gpt2_model import EOT, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gpt2_data import Dataset


def evaluate_loss(
    model: LanguageModel,
    dataset: "Dataset",
    *,
    split: str = "val",
    tokens: int = 10_485_760,  # build-nanogpt's and modded-nanogpt's: 20 x 64 x 1,024 x 8
    seq_len: int | None = None,
    batch_size: int | None = None,
    compile: bool = False,
    **options: Unpack[PassOptions],
) -> LossResult:
    """Return the mean cross-entropy of the split's first `tokens` target tokens, in windows of `seq_len`.

    These are numbers 1 to `tokens` (number 0 has nothing before it), whatever the batch size and the ranks.

    Args:
        dataset: what `gpt2_data.open_dataset` returns.
        tokens: target tokens; all of them if the split is smaller (`LossResult.tokens` says how many).
        seq_len: tokens per window; the model's context if None.
        batch_size: windows in a forward pass; 8 if None. In fp32 it changes only the last digits.
        compile: run the model compiled, on batches of one shape: the last batch is padded.
        options: as in `score_items`; so are ranks and Interrupted.

    Raises:
        ValueError: a size does not fit the model or the split, ids are beyond the vocabulary, or a loss is NaN.
    """
    block_size = model.config.block_size
    seq_len = block_size if seq_len is None else seq_len
    if not 1 <= seq_len <= block_size:
        raise ValueError(f"seq_len must be 1 to {block_size}, the model's context, not {seq_len}")
    batch_size = 8 if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    num_targets = count_targets(dataset, split, tokens)
    start = time.perf_counter()
    token_bytes = bytes_per_token(dataset, model)
    num_windows = -(-num_targets // seq_len)
    firsts = range(0, num_windows, batch_size)
    batches = [range(first, min(first + batch_size, num_windows)) for first in firsts]

    def score(number: int) -> dict[int, tuple[float, int]]:
        windows = batches[number]
        ids = dataset.read(split, windows.start * seq_len, min(windows.stop * seq_len, num_targets) + 1)
        nats, text_bytes = _score_windows(model, ids, token_bytes, seq_len, batch_size if compile else None)
        return dict(zip(windows, zip(nats.tolist(), text_bytes.tolist(), strict=True), strict=True))

    data = (dataset.manifest.hash, split)
    windows = score_batches(model, batches, score, scored=(*data, num_targets, seq_len), unit="windows", **options)
    lengths = [min(seq_len, num_targets - first) for first in range(0, num_targets, seq_len)]
    records = [
        {"window": number, "hash": short_hash(*data), "nats": nats, "tokens": length, "bytes": num_bytes}
        for number, ((nats, num_bytes), length) in enumerate(zip(windows, lengths, strict=True))
    ]
    # Sums are in float64 and in order, and so the same on every rank.
    column = columns_of(records)["loss"]
    loss, total_bytes = column.estimate(), sum(num_bytes for _, num_bytes in windows)
    return LossResult(
        split=split,
        dataset=dataset.manifest.hash,
        loss=loss.value,
        stderr=loss.stderr,
        perplexity=perplexity_of(loss.value),
        bits_per_byte=float(column.values.sum() / math.log(2) / total_bytes) if total_bytes else math.nan,
        tokens=num_targets,
        tokens_requested=tokens,
        sequences=len(records),
        seq_len=seq_len,
        seconds=time.perf_counter() - start,
        records=records,
    )


def count_targets(dataset: "Dataset", split: str, tokens: int) -> int:
    """Return the number of target tokens to score; a ValueError says that the split has none."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    available = dataset.tokens(split)
    if available < 2:
        raise ValueError(f"split {split!r} has {available} tokens: there is nothing to predict")
    return min(tokens, available - 1)


def _score_windows(
    model: LanguageModel,
    ids: NDArray[np.uint16],
    token_bytes: NDArray[np.int64],
    seq_len: int,
    fill_to: int | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return nats and bytes of each window's targets, from consecutive ids (targets + 1,); the last may be short.

    With `fill_to`, the model runs compiled, on a batch that is padded to that many windows.
    """
    limit = min(model.config.vocab_size, len(token_bytes))
    if ids.max() >= limit:
        raise ValueError(f"token id {ids.max()} in the data is beyond the vocabulary of {limit}")
    num_targets, device = ids.size - 1, device_of(model)
    window_of = np.arange(num_targets) // seq_len
    tokens = np.zeros((fill_to or window_of[-1] + 1) * seq_len, dtype=np.int64)
    tokens[:num_targets] = ids[:-1]
    targets = torch.from_numpy(ids[1:].astype(np.int64)).to(device)
    batch = torch.from_numpy(tokens.reshape(-1, seq_len)).to(device)
    hidden = model.hidden(batch) if fill_to is None else compiled(type(model).hidden)(model, batch)
    # The padding lies at the end of the flattened batch, where it is cut off and never scored.
    log_probs, _ = token_scores(hidden.flatten(0, 1)[:num_targets], model.head_weight, targets)
    nats = np.bincount(window_of, weights=-log_probs.cpu().double().numpy())
    text_bytes = np.bincount(window_of, weights=token_bytes[ids[1:]])
    return nats.astype(np.float64), text_bytes.astype(np.int64)


def tokenizer_of(dataset: "Dataset") -> Tokenizer:
    """Return the tokenizer by which a dataset was made: GPT-2's, or its own."""
    file = dataset.tokenizer
    return GPT2 if file is None else load_tokenizer(file.parent, dataset.eot) or GPT2


def bytes_per_token(dataset: "Dataset | None" = None, model: LanguageModel | None = None) -> NDArray[np.int64]:
    """Return the UTF-8 bytes of each id of a dataset, or of GPT-2's; `<|endoftext|>` is no text and has 0.

    All are 0 if the model has no tokenizer and the dataset none of its own: its ids may be characters'.
    """
    if dataset is not None and dataset.tokenizer is not None:
        return _bytes_per_token(tokenizer_of(dataset), dataset.vocab_size, dataset.eot)
    known = getattr(model, "tokenizer", GPT2) is not None
    return _bytes_per_token(GPT2, EOT + 1, EOT) if known else np.zeros(EOT + 1, np.int64)


@lru_cache(maxsize=2)
def _bytes_per_token(tokenizer: Tokenizer, size: int, eot: int) -> NDArray[np.int64]:
    lengths = np.array([len(text) for text in tokenizer.token_bytes()][:size])
    lengths.resize(size)
    lengths[eot] = 0
    return lengths
