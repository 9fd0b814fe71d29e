"""Invariant 4, same function: logits, loss and gradients are those of transformers' GPT-2, in fp32."""

import math

import pytest
import torch
import transformers

from gpt2_model import GPT

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


def make_pair(tmp_path, **fields) -> tuple[transformers.GPT2LMHeadModel, GPT]:
    torch.manual_seed(1)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 512}
    config = transformers.GPT2Config(**{**sizes, **fields}, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"  # the only one that honours reorder_and_upcast_attn
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return theirs, GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("return_logits", [True, False], ids=["with_logits", "loss_alone"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_loss_and_gradients(tmp_path, fields, return_logits) -> None:
    theirs, ours = make_pair(tmp_path, **fields)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 40))
    logits, loss = ours(tokens[:, :-1], tokens[:, 1:], return_logits=return_logits)
    expected = theirs(tokens, labels=tokens)
    loss.backward()
    expected.loss.backward()

    if return_logits:
        torch.testing.assert_close(logits, expected.logits[:, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.transformer.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = theirs.lm_head.weight.grad if name == "lm_head.weight" else gradients[name]
        is_projection = reference.ndim == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
        torch.testing.assert_close(
            parameter.grad, reference.t() if is_projection else reference, rtol=0, atol=1e-5, msg=name
        )


def test_each_field_changes_the_function(tmp_path) -> None:
    """Else the test above would pass on a model that ignores the field."""
    tokens = torch.randint(0, 317, (2, 20))
    plain = make_pair(tmp_path / "plain")[1](tokens)[0]
    for name, fields in VARIANTS.items():
        if name not in ("plain", "upcast", "n_inner", "odd_vocabulary", "untied"):
            assert (make_pair(tmp_path / name, **fields)[1](tokens)[0] - plain).abs().max() > 1e-4, name


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(24, 16, 64), (36, 20, 80), (48, 25, 100)])
def test_full_depth_of_the_larger_presets(tmp_path, n_layer, n_head, n_embd) -> None:
    theirs, ours = make_pair(tmp_path, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    tokens = torch.randint(0, 512, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=0, atol=1e-4)


def test_124m_whole(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    tokens = torch.randint(0, 50257, (1, 128))
    with torch.no_grad():
        logits, loss = ours(tokens[:, :-1], tokens[:, 1:])
        expected = theirs(tokens, labels=tokens)
    torch.testing.assert_close(logits, expected.logits[:, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    assert abs(loss.item() - math.log(50257)) < 0.3


def test_transformers_loads_what_we_save(tmp_path, tiny_hf_folder) -> None:
    GPT.from_pretrained(tiny_hf_folder).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, before), after in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert again.config.architectures == ["GPT2LMHeadModel"]
    assert again.config.n_ctx == 128  # llama.cpp's converter reads this one


def test_transformers_reads_our_tokenizer_files(tmp_path, tiny_hf_folder) -> None:
    from gpt2_model import get_tokenizer

    GPT.from_pretrained(tiny_hf_folder).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, world!  Naïve café\n\n 12345 it's 日本語 🙂\t<tab>"
    assert theirs.encode(text) == get_tokenizer().encode_ordinary(text)
    assert theirs.encode("<|endoftext|>") == [50256]
    assert theirs.decode(theirs.encode(text)) == text


def test_greedy_text_is_transformers(tiny_hf_folder) -> None:
    from gpt2_model import generate, get_tokenizer

    theirs = transformers.GPT2LMHeadModel.from_pretrained(tiny_hf_folder)
    ours = GPT.from_pretrained(tiny_hf_folder)
    prompts = ["The", "A longer prompt, of several words", "Hello, I'm a language model,"]
    rows = generate(ours, prompts, max_new_tokens=32, temperature=0)  # ragged, in one batch
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([get_tokenizer().encode_ordinary(prompt)])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=50256
        )[0, ids.shape[1] :]
        assert row.tokens == [token for token in expected.tolist() if token != 50256]
