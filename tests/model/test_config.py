import pytest

from gpt2_model import PRESETS, GPTConfig, flops_per_token


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_presets_have_openai_s_sizes(name, parameters) -> None:
    assert PRESETS[name].num_parameters == parameters
    assert PRESETS[name].block_size == 1024
    assert PRESETS[name].vocab_size == 50257


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
