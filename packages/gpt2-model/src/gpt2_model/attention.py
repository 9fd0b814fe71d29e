"""Causal attention for a CPU's bf16, in products that are large enough for its matrix units."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LONGEST = 1024  # positions; beyond that probabilities, whose number is quadratic, are not worth their memory
# The compiler writes out each block of each layer: with four of them 124M takes 109 s to compile in the place of
# 49, with the eight of longer sequences more than 200.
LONGEST_COMPILED = 256


class _Attention(torch.autograd.Function):
    """Softmax of a block of queries' scores at a time, over the keys that the block may see.

    Scores and their gradients are fp32, as in torch's own kernel: a score of 64 would be off by a quarter in bf16,
    and a probability with it. Products that are not summed further are bf16. The probabilities are kept, in bf16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        shape = query.shape
        query, key, value = (part.reshape(-1, *shape[2:]) for part in (query, key, value))
        scaled, wide_key = query.float() * scale, key.float()
        kept, parts = [], []
        for start, end in _blocks(shape[2]):
            scores = scaled[:, start:end] @ wide_key[:, :end].transpose(1, 2)
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu(1)
            scores[:, :, start:].masked_fill_(later, -torch.inf)
            kept.append(scores.softmax(-1).to(query.dtype))
            parts.append(kept[-1] @ value[:, :end])
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return torch.cat(parts, 1).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(query.shape)
        wide_grad, wide_value = grad.float(), value.float()
        query_grads = []
        key_grad, value_grad = torch.zeros_like(wide_value), torch.zeros_like(wide_value)  # sums: fp32
        for (start, end), probabilities in zip(_blocks(shape[2]), kept, strict=True):
            value_grad[:, :end] += probabilities.transpose(1, 2) @ grad[:, start:end]
            probabilities_grad = wide_grad[:, start:end] @ wide_value[:, :end].transpose(1, 2)
            wide = probabilities.float()
            scores_grad = (probabilities_grad - (probabilities_grad * wide).sum(-1, keepdim=True)) * wide
            scores_grad = scores_grad.mul_(ctx.scale).to(query.dtype)
            query_grads.append(scores_grad @ key[:, :end])
            key_grad[:, :end] += scores_grad.transpose(1, 2) @ query[:, start:end]
        grads = torch.cat(query_grads, 1), key_grad.to(key.dtype), value_grad.to(value.dtype)
        return *(part.view(shape) for part in grads), None  # type: ignore[return-value]


def _blocks(time: int) -> list[tuple[int, int]]:
    """Of queries: 64, so that a block's scores stay in a cache, or an eighth of them all."""
    length = max(64, -(-time // 8))
    return [(start, min(start + length, time)) for start in range(0, time, length)]


def takes_own(device_type: str, dtype: torch.dtype, time: int, compiled: bool) -> bool:
    """Whether `causal_attention` of `time` positions is computed here, and not by torch's kernel."""
    longest = LONGEST_COMPILED if compiled else LONGEST
    return device_type == "cpu" and dtype == torch.bfloat16 and time <= longest


def kept_bytes(time: int) -> int:
    """Of probabilities, for the backward: of one head and one row of `time` positions."""
    return 2 * sum((end - start) * end for start, end in _blocks(time))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Each position's mean of the values at itself and before, weighted by softmax(scale * query . key).

    On a CPU in bf16, up to 1,024 positions (256 compiled), in products of its own: forward and backward of 4 x 256
    positions and 12 heads take 15 ms in the place of 25, and a step of 124M 5 to 9 % less (torch 2.13, whose
    kernel multiplies smaller tiles). In fp32, where it would gain nothing, on a GPU, and beyond: torch's kernel.

    Args:
        query, key, value: (batch, heads, time, head_dim).
        scale: what a product of query and key is multiplied by.

    Returns:
        The same shape. It can be differentiated once.
    """
    if takes_own(query.device.type, query.dtype, query.shape[2], torch.compiler.is_compiling()):
        return _Attention.apply(query, key, value, scale)  # type: ignore[no-any-return,no-untyped-call]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
