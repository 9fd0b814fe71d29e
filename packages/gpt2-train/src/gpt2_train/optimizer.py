"""AdamW as GPT-2 is trained with it, and the learning rate of each step."""

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with decay on matrices and embeddings, none on biases and norms.

    Fused: one kernel updates all tensors. Betas and eps are GPT-3's (Brown et al. 2020, appendix B).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step: int, *, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Learning rate of the update number `step`, counted from 0, as in build-nanogpt.

    `lr * (step + 1) / warmup` during the warmup, then half a cosine from `lr` down to `min_lr` at `steps`.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if step >= steps:
        return min_lr
    progress = (step - warmup) / (steps - warmup)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)
