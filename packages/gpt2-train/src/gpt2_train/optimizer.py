"""AdamW with GPT-3's settings, Muon by choice, their state by name, and the learning rate of each step."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_train.config import TrainConfig

Optimizers = list[torch.optim.Optimizer]


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:  # fmt: skip
    """Return fused AdamW (Loshchilov and Hutter 2019), which decays matrices and embeddings, not biases and norms.

    Betas and eps are GPT-3's (Brown et al. 2020, appendix B).
    """
    groups = _decay_groups([p for p in model.parameters() if p.requires_grad], weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def make_optimizers(model: nn.Module, config: TrainConfig, *, sharded: bool = False) -> Optimizers:
    """Return a run's optimizers: AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) is torch's own, scaled to the size of AdamW's updates (Liu et al. 2025), so that one
    learning rate and decay serve both. With `sharded` each process keeps the state of some parameters, updates
    these, and sends them to the others (ZeRO stage 1, Rajbhandari et al. 2020): the updates are equal to the bit.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if name.startswith("h.") and p.ndim == 2 and config.optimizer == "muon"]
    of_muon = set(matrices)
    groups = _decay_groups([p for _, p in named if p not in of_muon], config.weight_decay)
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    wanted: list[tuple[Any, Any, dict[str, Any]]] = [(torch.optim.AdamW, groups, adamw)]
    if config.optimizer == "muon":
        muon = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        wanted.insert(0, (torch.optim.Muon, matrices, muon))
    if not sharded:
        return [kind(parameters, **settings) for kind, parameters, settings in wanted]
    with warnings.catch_warnings():  # importing its package compiles what we do not use
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return [ZeroRedundancyOptimizer(parameters, kind, **settings) for kind, parameters, settings in wanted]


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def state_shapes(model: nn.Module, optimizers: Optimizers) -> dict[str, torch.Size]:
    """Return the shape of each tensor of the whole state, by names like "exp_avg.wte.weight"."""
    return {name: parameter.shape for name, parameter, _ in _states(model, optimizers)}


def own_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return the state tensors that this process keeps: all, or its share; zeros where nothing was updated yet."""
    tensors = {}
    for name, parameter, state in _states(model, [_local(optimizer) for optimizer in optimizers]):
        tensor = state[parameter].get(name.partition(".")[0])
        tensors[name] = torch.zeros_like(parameter) if tensor is None else tensor
    return tensors


def load_state(model: nn.Module, optimizers: Optimizers, updates: int, saved: Callable[[str], Tensor]) -> None:
    """Set this process's share of the state, after `updates` updates, to the values saved by name, bit for bit."""
    for name, parameter, state in _states(model, [_local(optimizer) for optimizer in optimizers]):
        key = name.partition(".")[0]
        state[parameter][key] = saved(name).to(parameter.device)
        if key != "momentum_buffer":  # fused AdamW keeps its count beside each parameter, in fp32
            state[parameter]["step"] = torch.tensor(float(updates), device=parameter.device)


def _local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer of this process's share if it is sharded, else the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def _states(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Yield (name of the tensor, its parameter, the optimizer's state) of each tensor, in the model's order."""
    optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if (optimizer := optimizer_of.get(parameter)) is not None:
            is_adamw = isinstance(_local(optimizer), torch.optim.AdamW)
            for key in ("exp_avg", "exp_avg_sq") if is_adamw else ("momentum_buffer",):
                yield f"{key}.{name}", parameter, optimizer.state


def optimizer_bytes(config: TrainConfig, world_size: int) -> int:
    """Return the bytes of state per process: AdamW has two fp32 moments, Muon one for the blocks' matrices."""
    shape = config.model_config
    muon = shape.matrix_parameters if config.optimizer == "muon" else 0
    total = 8 * shape.num_parameters - 4 * muon
    if not config.shard_optimizer:
        return total
    # Tensors are not split, so one process has at least the state of the token embedding.
    return max(-(-total // world_size), 8 * shape.vocab_size * shape.n_embd)


def lr_at(
    step: int, *, lr: float, min_lr: float, warmup: int, steps: int, schedule: str = "cosine", decay_steps: int = 0
) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    `lr * (step + 1) / warmup` during the warmup, then from `lr` down to `min_lr` at `steps`:

    cosine  half a cosine, as in build-nanogpt and GPT-3.
    linear  a straight line; to zero (min_lr 0) it beats the cosine at this size (Bergsma et al. 2025).
    wsd     `lr` until the last `decay_steps` (0: a fifth of all), then a straight line (Hu et al. 2024): a run can
            be extended from its stable part.
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
