"""nanoGPT's ckpt.pt and llm.c's .bin."""

import struct

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from gpt2_model import GPT, GPTConfig
from gpt2_model.cli import main

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)


def nano(
    bias=True, activation="gelu", vocab_size=100
) -> tuple[transformers.GPT2LMHeadModel, dict[str, torch.Tensor]]:
    """A random model, and its weights as nanoGPT has them: (out, in), with the mask of old torch versions."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": vocab_size}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, activation_function=activation)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(torch.randn_like(parameter) / 8)
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
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4},
        },
        path,
    )


def assert_same_logits(theirs, ours, ids=100) -> None:
    tokens = torch.randint(0, ids, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits[..., :ids], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_nanogpt(tmp_path, bias, prefix) -> None:
    theirs, weights = nano(bias)
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    save_nano(tmp_path / "ckpt.pt", theirs, prefixed, bias=bias, vocab_size=100)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.activation_function == "gelu"
    assert_same_logits(theirs, ours)
    assert torch.equal(ours.h[1].mlp.c_fc.weight, weights["transformer.h.1.mlp.c_fc.weight"])


def test_nanogpt_before_it_knew_of_biases(tmp_path) -> None:
    theirs, weights = nano(activation="gelu_new")
    save_nano(tmp_path / "ckpt.pt", theirs, weights, vocab_size=100)
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path / "ckpt.pt"))


def test_nanogpt_drops_the_rows_that_pad_gpt2s_vocabulary(tmp_path) -> None:
    theirs, weights = nano(bias=False, vocab_size=50304)
    save_nano(tmp_path / "ckpt.pt", theirs, weights, bias=False, vocab_size=50304)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.vocab_size == 50257
    assert_same_logits(theirs, ours, ids=50257)


def test_nanogpt_with_arguments_of_a_fork_is_refused(tmp_path) -> None:
    save_nano(tmp_path / "ckpt.pt", *nano(), bias=True, vocab_size=100, rotary=True)
    with pytest.raises(ValueError, match="is no checkpoint of nanoGPT as known here: see .'rotary'"):
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


LLMC_ORDER = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)  # fmt: skip


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
    tensors += [weights[f"h.{layer}.{name}"] for name in LLMC_ORDER for layer in range(config.n_layer)]
    tensors += [weights["ln_f.weight"], weights["ln_f.bias"]]
    if version == 5:
        data = b"".join(t.bfloat16().contiguous().view(torch.int16).numpy().tobytes() for t in tensors)
    else:
        data = b"".join(t.float().contiguous().numpy().astype(np.float32).tobytes() for t in tensors)
    return struct.pack("<256i", *fields) + data


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc(tmp_path, model, version, dtype) -> None:
    (tmp_path / "gpt2.bin").write_bytes(llmc_bytes(model, version))
    again = GPT.from_pretrained(tmp_path / "gpt2.bin")
    assert again.config == SMALL
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before.to(dtype).float(), after), name
    theirs = converted(tmp_path / "gpt2.bin", tmp_path / "out")
    assert_same_logits(theirs, again)
    assert torch.equal(theirs.transformer.h[1].mlp.c_proj.weight, again.h[1].mlp.c_proj.weight.t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: llmc_bytes(m, at1=1), "is of version 1: write it again with a present llm.c"),
        (lambda m: llmc_bytes(m)[:-1], "by its header"),
        (lambda m: llmc_bytes(m) + b"\0", "by its header"),
        (lambda m: llmc_bytes(m)[:500], "ends within its header"),
        (lambda m: llmc_bytes(m, at4=2**31 - 1), "by its header"),
        (lambda m: llmc_bytes(m, at4=-1), "n_layer must be a positive whole number"),
        (lambda m: llmc_bytes(m, at5=3), "must be a multiple of n_head 3"),
        (lambda m: llmc_bytes(m, at3=200), "by its header"),
        (lambda m: llmc_bytes(m, at7=-(2**31)), "by its header"),
    ],
)
def test_hostile_llmc_files_are_refused(tmp_path, model, change, message) -> None:
    (tmp_path / "gpt2.bin").write_bytes(change(model))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "gpt2.bin")
