"""The gradient of the tied embedding: autograd's own sum of two."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt2_model import GPT, GPTConfig
from gpt2_model.cpu.training import look_up

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 11}


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_sum_of_both_uses(shared) -> None:
    torch.manual_seed(0)
    weight, tokens = torch.randn(11, 4, dtype=torch.float64), torch.tensor([[3, 3, 7], [0, 10, 3]])

    def gradient(uses):
        embedding = nn.Embedding(11, 4, _weight=weight.clone())
        embedded, projection = uses(embedding)
        logits = F.linear(embedded.tanh().flatten(0, 1), projection)
        (F.cross_entropy(logits, torch.arange(6)) * 3).backward()
        return embedding.weight.grad

    expected = gradient(lambda embedding: (F.embedding(tokens, embedding.weight), embedding.weight))
    torch.testing.assert_close(gradient(lambda embedding: look_up(embedding, tokens, shared)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_trains_as_with_logits(tied) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, tie_word_embeddings=tied)).double()
    tokens, targets = torch.randint(0, 11, (2, 8)), torch.randint(0, 11, (2, 8))
    found = []
    for return_logits in (True, False):
        model.zero_grad()
        model(tokens, targets, return_logits=return_logits)[1].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-7)  # the loss is fp32


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])  # another 9 s
def test_compiled_gradients_have_the_same_bits_each_time(tied) -> None:
    """The compiler's own embedding adds the rows of a token in the order in which threads come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        model = GPT(GPTConfig(**{**SMALL, "n_embd": 64, "block_size": 512}, tie_word_embeddings=tied))
        compiled = torch.compile(model, dynamic=False)
        x, y = torch.randint(0, 11, (2, 4, 512))
        found = []
        for _ in range(20):
            model.zero_grad()
            compiled(x, y, return_logits=False)[1].backward()
            found.append([parameter.grad for parameter in model.parameters()])
    finally:
        torch.set_num_threads(threads)
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others)
