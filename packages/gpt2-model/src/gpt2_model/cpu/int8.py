"""Weights in 8 bits, quantised when a model is loaded. They take a quarter of fp32's memory and time per token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PANEL, GROUP = 16, 4  # one vector instruction multiplies 4 inputs of each of 16 outputs


class Int8Matrix(nn.Module):
    """A linear layer, or an embedding, whose weights are whole numbers times one scale for each output.

    The scale is the largest weight of the row over 127 (LLM.int8(), Dettmers et al. 2022, without its outlier
    columns: activations here stay at 16 bits or more).

    Attributes:
        packed: (panels, groups, 16, 4) int8: 16 outputs by 4 inputs lie together, padded with zeros.
        scale: (panels * 16,) fp32.
        sums: (panels * 16,) int32, the sum of the whole numbers of each row.
    """

    packed: Tensor
    scale: Tensor
    sums: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.outs, self.ins = weight.shape
        scale = weight.abs().amax(1).float().clamp_min(1e-30) / 127
        whole = (weight.float() / scale[:, None]).round_().to(torch.int8)
        whole = F.pad(whole, (0, -self.ins % GROUP, 0, -self.outs % PANEL))
        panels = whole.view(-1, PANEL, whole.shape[1] // GROUP, GROUP)
        self.register_buffer("packed", panels.transpose(1, 2).contiguous())
        self.register_buffer("scale", F.pad(scale, (0, -self.outs % PANEL)))
        self.register_buffer("sums", whole.sum(1, dtype=torch.int32))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrix that the numbers stand for, (outs, ins) in fp32."""
        rows = self.packed.transpose(1, 2).reshape(len(self.scale), -1)
        return (rows * self.scale[:, None])[: self.outs, : self.ins]


class Int8Linear(Int8Matrix):
    """x -> x W^T + bias, (..., ins) -> (..., outs) in x's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Int8Embedding(Int8Matrix):
    """ids -> rows of W, (...) -> (..., ins) in fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed[ids // PANEL, :, ids % PANEL].flatten(-2)
        return (rows * self.scale[ids][..., None])[..., : self.ins]


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Replace a GPT's matrices but the positions with int8 ones, in place; it can then be run, but not trained."""
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) or name == "wte"]
    for name in names:
        matrix = model.get_submodule(name)
        assert isinstance(matrix, nn.Linear | nn.Embedding)
        kind = Int8Linear if isinstance(matrix, nn.Linear) else Int8Embedding
        model.set_submodule(name, kind(matrix.weight, getattr(matrix, "bias", None)))
    model.requires_grad_(False)
