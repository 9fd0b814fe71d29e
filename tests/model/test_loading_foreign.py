"""nanoGPT's ckpt.pt and llm.c's .bin."""

import math
import struct

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

from gpt2_model import GPT, GPTConfig
from gpt2_model.cli import main

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)


class NanoLayerNorm(nn.Module):
    """As in nanoGPT's model.py, where the bias is optional."""

    def __init__(self, width, bias) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width) / 4)
        self.bias = nn.Parameter(torch.randn(width) / 4) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoBlock(nn.Module):
    def __init__(self, width, heads, bias, activation) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = NanoLayerNorm(width, bias), NanoLayerNorm(width, bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.attn.c_proj = nn.Linear(width, width, bias=bias)
        self.mlp.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.attn.register_buffer("bias", torch.tril(torch.ones(1, 1, 16, 16)))  # without flash attention
        self.heads, self.activation = heads, activation

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.attn.c_attn(self.ln_1(x)).split(width, dim=2)
        query, key, value = (p.view(batch, time, self.heads, -1).transpose(1, 2) for p in parts)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(self.attn.bias[:, :, :time, :time] == 0, float("-inf"))
        y = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, time, width)
        x = x + self.attn.c_proj(y)
        return x + self.mlp.c_proj(self.activation(self.mlp.c_fc(self.ln_2(x))))


class Nano(nn.Module):
    """nanoGPT's model, with its names."""

    def __init__(self, config: GPTConfig, bias: bool, vocab_size: int, activation) -> None:
        super().__init__()
        width = config.n_embd
        blocks = [NanoBlock(width, config.n_head, bias, activation) for _ in range(config.n_layer)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "wpe": nn.Embedding(config.block_size, width),
                "h": nn.ModuleList(blocks),
                "ln_f": NanoLayerNorm(width, bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def save_nano(path, model: Nano, compiled: bool = False, **arguments) -> None:
    weights = {("_orig_mod." if compiled else "") + name: t for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "dropout": 0.0, **arguments},
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4},
        },
        path,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_nanogpt(tmp_path, bias, compiled) -> None:
    torch.manual_seed(0)
    theirs = Nano(SMALL, bias, 100, nn.GELU())
    save_nano(tmp_path / "ckpt.pt", theirs, compiled, bias=bias, vocab_size=100)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.activation_function == "gelu"
    tokens = torch.randint(0, 100, (2, 16))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens), rtol=0, atol=1e-5)
    assert torch.equal(ours.h[1].mlp.c_fc.weight, theirs.transformer.h[1].mlp.c_fc.weight)


def test_nanogpt_before_it_knew_of_biases(tmp_path) -> None:
    theirs = Nano(SMALL, True, 100, nn.GELU(approximate="tanh"))
    save_nano(tmp_path / "ckpt.pt", theirs, vocab_size=100)
    tokens = torch.randint(0, 100, (2, 16))
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.activation_function == "gelu_new"
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens), rtol=0, atol=1e-5)


def test_nanogpt_drops_the_rows_that_pad_gpt2s_vocabulary(tmp_path) -> None:
    theirs = Nano(SMALL, False, 50304, nn.GELU())
    save_nano(tmp_path / "ckpt.pt", theirs, bias=False, vocab_size=50304)
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config.vocab_size == 50257
    tokens = torch.randint(0, 50257, (1, 16))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[..., :50257], rtol=0, atol=1e-5)


def test_nanogpt_with_arguments_of_a_fork_is_refused(tmp_path) -> None:
    save_nano(tmp_path / "ckpt.pt", Nano(SMALL, True, 100, nn.GELU()), bias=True, vocab_size=100, rotary=True)
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
    source = Nano(SMALL, True, 100, nn.GELU())
    save_nano(tmp_path / "ckpt.pt", source, bias=True, vocab_size=100)
    theirs = converted(tmp_path / "ckpt.pt", tmp_path / "out")
    weights = theirs.state_dict()
    for name, tensor in source.state_dict().items():
        if not name.endswith("attn.bias"):
            stored = (
                weights[name].t() if name.endswith(("attn.weight", "proj.weight", "fc.weight")) else weights[name]
            )
            assert torch.equal(stored, tensor), name
    tokens = torch.randint(0, 100, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, source(tokens), rtol=0, atol=1e-5)


LLMC_ORDER = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)  # fmt: skip


def llmc_bytes(model: GPT, version: int = 3, padded: int = 128, **header) -> bytes:
    """As write_model of llm.c's train_gpt2.py: header, then each kind of parameter for all layers."""
    config, weights = model.config, model.state_dict()
    fields = [
        20240326,
        version,
        config.block_size,
        config.vocab_size,
        config.n_layer,
        config.n_head,
        config.n_embd,
    ]
    fields = [*fields, padded] + [0] * 248
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
    tokens = torch.randint(0, 100, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, again(tokens)[0], rtol=0, atol=1e-5)
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
