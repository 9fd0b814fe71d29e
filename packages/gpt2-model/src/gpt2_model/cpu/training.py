"""Training on a CPU: attention in bf16, a loss that keeps no logits, and one gradient for the tied embedding."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows of logits at a time: 206 MB in fp32, 103 in bf16. With 256 rows the products take 1.1 times as long.
ROWS = 1024
LONGEST = 1024  # positions; beyond that the probabilities, whose number is quadratic, are not worth their memory


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * query key^T) value, in which no position sees what follows it.

    All are (batch, heads, time, head_dim). Training on a CPU in bf16, up to 1,024 positions, uses our own code,
    whose products are large enough for the matrix units: both passes take 0.65 of the time for 4 x 256 positions
    and 12 heads, and a step of 124M 7 to 10 % less than with torch 2.13, whose kernel multiplies smaller tiles.
    Everything else uses torch's kernel. The result can be differentiated once.
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    if trains and takes_own(query.device.type, query.dtype, query.shape[2]):
        return _attention(query, key, value, scale)[0]  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def takes_own(device_type: str, dtype: torch.dtype, time: int) -> bool:
    """True if `causal_attention` of `time` positions is computed here for training, not by torch's kernel."""
    return device_type == "cpu" and dtype == torch.bfloat16 and time <= LONGEST


def kept_bytes(time: int) -> int:
    """Return the bytes of the probabilities of `time` positions that one head keeps for the backward pass."""
    return 2 * sum((end - start) * end for start, end in _blocks(time))


