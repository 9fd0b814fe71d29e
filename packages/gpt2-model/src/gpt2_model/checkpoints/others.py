"""The checkpoints of nanoGPT, build-nanogpt and llm.c. All keep projections as nn.Linear does, (out, in)."""

import math
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpt2_model.checkpoints.files import checked_config, short, state_dict, tensor_shapes, utf8_name
from gpt2_model.config import EOT, PADDED, GPTConfig

LLMC_MAGIC = struct.pack("<i", 20240326)
_LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version; both pad the vocabulary
_LLMC_HEADER = 1024  # bytes: 256 int32
_LLMC_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_NO_BIAS = ("wte.weight", "wpe.weight", "lm_head.weight")


def read_nanogpt(content: dict[Any, Any], path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the config and the tensors of a ckpt.pt of nanoGPT's train.py, or of build-nanogpt's train_gpt2.py.

    nanoGPT has its sizes in `model_args`; build-nanogpt in `config`, an object that was read as plain data.
    A vocabulary of 50,304 comes back as GPT-2's 50,257. The other 47 rows are padding: they are in nanoGPT's
    softmax, but stand for no token, and training drove their probability to almost zero.
    """
    arguments = content.get("model_args", content.get("config"))
    if isinstance(arguments, SimpleNamespace):
        arguments = vars(arguments)
    model = content.get("model")
    if not isinstance(arguments, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} is not a nanoGPT checkpoint of a known layout: it lacks model or model_args")
    names = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
    if odd := sorted(names - arguments.keys() or arguments.keys() - names - {"bias", "dropout"}, key=str):
        raise ValueError(f"{path} is not a nanoGPT checkpoint of a known layout: see {short(odd)}")
    # Since mid-2023 model_args has `bias` and nanoGPT uses the exact GELU; before, it used the tanh approximation,
    # as build-nanogpt does, whose config has no `bias`.
    activation = "gelu" if "bias" in arguments else "gelu_new"
    config = checked_config(path, **{name: arguments[name] for name in names}, activation_function=activation)
    tensors = state_dict(model, path)
    if arguments.get("bias") is False:  # no bias is the same as a bias of zero
        for name, tensor in list(tensors.items()):
            if name.endswith(".weight") and not name.endswith(_NO_BIAS):
                zeros = torch.zeros(1).expand(tensor.shape[0] if tensor.ndim else 0)
                tensors.setdefault(name.removesuffix("weight") + "bias", zeros)
    if config.vocab_size == PADDED:
        config = replace(config, vocab_size=EOT + 1)
        for name in tensors:
            if name.endswith(("wte.weight", "lm_head.weight")) and tensors[name].ndim:
                tensors[name] = tensors[name][: EOT + 1]
    return config, tensors


def read_llmc(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return config and mapped tensors of a .bin of github.com/karpathy/llm.c (train_gpt2.py, write_model).

    The file holds 256 int32, then the parameters, each kind for all layers together. Padding rows are left out.
    """
    with path.open("rb") as file:
        header = file.read(_LLMC_HEADER)
    if len(header) < _LLMC_HEADER:
        raise ValueError(f"{path} ends within its header")
    _, version, time, vocab, depth, heads, width, padded = struct.unpack("<8i", header[:32])
    if version not in _LLMC_DTYPES:
        raise ValueError(f"{path} has version {version}: write it again with a current llm.c (3: fp32, 5: bf16)")
    config = checked_config(path, block_size=time, vocab_size=vocab, n_layer=depth, n_head=heads, n_embd=width)
    dtype = _LLMC_DTYPES[version]
    parameters = config.num_parameters + (padded - vocab) * width
    size, actual = _LLMC_HEADER + dtype.itemsize * parameters, path.stat().st_size
    if padded < vocab or size != actual:
        raise ValueError(f"{path} has {actual:,} bytes, but its header asks for {size:,}")
    shapes = tensor_shapes(config, in_out=False) | {"wte.weight": (padded, width)}
    kinds = [f"{part}.{kind}" for part in _LLMC_PARTS for kind in ("weight", "bias")]
    layered = [f"h.{layer}.{kind}" for kind in kinds for layer in range(depth)]
    names = ["wte.weight", "wpe.weight", *layered, "ln_f.weight", "ln_f.bias"]
    with utf8_name(path) as name:
        values = torch.from_file(name, shared=False, size=size // dtype.itemsize, dtype=dtype)
    pieces = torch.split(values[_LLMC_HEADER // dtype.itemsize :], [math.prod(shapes[name]) for name in names])
    tensors = {name: piece.view(shapes[name]) for name, piece in zip(names, pieces, strict=True)}
    return config, tensors | {"wte.weight": tensors["wte.weight"][:vocab]}
