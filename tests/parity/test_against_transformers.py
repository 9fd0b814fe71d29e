"""Invariant 4, same function: logits, loss and gradients are those of transformers' GPT-2, in fp32."""

import pytest
import torch
import transformers

from gpt2_model import GPT, PRESETS, generate, get_tokenizer

VARIANTS = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "n_inner": {"n_inner": 96},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "untied": {"tie_word_embeddings": False},
    "odd_vocabulary": {"vocab_size": 317},
}


def make_pair(tmp_path, noise=0.05, **fields) -> tuple[transformers.GPT2LMHeadModel, GPT]:
    torch.manual_seed(1)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 512}
    config = transformers.GPT2Config(**{**sizes, **fields}, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"  # the only one that honours reorder_and_upcast_attn
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(noise * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return theirs, GPT.from_pretrained(tmp_path)


def assert_equal_to_1e5(theirs: transformers.GPT2LMHeadModel, ours: GPT, tokens, return_logits=True) -> None:
    """Logits, loss and every gradient."""
    logits, loss = ours(tokens[:, :-1], tokens[:, 1:], return_logits=return_logits)
    expected = theirs(tokens, labels=tokens)
    loss.backward()
    expected.loss.backward()

    assert (logits is not None) == return_logits
    if return_logits:
        torch.testing.assert_close(logits, expected.logits[:, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.transformer.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = theirs.lm_head.weight.grad if name == "lm_head.weight" else gradients[name]
        is_projection = reference.ndim == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, reference.t() if is_projection else reference, rtol=0, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("return_logits", [True, False], ids=["with_logits", "loss_alone"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_gradients(tmp_path, fields, return_logits) -> None:
    theirs, ours = make_pair(tmp_path, **fields)
    assert_equal_to_1e5(theirs, ours, torch.randint(0, theirs.config.vocab_size, (3, 40)), return_logits)


def test_each_field_changes_the_function(tmp_path) -> None:
    """Else the test above would pass on a model that ignores the field."""
    tokens = torch.randint(0, 317, (2, 20))
    plain = make_pair(tmp_path / "plain")[1](tokens)[0]
    for name, fields in VARIANTS.items():
        if name not in ("plain", "upcast", "n_inner", "odd_vocabulary", "untied"):
            assert (make_pair(tmp_path / name, **fields)[1](tokens)[0] - plain).abs().max() > 1e-4, name


DEPTHS = [(12, 12), (48, 25), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((24, 16), (36, 20)))]


@pytest.mark.parametrize(("n_layer", "n_head"), DEPTHS)
def test_full_depth_of_the_presets(tmp_path, n_layer, n_head) -> None:
    """All layers and heads of each, at 8 values a head instead of 64."""
    theirs, ours = make_pair(tmp_path, noise=0.02, n_layer=n_layer, n_head=n_head, n_embd=8 * n_head)
    assert_equal_to_1e5(theirs, ours, torch.randint(0, 512, (2, 33)))


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_of_the_presets(name) -> None:
    """Every tensor's shape, name by name, without the memory."""
    ours = PRESETS[name]
    config = transformers.GPT2Config(n_layer=ours.n_layer, n_head=ours.n_head, n_embd=ours.n_embd)
    with torch.device("meta"):
        expected = {key: value.shape for key, value in transformers.GPT2LMHeadModel(config).named_parameters()}
        found = GPT(ours).state_dict()
    assert len(found) == len(expected)
    for key, value in found.items():
        is_projection = value.ndim == 2 and key.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
        assert (value.t() if is_projection else value).shape == expected[f"transformer.{key}"], key


@pytest.mark.parametrize("compile", [True, False], ids=["engine", "torch"])
def test_greedy_text_is_transformers(tiny_hf_folder, compile) -> None:
    """64 tokens, prompts of 1 to 40 tokens in one batch, against each prompt alone in transformers."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tiny_hf_folder)
    ours = GPT.from_pretrained(tiny_hf_folder)
    prompts = ["The", "A longer prompt, of several words", "Hello, I'm a language model,", "one two three " * 10]
    rows = generate(ours, prompts, max_new_tokens=64, temperature=0, stop_ids=(), compile=compile)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([get_tokenizer().encode_ordinary(prompt)])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False,
            pad_token_id=50256, eos_token_id=None,
        )[0, ids.shape[1] :]  # fmt: skip
        assert row.tokens == expected.tolist()
