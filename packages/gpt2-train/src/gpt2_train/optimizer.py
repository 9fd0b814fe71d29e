"""AdamW as GPT-2 is trained with it, Muon by choice, their state by name, and the learning rate of each step."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_train.config import TrainConfig

Optimizers = list[torch.optim.Optimizer]


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
    groups = _decay_groups([p for p in model.parameters() if p.requires_grad], weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def make_optimizers(model: nn.Module, config: TrainConfig, *, sharded: bool = False) -> Optimizers:
    """What updates a run's weights: AdamW for all, or Muon for the blocks' matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) is torch's own, scaled to the size of AdamW's updates (Liu et al. 2025), so that one
    learning rate and decay serve both.

    Args:
        sharded: each process keeps the state of some of the parameters only, updates these, and sends them to the
            others (ZeRO stage 1, Rajbhandari et al. 2020). Every update is the same as unsharded, to the bit.
    """
    parameters = list(model.named_parameters())
    matrices = [p for name, p in parameters if name.startswith("h.") and p.ndim == 2]
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    muon = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    if config.optimizer == "adamw":
        wanted: list[tuple[Any, Any, dict[str, Any]]] = [(torch.optim.AdamW, [p for _, p in parameters], adamw)]
    else:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError("--optimizer muon needs torch 2.9 or newer, for torch.optim.Muon")
        of_muon = set(matrices)
        rest = [p for _, p in parameters if p not in of_muon]
        wanted = [(torch.optim.Muon, matrices, muon), (torch.optim.AdamW, rest, adamw)]
    made: Optimizers = []
    for kind, own, settings in wanted:
        groups = own if kind is not torch.optim.AdamW else _decay_groups(own, config.weight_decay)
        made.append(_sharded(groups, kind, settings) if sharded else kind(groups, **settings))
    return made


def _sharded(groups: Any, kind: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    with warnings.catch_warnings():  # its package compiles, as it is imported, what we do not use
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(groups, kind, **settings)


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def state_shapes(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Size]:
    """Every tensor of the state, on whichever process it is: "exp_avg.h.0.ln_1.weight" -> its shape."""
    return {name: parameter.shape for name, parameter, _ in _states(model, optimizers)}


def own_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """The state tensors that this process keeps: all, or its share; zeros where nothing was updated yet."""
    tensors = {}
    for name, parameter, state in _states(model, [_local(optimizer) for optimizer in optimizers]):
        tensor = state[parameter].get(name.partition(".")[0])
        tensors[name] = torch.zeros_like(parameter) if tensor is None else tensor
    return tensors


def load_state(model: nn.Module, optimizers: Optimizers, updates: int, tensors: Any) -> None:
    """Give each process's share of the state the values that were saved, bit for bit.

    Args:
        updates: how many the state has seen.
        tensors: by name, by `[...]`; only those of this process are asked for.
    """
    for name, parameter, state in _states(model, [_local(optimizer) for optimizer in optimizers]):
        key = name.partition(".")[0]
        state[parameter][key] = tensors[name].to(parameter.device)
        if key != "momentum_buffer":  # fused AdamW keeps its count beside each parameter, in fp32
            state[parameter]["step"] = torch.tensor(float(updates), device=parameter.device)


def _local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Of a sharded optimizer, the one that updates this process's share."""
    return getattr(optimizer, "optim", optimizer)


def _states(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """(name of the tensor, its parameter, the optimizer's state) for each tensor, in the model's order."""
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if (optimizer := optimizer_of.get(parameter)) is not None:
            is_adamw = isinstance(_local(optimizer), torch.optim.AdamW)
            for key in ("exp_avg", "exp_avg_sq") if is_adamw else ("momentum_buffer",):
                yield f"{key}.{name}", parameter, optimizer.state


def lr_at(
    step: int, *, lr: float, min_lr: float, warmup: int, steps: int, schedule: str = "cosine", decay_steps: int = 0
) -> float:
    """Learning rate of the update number `step`, counted from 0.

    `lr * (step + 1) / warmup` during the warmup, then from `lr` down to `min_lr` at `steps`:

    cosine  half a cosine, as in build-nanogpt and GPT-3.
    linear  a straight line; to zero (min_lr 0) it beats the cosine at this size (Bergsma et al. 2025).
    wsd     `lr` until the last `decay_steps` (0: a fifth of all), then a straight line (Hu et al. 2024): a run can
            be prolonged from its stable part.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if step >= steps:
        return min_lr
    if schedule == "wsd":
        start = max(warmup, steps - (decay_steps or steps // 5))
        return lr if step < start else lr + (min_lr - lr) * (step - start) / (steps - start)
    progress = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return lr + (min_lr - lr) * progress
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)
