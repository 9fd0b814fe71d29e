"""Causal attention for a CPU's bf16, in products that are large enough for its matrix units."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 1024  # positions; beyond that probabilities, whose number is quadratic, are not worth their memory


def _blocks(time: int) -> list[tuple[int, int]]:
    """Of queries: 64, so that a block's scores stay in a cache, or an eighth of them all."""
    length = max(64, -(-time // 8))
    return [(start, min(start + length, time)) for start in range(0, time, length)]


def takes_own(device_type: str, dtype: torch.dtype, time: int) -> bool:
    """Whether `causal_attention` of `time` positions is computed here for training, and not by torch's kernel."""
    return device_type == "cpu" and dtype == torch.bfloat16 and time <= LONGEST


def kept_bytes(time: int) -> int:
    """Of probabilities, for the backward: of one head and one row of `time` positions."""
    return 2 * sum((end - start) * end for start, end in _blocks(time))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Each position's mean of the values at itself and before, weighted by softmax(scale * query . key).

    On a CPU in bf16, up to 1,024 positions, if there will be a backward, in products of its own: both take 0.65 of
    the time for 4 x 256 positions and 12 heads, and a step of 124M 7 to 10 % less (torch 2.13, whose kernel
    multiplies smaller tiles). In fp32, where it would gain nothing, on a GPU, and beyond: torch's kernel.

    Args:
        query, key, value: (batch, heads, time, head_dim).
        scale: what a product of query and key is multiplied by.

    Returns:
        The same shape. It can be differentiated once.
    """
    wanted = torch.is_grad_enabled() and query.requires_grad
    if wanted and takes_own(query.device.type, query.dtype, query.shape[2]):
        return _attention(query, key, value, scale)[0]  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


# An operator, so that the compiler calls it: traced, each block of each layer is written out, and 124M takes 109 s
# to compile instead of 49 at 256 tokens, more than 200 at 1,024.
@torch.library.custom_op("gpt2_model::causal_attention", mutates_args=(), device_types="cpu")
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of a block of queries' scores at a time, over the keys that the block may see.

    Scores are fp32, as in torch's own kernel: one of 64 would be off by a quarter in bf16, and so would be its
    probability. The probabilities are kept, in bf16.
    """
    shape, probabilities = query.shape, _room(query)
    query, key, value = (part.reshape(-1, *shape[2:]) for part in (query, key, value))
    scaled, wide_key = query.float() * scale, key.float().transpose(1, 2)
    output = query.new_empty(query.shape)
    for (start, end), kept in zip(_blocks(shape[2]), _split(probabilities, shape), strict=True):
        scores = torch.bmm(scaled[:, start:end], wide_key[:, :, :end])
        scores[:, :, start:] += scores.new_full((end - start, end - start), -torch.inf).triu_(1)
        kept.copy_(scores.softmax(-1))
        output[:, start:end] = torch.bmm(kept, value[:, :end])
    return output.view(shape), probabilities


@torch.library.custom_op("gpt2_model::causal_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    That of the probabilities is rounded to bf16, which is no more than its factors already are: against fp64 the
    results are 0.8 to 1.3 times as far off as those of torch's kernel, and it takes three quarters of the time.
    """
    shape = query.shape
    grad, query, key, value = (part.reshape(-1, *shape[2:]) for part in (grad, query, key, value))
    query_grad = query.new_empty(query.shape)
    key_grad, value_grad = (query.new_zeros(query.shape, dtype=torch.float32) for _ in range(2))  # sums
    for (start, end), kept in zip(_blocks(shape[2]), _split(probabilities, shape), strict=True):
        value_grad[:, :end] += torch.bmm(kept.transpose(1, 2), grad[:, start:end])
        kept_grad = torch.bmm(grad[:, start:end], value[:, :end].transpose(1, 2))
        scores_grad = torch._softmax_backward_data(kept_grad, kept, -1, kept.dtype)  # it computes in fp32
        query_grad[:, start:end] = torch.bmm(scores_grad, key[:, :end])
        key_grad[:, :end] += torch.bmm(scores_grad.transpose(1, 2), query[:, start:end])
    grads = query_grad.mul_(scale), key_grad.mul_(scale).to(key.dtype), value_grad.to(value.dtype)
    return tuple(part.view(shape) for part in grads)  # type: ignore[return-value]


def _room(query: Tensor) -> Tensor:
    """For the probabilities of all blocks, one after another."""
    batch, heads, time, _ = query.shape
    return query.new_empty(batch * heads * kept_bytes(time) // 2)


def _split(probabilities: Tensor, shape: torch.Size) -> list[Tensor]:
    """Each block's, (batch * heads, queries, keys)."""
    rows = shape[0] * shape[1]
    shapes = [(rows, end - start, end) for start, end in _blocks(shape[2])]
    parts = torch.split(probabilities, [rows * queries * keys for _, queries, keys in shapes])
    return [part.view(wanted) for part, wanted in zip(parts, shapes, strict=True)]


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _room(query)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[3]


def _gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


_attention.register_autograd(_gradients, setup_context=_keep)
