"""Checkpoints as they are met on the hub: config.json in the words of each family, names, buffers, types, formats;
nanoGPT's ckpt.pt; and llm.c's .bin.

The configs are those of the published models; the weights are random, small, and made by transformers, which also
says what their logits are.
"""

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_files import SMALL
from click.testing import CliRunner

from gpt2_model import GPT
from gpt2_model.checkpoints.huggingface import read_config
from gpt2_model.cli import main

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 317}
SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
GENERATION = {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
# As in openai-community/gpt2: what all later ones were derived from.
BASE = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, **SUMMARY, **GENERATION, "vocab_size": 50257,
}  # fmt: skip
MISTRAL = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": True}
CONFIGS = {
    "gpt2": BASE,
    "gpt2-medium": BASE | {"n_special": 0, "predict_special_tokens": True, "n_layer": 24, "n_head": 16},
    "gpt2-xl": BASE | {"output_past": True, "n_layer": 48, "n_head": 25, "n_embd": 1600},
    "distilgpt2": BASE | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "DialoGPT": BASE | {"task_specific_params": {"conversational": {"max_length": 1000}}},
    "Cerebras-GPT": {k: v for k, v in BASE.items() if k not in ("n_ctx", *SUMMARY, *GENERATION)}
    | {"activation_function": "gelu", "attn_pdrop": 0.0, "n_inner": 3072, "n_positions": 2048, "n_layer": 10,
       "use_cache": True, "scale_attn_weights": True, "torch_dtype": "float32", "transformers_version": "4.27.0"},
    "codeparrot": BASE | {"_name_or_path": "codeparrot", "gradient_checkpointing": False, "n_inner": None,
                          "reorder_and_upcast_attn": True, "scale_attn_by_layer_idx": True, "vocab_size": 32768,
                          "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "use_cache": True,
                          "torch_dtype": "float32", "transformers_version": "4.14.0.dev0"},
    "stanford-crfm": BASE | MISTRAL | {"gradient_checkpointing": False, "n_inner": None, "use_cache": False},
    "course": BASE | {"n_ctx": 128, "vocab_size": 50000, "dtype": "float32", "transformers_version": "5.0.0"},
}  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_published_configs(tmp_path, fields) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path / "config.json")
    reference = transformers.GPT2Config.from_pretrained(tmp_path)
    assert config.block_size == reference.n_positions
    for field in dataclasses.fields(config):
        if field.name != "block_size":
            assert getattr(config, field.name) == getattr(reference, field.name)


UNKNOWN = {
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    "positions": ({"position_embedding_type": "rotary"}, "position_embedding_type = 'rotary' is not supported"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads = "),
    "code": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map = "),
    "cross": ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    "architecture": ({"architectures": ["GPT2ForSequenceClassification"]}, "architectures = .*GPT2ForSequence"),
    "model": ({"model_type": "gpt_neo"}, "model_type = 'gpt_neo'"),
}


@pytest.mark.parametrize(("fields", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_another_function_is_refused_by_name(tmp_path, fields, message) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | fields))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.json")


def test_neutral_values_and_what_transformers_writes_today_are_fine(tmp_path) -> None:
    transformers.GPT2Config(num_labels=5, max_length=20, temperature=0.7).save_pretrained(tmp_path)
    read_config(tmp_path / "config.json")
    neutral = {"add_cross_attention": False, "pruned_heads": {}, "cross_attention_hidden_size": None,
               "auto_map": {}, "position_embedding_type": "absolute", "quantization_config": None,
               "is_decoder": True,
               "chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "hidden_size": 768}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(BASE | neutral))
    read_config(tmp_path / "config.json")


def reference(fields: dict) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(1)
    config = transformers.GPT2Config(**fields)
    config._attn_implementation = "eager"  # the only one that honours reorder_and_upcast_attn
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_same_logits(theirs, ours, ids: int) -> None:
    tokens = torch.randint(0, ids, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits[..., :ids], rtol=0, atol=1e-5)


def masks(prefix: str, dtype: torch.dtype, positions: int) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}h.{layer}.attn.bias": torch.tril(torch.ones(1, 1, positions, positions)).to(dtype)
        for layer in range(SIZES["n_layer"])
    }


