"""What training computes its own way on a CPU: attention in bf16, the loss by blocks, the tied gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from gpt2_model import GPT, GPTConfig
from gpt2_model.cpu.training import LONGEST, ROWS, causal_attention, head_loss
from gpt2_model.model import ACTIVATION_FUNCTIONS, CausalSelfAttention, plain_attention

# torch's compiler calls torch.jit
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 11}
NAMES = ("output", "query", "key", "value")


def results_of(attend, inputs, grad):
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
    exact = results_of(lambda *x: torchs(*x, scale), [x.double() for x in inputs], grad.double())
    theirs = results_of(lambda *x: torchs(*x, scale), inputs, grad)
    ours = results_of(lambda *x: causal_attention(*x, scale), inputs, grad)
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


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_it_is_the_same(rows) -> None:
    """Of heads that lie side by side, as a model's do: a single row's are a view, others are copied."""
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 130, 2, 16).bfloat16().transpose(1, 2) for _ in range(3)]
    grad = torch.randn(rows, 130, 2, 16).bfloat16().transpose(1, 2)
    compiled = torch.compile(causal_attention, dynamic=False)
    plain = results_of(lambda *x: causal_attention(*x, 0.25), inputs, grad)
    for mine, expected in zip(results_of(lambda *x: compiled(*x, 0.25), inputs, grad), plain, strict=True):
        assert relative(mine, expected.double()) < 5e-3


def test_the_compilers_gelu_is_torchs() -> None:
    """In fp64, where both are the same function, to the last digits, and its derivative."""
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    compiled = torch.compile(ACTIVATION_FUNCTIONS["gelu_new"], dynamic=False)
    ways = (compiled, lambda x: F.gelu(x, approximate="tanh"))
    for mine, expected in zip(*(results_of(way, [x], torch.ones_like(x)) for way in ways), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def both(rows, *, ignored=0, autocast=False, words=500):
    torch.manual_seed(0)
    targets = torch.randint(0, words, (rows,))
    targets[:ignored] = -100
    hidden, weight = torch.randn(rows, 24), torch.randn(words, 24)

    def loss(loss_of):
        def compute(*leaves):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return loss_of(*leaves, targets)

        return results_of(compute, (hidden, weight), torch.tensor(3.0))

    return zip(loss(head_loss), loss(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t)), strict=True)


@pytest.mark.parametrize(("rows", "ignored"), [(1, 0), (ROWS - 1, 0), (ROWS, 7), (2 * ROWS + 3, ROWS + 1)])
def test_equal_to_cross_entropy(rows, ignored) -> None:
    for ours, expected in both(rows, ignored=ignored):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [500, 512])
def test_equal_under_autocast_to_bf16_s_precision(words) -> None:
    """A vocabulary that is padded, and one that needs no padding."""
    for ours, expected in both(ROWS + 1, autocast=True, words=words):
        assert ours.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=2e-3)


def test_a_weight_in_bf16_has_its_gradient_summed_in_fp32() -> None:
    """Of eight blocks: within one rounding to bf16, 1/256, of the sum of the same products."""
    torch.manual_seed(0)
    rows, classes, width = 8 * ROWS, 11, 8
    hidden, weight = torch.randn(rows, width).bfloat16(), torch.randn(classes, width).bfloat16().requires_grad_()
    targets = torch.randint(0, classes, (rows,))
    head_loss(hidden, weight, targets).backward()
    logits = (hidden @ weight.detach().t()).float()
    logits_grad = (logits.softmax(-1) - F.one_hot(targets, classes)) / rows
    parts = [g.t() @ h for g, h in zip(logits_grad.bfloat16().split(ROWS), hidden.split(ROWS), strict=True)]
    expected = torch.stack([part.float() for part in parts]).sum(0)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1 / 256, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    loss = head_loss(torch.full((2, 1), 1e4), torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(5e3)


def test_nothing_is_kept_without_gradients() -> None:
    with torch.no_grad():
        assert not head_loss(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])).requires_grad


def test_targets_that_no_mean_can_be_taken_of() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match="no rows"):
        head_loss(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    for target in (-5, 7):  # as F.cross_entropy, which lets -100 pass alone
        with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
            head_loss(hidden, weight, torch.tensor([1, target, 2]))
    assert torch.isnan(head_loss(hidden, weight, torch.tensor([-100] * 3)))


def test_gradients_of_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    batches = torch.randint(0, 11, (3, 2, 2, 8))
    alone = []
    for x, y in batches:
        model.zero_grad()
        model(x, y, return_logits=False)[1].backward()
        alone.append(model.wte.weight.grad.clone())
    model.zero_grad()
    for x, y in batches:
        model(x, y, return_logits=False)[1].backward()
    torch.testing.assert_close(model.wte.weight.grad, sum(alone))


def test_a_frozen_embedding_gets_no_gradient() -> None:
    model = GPT(GPTConfig(**SMALL))
    model.wte.weight.requires_grad_(False)
    tokens = torch.randint(0, 11, (2, 8))
    model(tokens, tokens, return_logits=False)[1].backward()
    assert model.wte.weight.grad is None
    assert model.ln_f.weight.grad is not None


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])  # another 9 s
def test_compiled_gradients_have_the_same_bits_each_time(tied) -> None:
    """The compiler's own embedding adds the rows of a token in the order in which threads come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        model = GPT(GPTConfig(**{**SMALL, "n_embd": 64, "block_size": 512}, tie_word_embeddings=tied))
        compiled = torch.compile(model, dynamic=False)
        x, y = torch.randint(0, 11, (2, 4, 512))
        gradients = []
        for _ in range(20):
            model.zero_grad()
            compiled(x, y, return_logits=False)[1].backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.set_num_threads(threads)
    for others in zip(*gradients, strict=True):
        assert all(torch.equal(others[0], other) for other in others)
