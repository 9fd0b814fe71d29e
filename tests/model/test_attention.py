"""The attention of a CPU's bf16 is torch's, and its gradients: as near to fp64 as that kernel itself."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from gpt2_model import GPTConfig
from gpt2_model.cpu.training import LONGEST, causal_attention, kept_bytes
from gpt2_model.model import ACTIVATION_FUNCTIONS, CausalSelfAttention, plain_attention

NAMES = ("output", "query", "key", "value")


def found(attend, inputs, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    output.backward(grad)
    return output.detach(), *(leaf.grad for leaf in leaves)


def torchs(query, key, value, scale):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200, LONGEST])
@pytest.mark.parametrize(("spread", "scale"), [(1, 0.125), (8, 0.3)])
def test_is_as_exact_as_torchs_kernel(time, spread, scale) -> None:
    """`spread` 8: scores of hundreds, of which bf16 could not tell the largest."""
    torch.manual_seed(0)
    inputs = [(spread * torch.randn(2, 3, time, 16)).bfloat16() for _ in range(3)]
    grad = torch.randn(2, 3, time, 16).bfloat16()
    exact = found(lambda *x: torchs(*x, scale), [x.double() for x in inputs], grad.double())
    theirs = found(lambda *x: torchs(*x, scale), inputs, grad)
    ours = found(lambda *x: causal_attention(*x, scale), inputs, grad)
    for name, mine, other, truth in zip(NAMES, ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16, name
        if truth.norm() > 0:  # a single position looks at itself alone, whatever its query
            assert relative(mine, truth) <= 1.5 * relative(other, truth) + 1e-4, name
        else:
            assert mine.abs().max() < 1e-2, name


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_compute_the_plain_formula(masked) -> None:
    """By the module and by hand: without a cache, and with one that has a mask and more positions than queries."""
    torch.manual_seed(0)
    module = CausalSelfAttention(GPTConfig(n_head=4, n_embd=32), layer=0)
    x = torch.randn(2, 9, 32)
    q, k, v = (part.view(2, 9, 4, 8).transpose(1, 2) for part in module.c_attn(x).split(32, dim=2))
    mask, cache = None, None
    if masked:
        k, v = torch.cat([k, k + 1], 2), torch.cat([v, v + 1], 2)
        mask = torch.rand(2, 1, 9, 18) < 0.5
        mask[..., 0] = True
        cache = SimpleNamespace(extend=lambda *_: (k, v, mask))
    y = plain_attention(q, k, v, 8**-0.5, mask)
    expected = module.c_proj(y.transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(module(x, cache), expected, rtol=0, atol=1e-5)


def test_a_row_does_not_see_what_comes_after() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 150, 8).bfloat16().requires_grad_() for _ in range(3)]
    before = causal_attention(*inputs, 0.5)
    with torch.no_grad():
        for tensor in inputs:
            tensor[:, :, 97:] = 100
    after = causal_attention(*inputs, 0.5)
    assert torch.equal(before[:, :, :97], after[:, :, :97])
    assert not torch.equal(before, after)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_it_is_the_same(rows) -> None:
    """Of heads that lie side by side, as a model's do: a single row's are a view, others are copied."""
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 130, 2, 16).bfloat16().transpose(1, 2) for _ in range(3)]
    grad = torch.randn(rows, 130, 2, 16).bfloat16().transpose(1, 2)
    compiled = torch.compile(causal_attention, dynamic=False)
    plain = found(lambda *x: causal_attention(*x, 0.25), inputs, grad)
    for mine, expected in zip(found(lambda *x: compiled(*x, 0.25), inputs, grad), plain, strict=True):
        assert relative(mine, expected.double()) < 5e-3


def test_it_keeps_what_it_says() -> None:
    kept = []
    inputs = [torch.randn(2, 3, 100, 8).bfloat16().requires_grad_() for _ in range(3)]

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_attention(*inputs, 1.0)
    assert sum(t.nbytes for t in kept) == 3 * inputs[0].nbytes + 2 * 3 * kept_bytes(100)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
def test_the_compilers_gelu_is_torchs() -> None:
    """In fp64, where both are the same function, to the last digits, and its derivative."""
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    compiled = torch.compile(ACTIVATION_FUNCTIONS["gelu_new"], dynamic=False)
    results = []
    for function in (compiled, lambda x: F.gelu(x, approximate="tanh")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
