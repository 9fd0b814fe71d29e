"""Evaluating and sampling between the steps of a compiled training: nothing compiles again, no loss changes."""

import pytest
import torch
from torch._dynamo.exc import RecompileError

from gpt2_eval import evaluate_hellaswag, evaluate_loss, load_hellaswag
from gpt2_model import GPT, GPTConfig, generate


def train(evaluate, *, checkpointing, autocast):
    """Losses of four compiled steps, with `evaluate(model)` before each; and what makes one more of a batch."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=128))
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # What is compiled again is Dynamo's decision; what the code generator would make of it does not matter here.
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")

    def step(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, loss = compiled(tokens[:, :-1], tokens[:, 1:], return_logits=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    losses = []
    for tokens in torch.randint(0, 50257, (4, 2, 33), generator=torch.Generator().manual_seed(1)):
        evaluate(model)
        losses.append(step(tokens))
    return losses, step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
@pytest.mark.parametrize(
    ("checkpointing", "autocast"), [pytest.param(False, False, marks=pytest.mark.long), (True, True)]
)
def test_nothing_compiles_again(items_file, dataset, checkpointing, autocast):
    items = load_hellaswag(items_file, limit=3)
    dtype = torch.bfloat16 if autocast else None

    def evaluate(model):
        for fast in (False, True):
            evaluate_loss(model, dataset, tokens=300, autocast_dtype=dtype, compile=fast)
            evaluate_hellaswag(model, items, autocast_dtype=dtype, compile=fast)
        for compile in (None, False):  # the engine where there is one, and the module itself
            generate(model, ["Hello", "A longer prompt"], num_samples=2, max_new_tokens=4, compile=compile)

    options = {"checkpointing": checkpointing, "autocast": autocast}
    with torch._dynamo.config.patch(error_on_recompile=True):
        plain, _ = train(lambda model: None, **options)
        losses, step = train(evaluate, **options)
        assert losses == plain
        with pytest.raises(RecompileError):  # it would be noticed: a batch of another shape is
            step(torch.zeros(2, 32, dtype=torch.long))
