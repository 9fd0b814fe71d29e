"""From logits to the next token."""

import numpy as np
import torch
from torch import Tensor


def check_options(temperature: float, top_k: int | None, top_p: float, min_p: float, seed: int) -> None:
    """Refuse options that mean nothing.

    Raises:
        ValueError: says which one, and what it may be.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie between 0 and 1, not {min_p}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie between 0 and 2**64 - 1, not {seed}")


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """The row's own random numbers, (count,) in [0, 1).

    One number a token, from a counter-based stream that (seed, row) alone choose: a row draws the same ones in
    any batch, on any device. Source: Philox, Salmon et al. 2011, as numpy implements it.
    """
    return np.random.Generator(np.random.Philox(key=[seed, row])).random(count, dtype=np.float32)


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> Tensor:
    """Choose one token a row: (rows, vocab_size) logits and (rows,) numbers in [0, 1) -> (rows,) ids.

    Temperature 0 is the exact argmax. Otherwise the `top_k` most likely tokens stay (exactly k, ties broken by
    torch.topk), of these the smallest set whose probability reaches `top_p`, of these the ones at least
    `min_p` times as likely as the best; the token is read off the cumulative distribution at `uniform`.
    All in fp32: a bf16 cumulative sum over 50,257 tokens saturates and cuts the wrong ones.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    ids: Tensor | None = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    # The best logit is subtracted before the division, so that a tiny temperature gives 0 and -inf, not NaN.
    best = logits.amax(-1, keepdim=True)
    probabilities = torch.softmax((logits - best) / temperature, -1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < top_p, 0.0)
    if min_p > 0:
        floor = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    cumulative = probabilities.cumsum(-1)
    target = uniform.to(logits)[:, None] * cumulative[:, -1:]
    # right=True: the first entry strictly above the target, so that a token of probability 0 is never chosen.
    choice = torch.searchsorted(cumulative, target, right=True)
    # u * total can round up to the total itself: then take the last token that has any probability.
    last = (probabilities > 0).long().mul(torch.arange(probabilities.shape[-1], device=logits.device)).amax(-1)
    choice = torch.minimum(choice.squeeze(-1), last)
    return choice if ids is None else ids.gather(-1, choice[:, None]).squeeze(-1)
