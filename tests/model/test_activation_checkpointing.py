"""Computing activations again in the backward changes the memory, and not one bit of the loss or a gradient."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from gpt2_model import GPT, GPTConfig

TOKENS = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
TARGETS = TOKENS.roll(1)


def small(checkpointing: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, vocab_size=64, block_size=64))
    model.activation_checkpointing = checkpointing
    return model


def step(model, call, autocast):
    """Loss and gradients of a micro-batch, and the bytes that its forward keeps for the backward."""
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, loss = call(TOKENS, TARGETS, return_logits=False)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], sum(kept)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler makes a Function of head_loss's
@pytest.mark.parametrize(
    ("way", "autocast"),
    [
        ("eager", False),
        ("eager", True),
        pytest.param("compiled", True, marks=pytest.mark.slow),
        pytest.param("compiled", False, marks=pytest.mark.long),  # the same graph but for its casts
    ],
)
def test_bit_equal_and_smaller(way, autocast) -> None:
    """The compiled one stops before the code generator, whose minute proves nothing about the graph."""
    found = {}
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = small(checkpointing)
        call = model if way == "eager" else torch.compile(model, fullgraph=True, backend="aot_eager")
        found[checkpointing] = step(model, call, autocast)
    (expected, all_kept), (ours, kept) = found[False], found[True]
    assert all(map(torch.equal, ours, expected))
    assert len(ours) == 1 + len(list(small(False).parameters()))
    assert kept < all_kept / 2


def test_blocks_run_twice_only_where_gradients_are_wanted() -> None:
    model = small(True)
    runs = []
    model.h[0].register_forward_pre_hook(lambda *args: runs.append(1))
    model(TOKENS, TARGETS)[1].backward()
    assert len(runs) == 2
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(model(TOKENS)[0], small(False)(TOKENS)[0])
    assert len(runs) == 4
    assert "activation_checkpointing" not in vars(model.config)
