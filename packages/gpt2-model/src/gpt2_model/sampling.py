"""From logits to the next token."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; `stream` explains each option. An invalid value raises a ValueError."""

    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        inf = float("inf")
        for name, is_right, right in (
            ("temperature", 0 <= self.temperature < inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "above 0, and 1 for none"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
        ):
            if not is_right:
                raise ValueError(f"{name} must be {right}, not {getattr(self, name)}")


def uniforms(seed: int, row: int, count: int) -> np.ndarray:
    """Return the row's own random numbers, (count,) in [0, 1): the same in any batch, on any device.

    Source: Philox, Salmon et al. 2011, as numpy implements it.
    """
    return np.random.Generator(np.random.Philox(key=[seed, row])).random(count, dtype=np.float32)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen`, (rows, vocab_size) bool, less likely (CTRL, Keskar et al. 2019, 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, uniform: Tensor, options: Sampling) -> Tensor:
    """Choose one token for each row: (rows, vocab_size) logits and (rows,) numbers in [0, 1) -> (rows,) ids.

    Temperature 0 is the exact argmax. Otherwise we keep the `top_k` most likely tokens (exactly k, ties broken by
    torch.topk), of these the smallest set whose probability reaches `top_p`, of these the ones at least `min_p`
    times as likely as the best; the token is read off the cumulative distribution at `uniform`.
    All of this is in fp32: a bf16 cumulative sum over 50,257 tokens saturates and cuts off the wrong ones.
    """
    logits = logits.float()
    if options.temperature == 0:
        return logits.argmax(-1)
    ids: Tensor | None = None
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits, ids = logits.topk(options.top_k)
    elif options.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    # The best logit is subtracted before the division, so that a tiny temperature gives 0 and -inf, not NaN.
    best = logits.amax(-1, keepdim=True)
    probabilities = torch.softmax((logits - best) / options.temperature, -1)
    if options.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < options.top_p, 0.0)
    if options.min_p > 0:
        floor = options.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    cumulative = probabilities.cumsum(-1)
    target = uniform.to(logits)[:, None] * cumulative[:, -1:]
    # right=True: the first entry strictly above the target, so that a token of probability 0 is never chosen.
    choice = torch.searchsorted(cumulative, target, right=True)
    # u * total can round up to the total itself: then take the last token that has any probability.
    last = (probabilities > 0).long().mul(torch.arange(probabilities.shape[-1], device=logits.device)).amax(-1)
    choice = torch.minimum(choice.squeeze(-1), last)
    return choice if ids is None else ids.gather(-1, choice[:, None]).squeeze(-1)
