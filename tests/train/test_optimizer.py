"""Which parameter is updated by what, the schedules, and the optimizer's state by name."""

import pytest
import torch

from gpt2_model import GPT, GPTConfig
from gpt2_train import TrainConfig, lr_at, make_optimizer
from gpt2_train.optimizer import load_state, make_optimizers, own_state, state_shapes

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=64, block_size=16)


def trained(optimizer: str, steps: int, saved: dict | None = None) -> tuple[GPT, list]:
    """A model after some steps on fixed batches; with `saved`, the second half of them from that state on."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, lr=1e-2))
    first = 0
    if saved is not None:
        first = saved["updates"]
        model.load_state_dict(saved["model"])
        load_state(model, optimizers, first, saved["optimizer"].__getitem__)
    for step in range(first, steps):
        tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        for one in optimizers:
            one.step()
        model.zero_grad()
    return model, optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("at", [0, 3])
def test_state_by_name_goes_on_bit_for_bit(optimizer, at) -> None:
    half, of_half = trained(optimizer, at)
    saved = {"updates": at, "model": half.state_dict(), "optimizer": own_state(half, of_half)}
    assert {name: tensor.shape for name, tensor in saved["optimizer"].items()} == state_shapes(half, of_half)
    resumed, of_resumed = trained(optimizer, 6, saved)
    whole, of_whole = trained(optimizer, 6)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    for name, tensor in own_state(whole, of_whole).items():
        assert torch.equal(tensor, own_state(resumed, of_resumed)[name]), name


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = GPT(SHAPE)
    muon, adamw = make_optimizers(
        model, TrainConfig(optimizer="muon", lr=0.5, weight_decay=0.2, beta1=0.8, eps=1e-6)
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    assert of_muon == {
        f"h.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    of_adamw = {names[p]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert of_adamw.keys() | of_muon == set(names.values())
    assert not of_adamw.keys() & of_muon
    assert {name for name, decay in of_adamw.items() if decay} == {"wte.weight", "wpe.weight"}
    assert muon.param_groups[0]["weight_decay"] == 0.2
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["eps"]) == ((0.8, 0.95), 1e-6)
    assert set(state_shapes(model, [muon, adamw])) == {
        *(f"momentum_buffer.{name}" for name in of_muon),
        *(f"{key}.{name}" for name in of_adamw for key in ("exp_avg", "exp_avg_sq")),
    }


def test_decay_is_on_matrices_only() -> None:
    groups = make_optimizer(GPT(SHAPE), lr=1.0, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]
    assert sum(len(group["params"]) for group in groups) == 2 + 2 * 12 + 2


def test_muons_updates_are_of_the_size_of_adamws() -> None:
    """0.23 of it; 0.14 with Muon's own scale, which shrinks as a model grows."""

    def moved(optimizer: str) -> float:
        start, end = (trained(optimizer, steps)[0].h[1].mlp.c_fc.weight for steps in (0, 4))
        return (end - start).square().mean().sqrt().item()

    assert 0.2 < moved("muon") / moved("adamw") < 5


def test_schedules() -> None:
    common = {"lr": 1.0, "min_lr": 0.0, "warmup": 10, "steps": 110}
    assert [lr_at(step, **common, schedule="linear") for step in (0, 9, 10, 60, 109, 110)] == pytest.approx(
        [0.1, 1.0, 1.0, 0.5, 0.01, 0.0]
    )
    wsd = {**common, "min_lr": 0.1, "schedule": "wsd"}
    assert [lr_at(step, **wsd) for step in (0, 10, 87, 88, 99, 110)] == pytest.approx([0.1, 1, 1, 1, 0.55, 0.1])
    assert [lr_at(step, **wsd, decay_steps=50) for step in (59, 60, 85)] == pytest.approx([1, 1, 0.55])
    # A decay longer than what the warmup leaves begins after the warmup.
    assert lr_at(10, **wsd, decay_steps=500) == 1.0
    for schedule in ("cosine", "linear", "wsd"):
        rates = [lr_at(step, **common, schedule=schedule) for step in range(10, 111)]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == 0.0