def bare(weights):
    return {name.removeprefix("transformer."): t for name, t in weights.items() if name != "lm_head.weight"}


def copies(weights, prefix=""):
    """The head apart from the embedding, as safetensors wants it."""
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def masked_biases(weights):
    return {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}


WILD = {  # family: (fields, file, what becomes of the weights)
    "gpt2": ({}, "model.safetensors", lambda w: bare(w) | masks("", torch.float32, 32)),
    "distilgpt2": (
        {}, "model.safetensors",
        lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"} | masks("transformer.", torch.uint8, 32)
        | masked_biases(w),
    ),
    "DialoGPT": (
        {}, "legacy.bin",
        lambda w: {n: t.half() for n, t in w.items()} | masks("transformer.", torch.uint8, 32) | masked_biases(w),
    ),
    "Cerebras-GPT": ({"activation_function": "gelu", "n_inner": 256}, "pytorch_model.bin", lambda w: w),
    "codeparrot": (
        {"reorder_and_upcast_attn": True, "vocab_size": 512}, "pytorch_model.bin",
        lambda w: dict(w) | masks("transformer.", torch.bool, 32) | masked_biases(w),
    ),
    "stanford-crfm": (MISTRAL, "pytorch_model.bin", lambda w: dict(w) | masks("transformer.", torch.uint8, 32)),
    "bf16": ({}, "model.safetensors", lambda w: bare({n: t.bfloat16() for n, t in w.items()})),
    "ddp_of_compiled": ({}, "model.safetensors", lambda w: copies(w, "module._orig_mod.")),
    "two_heads": (
        {"architectures": ["GPT2DoubleHeadsModel"]}, "model.safetensors",
        lambda w: copies(w) | {"multiple_choice_head.summary.weight": torch.zeros(1, 64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "file", "change"), WILD.values(), ids=WILD.keys())
def test_logits_of_each_family(tmp_path, fields, file, change) -> None:
    config = BASE | SIZES | {"n_positions": 32, "n_ctx": 32} | fields
    theirs = reference(config)
    weights = change(theirs.state_dict())
    if file.endswith(".bin"):
        torch.save(
            weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not file.startswith("legacy")
        )
    else:
        safetensors.torch.save_file(weights, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {name: t for name, t in weights.items() if t.is_floating_point() and t.dtype != torch.float32}
    if stored:  # what was rounded in the file is rounded in the reference
        theirs.load_state_dict({n: t.to(next(iter(stored.values())).dtype).float()
                                for n, t in theirs.state_dict().items()})  # fmt: skip
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path), config["vocab_size"])


def test_a_vocabulary_of_50304_is_kept(tmp_path) -> None:
    """Its config says so: a Hugging Face folder is the function that it says it is."""
    theirs = reference(BASE | SIZES | {"n_positions": 32, "vocab_size": 50304})
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.vocab_size == 50304
    assert_same_logits(theirs, ours, 50304)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_by_transformers(tmp_path, dtype) -> None:
    theirs = reference(BASE | SIZES | {"n_positions": 32}).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(ours.wte.weight, theirs.transformer.wte.weight)
    assert torch.equal(ours.h[2].mlp.c_proj.weight, theirs.transformer.h[2].mlp.c_proj.weight.t())


def nano(bias=True, activation="gelu", vocab_size=100):
    """A random model, and its weights as nanoGPT has them: (out, in), with the mask of old torch versions."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": vocab_size}
    model = reference(sizes | {"activation_function": activation})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not bias:
                parameter.zero_()
    projections = ("attn.weight", "proj.weight", "fc.weight")
    weights = {n: t.t().contiguous() if n.endswith(projections) else t for n, t in model.state_dict().items()}
    weights |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    return model, {name: t for name, t in weights.items() if bias or t.ndim == 4 or not name.endswith("bias")}


def save_nano(path, model, weights, **arguments) -> None:
    torch.save(
        {
            "model": weights,
            "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
            "model_args": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "dropout": 0.0, **arguments},
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4},
        },
        path,
    )


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [{"bias": True}, {"bias": False}, {}], ids=["bias", "no_bias", "before_it_chose"])
def test_nanogpt(tmp_path, bias, prefix) -> None:
    activation = "gelu" if bias else "gelu_new"
    theirs, weights = nano(bias.get("bias", True), activation)
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    save_nano(tmp_path / "ckpt.pt", theirs, prefixed, **bias, vocab_size=100)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.activation_function == activation
    assert_same_logits(theirs, ours, 100)
    assert torch.equal(ours.h[1].mlp.c_fc.weight, weights["transformer.h.1.mlp.c_fc.weight"])


def test_nanogpt_drops_the_rows_that_pad_gpt2s_vocabulary(tmp_path) -> None:
    theirs, weights = nano(bias=False, vocab_size=50304)
    save_nano(tmp_path / "ckpt.pt", theirs, weights, bias=False, vocab_size=50304)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.vocab_size == 50257
    assert_same_logits(theirs, ours, ids=50257)


def test_nanogpt_with_arguments_of_a_fork_is_refused(tmp_path) -> None:
    save_nano(tmp_path / "ckpt.pt", *nano(), bias=True, vocab_size=100, rotary=True)
    with pytest.raises(ValueError, match="is not a nanoGPT checkpoint of a known layout: see .'rotary'"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


def converted(path, out) -> transformers.GPT2LMHeadModel:
    """By `gpt2-model convert`, then loaded by transformers alone."""
    result = CliRunner().invoke(main, ["convert", str(path), str(out)])
    assert result.exit_code == 0, result.output
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_nanogpt_to_hugging_face(tmp_path) -> None:
    source, weights = nano()
    save_nano(tmp_path / "ckpt.pt", source, weights, bias=True, vocab_size=100)
    theirs = converted(tmp_path / "ckpt.pt", tmp_path / "out").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in source.state_dict().items())


LLMC_ORDER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def llmc_bytes(model: GPT, version: int = 3, padded: int = 128, **header) -> bytes:
    """As write_model of llm.c's train_gpt2.py: header, then each kind of parameter for all layers."""
    config, weights = model.config, model.state_dict()
    sizes = [config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, padded]
    fields = [20240326, version, *sizes] + [0] * 248
    for position, value in header.items():
        fields[int(position.removeprefix("at"))] = value
    wte = torch.zeros(padded, config.n_embd)
    wte[: config.vocab_size] = weights["wte.weight"]
    tensors = [wte, weights["wpe.weight"]]
    names = [f"{part}.{kind}" for part in LLMC_ORDER for kind in ("weight", "bias")]
    tensors += [weights[f"h.{layer}.{name}"] for name in names for layer in range(config.n_layer)]
    tensors += [weights["ln_f.weight"], weights["ln_f.bias"]]
    dtype = torch.bfloat16 if version == 5 else torch.float32
    data = b"".join(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    return struct.pack("<256i", *fields) + data


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc(tmp_path, model, version, dtype) -> None:
    (tmp_path / "gpt2.bin").write_bytes(llmc_bytes(model, version))
    again = GPT.from_pretrained(tmp_path / "gpt2.bin")
    assert again.config == SMALL
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before.to(dtype).float(), after), name
    theirs = converted(tmp_path / "gpt2.bin", tmp_path / "out")
    assert_same_logits(theirs, again, 100)
    assert torch.equal(theirs.transformer.h[1].mlp.c_proj.weight, again.h[1].mlp.c_proj.weight.t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: llmc_bytes(m, at1=1), "has version 1: write it again with a current llm.c"),
        (lambda m: llmc_bytes(m)[:-1], "its header asks for"),
        (lambda m: llmc_bytes(m) + b"\0", "its header asks for"),
        (lambda m: llmc_bytes(m)[:500], "ends within its header"),
        (lambda m: llmc_bytes(m, at4=2**31 - 1), "its header asks for"),
        (lambda m: llmc_bytes(m, at4=-1), "n_layer must be a positive whole number"),
        (lambda m: llmc_bytes(m, at5=3), "must be a multiple of n_head 3"),
        (lambda m: llmc_bytes(m, at3=200), "its header asks for"),
        (lambda m: llmc_bytes(m, at7=-(2**31)), "its header asks for"),
    ],
)
def test_hostile_llmc_files_are_refused(tmp_path, model, change, message) -> None:
    (tmp_path / "gpt2.bin").write_bytes(change(model))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "gpt2.bin")
