"""The model itself and its config: sizes, initial weights, what it refuses."""

import math

import pytest
import torch

from gpt2_model import GPT, PRESETS, GPTConfig, flops_per_token

SMALL = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=32, vocab_size=1000)


def test_initial_weights_are_openai_s() -> None:
    torch.manual_seed(0)
    weights = dict(GPT(SMALL).named_parameters())
    assert weights["wte.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["wpe.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert weights["h.0.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["h.3.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert weights["h.3.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert not weights["h.0.attn.c_attn.bias"].any()
    assert (weights["h.0.ln_1.weight"] == 1).all()
    assert (weights["ln_f.weight"] == 1).all()


def test_initial_weights_follow_the_seed() -> None:
    def wte(seed):
        torch.manual_seed(seed)
        return GPT(SMALL).wte.weight

    assert torch.equal(wte(1), wte(1))
    assert not torch.equal(wte(1), wte(2))


def test_counted_parameters_are_the_real_ones() -> None:
    for config in (SMALL, GPTConfig(n_layer=1, n_inner=100, tie_word_embeddings=False)):
        assert sum(p.numel() for p in GPT(config).parameters()) == config.num_parameters


def test_a_position_does_not_see_what_follows() -> None:
    model, tokens = GPT(SMALL), torch.randint(0, 1000, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 1000
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12], after[:, 12])


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens do not fit the model's context of 32"):
        GPT(SMALL)(torch.zeros(1, 33, dtype=torch.long))


def test_custom_configuration_of_the_seed_project_trains() -> None:
    """2,048 positions, a padded vocabulary: the width alone is scaled down."""
    model = GPT(GPTConfig(block_size=2048, vocab_size=50304, n_layer=2, n_head=4, n_embd=64))
    tokens = torch.randint(0, 50304, (1, 2048))
    logits, loss = model(tokens, torch.randint(0, 50304, (1, 2048)))
    loss.backward()
    assert logits.shape == (1, 2048, 50304)
    assert loss.item() == pytest.approx(math.log(50304), abs=0.2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_presets_have_openai_s_sizes() -> None:
    sizes = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
    assert {name: config.num_parameters for name, config in PRESETS.items()} == sizes
    assert {(config.block_size, config.vocab_size) for config in PRESETS.values()} == {(1024, 50257)}


def test_flops_are_llm_c_s_count() -> None:
    assert flops_per_token(PRESETS["124M"], 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a positive whole number, not 0"),
        ({"n_embd": -768}, "n_embd must be a positive"),
        ({"vocab_size": 1.5}, "vocab_size must be a positive whole number, not 1.5"),
        ({"n_layer": True}, "n_layer must be"),
        ({"n_head": 7}, "n_embd 768 must be a multiple of n_head 7"),
        ({"activation_function": "swish"}, "activation_function must be one of gelu_new, gelu, .*, not 'swish'"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a number above 0"),
    ],
)
def test_nonsense_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_fields_from_text() -> None:
    config = GPTConfig().with_fields(
        {"n_layer": "4", "n_inner": "none", "layer_norm_epsilon": "1e-6", "tie_word_embeddings": "false"},
    )
    assert config == GPTConfig(n_layer=4, layer_norm_epsilon=1e-6, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="unknown model field 'layers': choose from block_size"):
        GPTConfig().with_fields({"layers": "4"})
    with pytest.raises(ValueError, match=r"n_layer must be a positive whole number, not 'four'"):
        GPTConfig().with_fields({"n_layer": "four"})