def _blocks(time: int) -> list[tuple[int, int]]:
    """Return (start, end) of blocks of queries: 64, so that the scores stay in a cache, or an eighth of all."""
    length = max(64, -(-time // 8))
    return [(start, min(start + length, time)) for start in range(0, time, length)]


# An operator, which is not traced: if it were, 124M would compile in 109 s, not 49, at 256 tokens (1,024: 200 s).
@torch.library.custom_op("gpt2_model::causal_attention", mutates_args=(), device_types="cpu")
def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention, a block of queries at a time, and the probabilities in bf16, which the backward needs.

    Scores are fp32, as in torch's own kernel: in bf16 a score of 64 would be off by up to a quarter.
    """
    shape, probabilities = query.shape, _room(query)
    query, key, value = (part.reshape(-1, *shape[2:]) for part in (query, key, value))
    scaled, wide_key = query.float() * scale, key.float().transpose(1, 2)
    output = query.new_empty(query.shape)
    for (start, end), block in zip(_blocks(shape[2]), _split(probabilities, shape), strict=True):
        scores = torch.bmm(scaled[:, start:end], wide_key[:, :, :end])
        scores[:, :, start:] += scores.new_full((end - start, end - start), -torch.inf).triu_(1)
        block.copy_(scores.softmax(-1))
        output[:, start:end] = torch.bmm(block, value[:, :end])
    return output.view(shape), probabilities


@torch.library.custom_op("gpt2_model::causal_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    The probabilities' gradient is rounded to bf16, as its factors already are: against fp64 the results are 0.8 to
    1.3 times as far off as those of torch's kernel, and it takes three quarters of the time.
    """
    shape = query.shape
    grad, query, key, value = (part.reshape(-1, *shape[2:]) for part in (grad, query, key, value))
    query_grad = query.new_empty(query.shape)
    key_grad, value_grad = (query.new_zeros(query.shape, dtype=torch.float32) for _ in range(2))  # sums
    for (start, end), block in zip(_blocks(shape[2]), _split(probabilities, shape), strict=True):
        value_grad[:, :end] += torch.bmm(block.transpose(1, 2), grad[:, start:end])
        block_grad = torch.bmm(grad[:, start:end], value[:, :end].transpose(1, 2))
        scores_grad = torch._softmax_backward_data(block_grad, block, -1, block.dtype)  # it computes in fp32
        query_grad[:, start:end] = torch.bmm(scores_grad, key[:, :end])
        key_grad[:, :end] += torch.bmm(scores_grad.transpose(1, 2), query[:, start:end])
    grads = query_grad.mul_(scale), key_grad.mul_(scale).to(key.dtype), value_grad.to(value.dtype)
    return tuple(part.view(shape) for part in grads)  # type: ignore[return-value]


def _room(query: Tensor) -> Tensor:
    """Return an empty tensor for the probabilities of all blocks, one after another."""
    batch, heads, time, _ = query.shape
    return query.new_empty(batch * heads * kept_bytes(time) // 2)


def _split(probabilities: Tensor, shape: torch.Size) -> list[Tensor]:
    """Return views of each block's probabilities, (batch * heads, queries, keys)."""
    shapes = [(shape[0] * shape[1], end - start, end) for start, end in _blocks(shape[2])]
    parts = torch.split(probabilities, [math.prod(block) for block in shapes])
    return [part.view(block) for part, block in zip(parts, shapes, strict=True)]


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _room(query)


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[3]


def _gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


_attention.register_autograd(_gradients, setup_context=_save)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return F.cross_entropy of the logits F.linear(hidden, weight), without keeping the logits.

    On a CPU it uses blocks of rows, equal up to rounding, 2.2 times as fast for n_embd 128 (2,048 rows, 1 thread:
    1.03 s instead of 2.23), since softmax and its gradient pass once over a block instead of five times over all
    logits. Under autocast the products are bf16; softmax, sums and gradients are always fp32.

    Args:
        hidden: (..., n_embd).
        weight: (vocab_size, n_embd).
        targets: (...) int64; -100 is ignored.

    Returns:
        () in fp32: mean nats per counted target, NaN if there is none. It can be differentiated once.
    """
    targets, device = targets.flatten(), hidden.device.type
    if device != "cpu":
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, -2), targets)
    if not len(targets):
        raise ValueError("hidden has no rows: there is nothing to take a mean of")
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(hidden.flatten(0, -2), weight, targets, dtype)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    """The loss. Its forward pass computes the gradients too, in the buffer of a block of logits.

    Sources: the idea is llm.c's fused_classifier; the blocks are those of chunked losses (torchtitan, Liger).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        trains = any(ctx.needs_input_grad)
        if trains:  # the weight's gradient is a sum over blocks, and so fp32
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        # GPT-2's 50,257 is odd: most rows of logits would begin in the middle of a vector. The forward product in
        # fp32 takes 1.35 times as long then, and the weight's gradient in bf16 1.25 times. So rows of zeros pad
        # the weight to a multiple of 64, and nobody reads their logits: 10 ms of 124M's 700.
        hidden, padded = hidden.to(dtype), weight.to(dtype)
        if len(weight) % 64:
            padded = F.pad(padded, (0, 0, 0, -len(weight) % 64))
        counted = (targets != -100).float()
        share = counted / counted.sum()  # of each row in the mean
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            logits = hidden[rows] @ padded.t()
            target = targets[rows, None].where(counted[rows, None] > 0, 0)
            loss += _to_gradients(logits[:, : len(weight)], target, share[rows, None])
            if trains:
                hidden_grad[rows] = logits @ padded
                _add_product(weight_grad, logits.t(), hidden[rows], begin=start == 0)
        if trains:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place, which saves 154 MB for 124M: autograd uses saved tensors only once, so nobody sees it change.
        return hidden_grad * grad, weight_grad.mul_(grad), None, None


def _to_gradients(logits: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Return the loss () of logits (rows, vocab_size), overwritten by its gradient; the others are (rows, 1)."""
    # 32 rows stay in a cache: 0.86 of the loss's time in bf16 with n_embd 128. The compiler itself fuses passes.
    rows = len(logits) if torch.compiler.is_compiling() else 32
    loss = logits.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits), rows):
        block, chosen, part = (tensor[start : start + rows] for tensor in (logits, target, share))
        scores = block.float()  # the block itself if it is fp32
        best = scores.amax(-1, keepdim=True)
        score = scores.gather(-1, chosen) - best
        exponentials = scores.sub_(best).exp_()
        total = exponentials.sum(-1, keepdim=True)
        loss += ((total.log() - score) * part).sum()
        exponentials.mul_(part / total).scatter_add_(-1, chosen, -part)
        if scores.dtype != block.dtype:
            block.copy_(exponentials)
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, begin: bool) -> None:
    """Add left @ right to total in total's own precision, or store it if `begin`. Left's padding is left out."""
    if total.dtype == left.dtype:
        total.addmm_(left[: len(total)], right, beta=0.0 if begin else 1.0)
    elif begin:
        total.copy_((left @ right)[: len(total)])
    else:
        total += (left @ right)[: len(total)]


def look_up(embedding: nn.Embedding, tokens: Tensor, share_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the embeddings of tokens, (..., n_embd), and the weight for a tied output projection.

    By itself autograd makes two gradients of the weight's size, of which the embedding's is mostly zeros, and adds
    them. With `share_gradient`, on a CPU, the embedding's rows are added into the other gradient: for 124M a step
    needs 154 MB less, and in bf16 1.4 % less time if it is compiled, else 0.5 %. The gradient that comes back
    through the returned weight must then be a tensor of its own, as head_loss's is; both are differentiable once.
    """
    if share_gradient and tokens.device.type == "cpu" and torch.is_grad_enabled():
        return _LookUp.apply(embedding.weight, tokens)  # type: ignore[no-any-return,no-untyped-call]
    return embedding(tokens), embedding.weight


class _LookUp(torch.autograd.Function):
    """The embedding, whose backward adds the gradient of its rows to that of the whole weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows_grad: Tensor, weight_grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        _add_rows(weight_grad, tokens.flatten(), rows_grad.flatten(0, -2))
        return weight_grad, None


# An operator, since the compiler's own code, as for F.embedding's gradient, lets threads add the rows of one token
# in any order: a resumed run would end with other bits.
@torch.library.custom_op("gpt2_model::add_rows", mutates_args={"total"}, device_types="cpu")
def _add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    total.index_add_(0, ids, rows)


@_add_rows.register_fake
def _(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    pass
