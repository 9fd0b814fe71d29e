"""Cross-entropy of the output projection without ever holding the logits of a whole batch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256  # of logits at a time: 51 MB in fp32; from 128 to 512 all are equally fast


class _HeadLoss(torch.autograd.Function):
    """The gradients are computed in the forward, while a block of logits is at hand, so that it can be dropped.

    Softmax, loss and the gradient of the logits take one buffer, in place. Source of the idea: llm.c's
    fused_classifier; the blocks are those of chunked cross-entropy losses (torchtitan, Liger).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        if wanted:
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        counted = (targets >= 0).float()
        share = counted / counted.sum()  # of each row in the mean
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            target = targets[rows, None].clamp_min(0)
            logits = (hidden[rows] @ weight.t()).float()
            best = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, target) - best
            exponentials = logits.sub_(best).exp_()
            total = exponentials.sum(-1, keepdim=True)
            loss += ((total.log() - chosen) * share[rows, None]).sum()
            if wanted:
                logits_grad = exponentials.mul_(share[rows, None] / total)
                logits_grad.scatter_add_(-1, target, -share[rows, None])
                logits_grad = logits_grad.to(weight.dtype)
                hidden_grad[rows] = logits_grad @ weight
                if weight.dtype == torch.float32:
                    weight_grad.addmm_(logits_grad.t(), hidden[rows])
                else:  # the sum over blocks stays fp32
                    weight_grad += logits_grad.t() @ hidden[rows]
        if wanted:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight), targets)`, equal up to rounding, in blocks of rows.

    2.2 times as fast on a CPU for n_embd 128 (2,048 rows, one thread: 1.03 s instead of 2.23), since softmax and
    its gradient pass once over a block in the cache instead of five times over 412 MB; and it needs 51 MB, not
    1.2 GB. Under autocast the products are bf16; the softmax and the sums are always fp32.

    Args:
        hidden: (rows, n_embd).
        weight: (vocab_size, n_embd).
        targets: (rows,) int64; -100 counts for nothing.

    Returns:
        () in fp32: mean nats per counted target.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(hidden, weight.to(hidden.dtype), targets)  # type: ignore[no-any-return,no-untyped-call]
