"""GPT-2s from disk or the hub, and to disk.

Loaded are Hugging Face folders and hub names (safetensors or torch's .bin, whole or in shards), one such file
beside its config.json, nanoGPT's ckpt.pt, llm.c's .bin, and OpenAI's TensorFlow folder. Saved are Hugging Face's.

A checkpoint differs from our module in two ways. Most keep the four projections a block as OpenAI did, (in, out),
"Conv1D"; nn.Linear keeps (out, in): they are transposed. And names may carry a prefix ("transformer.") or name
buffers that hold no weights (the causal mask). Everything else is equal, name by name.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gpt2_model.command import newest_checkpoint
from gpt2_model.config import OPENAI_NAMES, PRESETS, GPTConfig
from gpt2_model.foreign import LLMC_MAGIC, read_llmc, read_nanogpt
from gpt2_model.hf_config import hf_config, read_config
from gpt2_model.hf_tokenizer import tokenizer_files
from gpt2_model.hub import HUB_NAMES as HUB_NAMES
from gpt2_model.hub import WEIGHTS_FILES, download
from gpt2_model.model import GPT
from gpt2_model.openai import read_openai
from gpt2_model.tensor_files import read_json, read_safetensors, read_shards, read_torch, short, state_dict
from gpt2_model.tokenizer import EOT

_PROJECTIONS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The end of a whole name: "c_attn.bias" is a weight, "attn.bias" the mask, "attn.masked_bias" its -1e4. The second
# head of a GPT2DoubleHeadsModel is no part of the language model.
_NO_WEIGHT = re.compile(r"(^|\.)attn\.(bias|masked_bias)$|^multiple_choice_head\.")
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|transformer\.)+")


class _Checkpoint(NamedTuple):
    """A model on disk, whose names, shapes and types are known and whose values are not read yet."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    source: Path
    in_out: bool  # how the projections lie


def load(name_or_path: str | Path, dtype: torch.dtype) -> GPT:
    """See GPT.from_pretrained."""
    checkpoint = _open(str(name_or_path))
    tensors = _fitting(checkpoint)

    def own(name: str) -> Tensor:
        # A copy: the map would change with the file. One pass does the transposing and the conversion as well.
        stored = tensors[name].t() if name.endswith(_PROJECTIONS) and checkpoint.in_out else tensors[name]
        return torch.empty(stored.shape, dtype=dtype).copy_(stored)

    with ThreadPoolExecutor(2) as pool:  # transposing takes twice the time of copying; a second thread makes it up
        weights = dict(zip(tensors, pool.map(own, tensors), strict=True))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = GPT(checkpoint.config)
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def inspect(name_or_path: str | Path) -> GPTConfig:
    """What GPT.from_pretrained would load, checked likewise, but for the weights' values: they stay on disk.

    Raises: what GPT.from_pretrained raises.
    """
    checkpoint = _open(str(name_or_path))
    _fitting(checkpoint)
    return checkpoint.config


def _open(name: str) -> _Checkpoint:
    path = Path(name)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_file(path)
    if name in PRESETS:
        raise FileNotFoundError(f"{name} is a size, not a model: OpenAI's of that size is {OPENAI_NAMES[name]}")
    # "a/b" can be a hub id; what starts like a path or goes deeper cannot.
    if path.exists() or name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1:
        raise FileNotFoundError(f"{name} is neither a model folder, a weights file nor a hub name")
    return _open_folder(download(name))


def _open_folder(folder: Path) -> _Checkpoint:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            config = read_config(folder / "config.json")
            if name.endswith(".json"):
                return _Checkpoint(config, read_shards(folder / name), folder / name, in_out=True)
            return _open_file(folder / name)
    if (folder / "hparams.json").is_file():
        return _Checkpoint(*read_openai(folder), folder, in_out=True)
    if checkpoint := newest_checkpoint(folder):
        return _open_folder(checkpoint)
    raise FileNotFoundError(f"{folder} holds no weights: no {', '.join(WEIGHTS_FILES)} or hparams.json in it")


def _open_file(path: Path) -> _Checkpoint:
    """By content, since a .bin is torch's or llm.c's."""
    if path.suffix == ".safetensors":
        return _Checkpoint(read_config(path.parent / "config.json"), read_safetensors(path), path, in_out=True)
    with path.open("rb") as file:
        start = file.read(len(LLMC_MAGIC))
    if start == LLMC_MAGIC:
        return _Checkpoint(*read_llmc(path), path, in_out=False)
    content = read_torch(path)
    if "model_args" in content:
        return _Checkpoint(*read_nanogpt(content, path), path, in_out=False)
    return _Checkpoint(read_config(path.parent / "config.json"), state_dict(content, path), path, in_out=True)


def _fitting(checkpoint: _Checkpoint) -> dict[str, Tensor]:
    """The tensors under our names, exactly those of the config; decided without reading their values.

    Raises:
        ValueError: a tensor is missing, unknown, there twice, of another shape, or no floating-point one.
    """
    config, stored, source, in_out = checkpoint
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        bare = _PREFIX.sub("", name)
        if _NO_WEIGHT.search(bare):
            continue
        if bare in tensors:
            raise ValueError(f"{source} holds {short(bare)} twice, under different prefixes")
        tensors[bare] = tensor
    if config.n_layer > len(tensors):  # else the next lines would take as long as the config likes
        raise ValueError(f"{source} holds {len(tensors)} tensors, the config speaks of {config.n_layer} layers")
    expected = dict(_shapes(config, in_out))
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{source} does not hold this model's weights: {len(missing)} missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {len(unknown)} unknown"
            f"{f' ({short(unknown[0])}, ...)' if unknown else ''}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, the config says {shape}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{source}: {name} holds {tensors[name].dtype}, not floating-point numbers")
    # A tied head may be stored as well. One that differs from the embedding means that it was not tied.
    embedding = tensors["wte.weight"]
    if head is not None and not (head.dtype == embedding.dtype and torch.equal(head, embedding)):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight, but the config ties them")
    return tensors


def _shapes(config: GPTConfig, in_out: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a checkpoint of `config` holds. Without a module: that of a hostile config is too large even empty."""
    width, inner = config.n_embd, config.mlp_dim
    yield "wte.weight", (config.vocab_size, width)
    yield "wpe.weight", (config.block_size, width)
    for layer in range(config.n_layer):
        for part, (rows, columns) in {
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (inner, width),
            "mlp.c_proj": (width, inner),
        }.items():
            yield f"h.{layer}.{part}.weight", (columns, rows) if in_out else (rows, columns)
            yield f"h.{layer}.{part}.bias", (rows,)
        for norm in ("ln_1", "ln_2"):
            yield f"h.{layer}.{norm}.weight", (width,)
            yield f"h.{layer}.{norm}.bias", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)


def save(model: GPT, folder: Path) -> None:
    """See GPT.save_pretrained. Each file appears whole under its name or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", lambda file: _write_safetensors(model, file))
    # Up to 50,304, the next multiple of 128, rows beyond GPT-2's 50,257 are padding. Any other size is another
    # vocabulary, whose files we do not have.
    if EOT < model.config.vocab_size <= 50304:
        for name, content in tokenizer_files(model.config).items():
            _write(folder / name, _writer(content))
    generation = {"bos_token_id": EOT, "eos_token_id": EOT} if model.config.vocab_size > EOT else {}
    _write(folder / "generation_config.json", _writer(generation))
    _write(folder / "config.json", _writer(hf_config(model.config)))


def _write_safetensors(model: GPT, file: BinaryIO) -> None:
    """Tensor by tensor: safetensors' own save_file wants all of them in memory once more."""
    weights = {
        name if name == "lm_head.weight" else f"transformer.{name}": parameter.detach()
        for name, parameter in model.state_dict().items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        shape = list(weight.shape)[:: -1 if name.endswith(_PROJECTIONS) else 1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * weight.numel()]}
        end += 4 * weight.numel()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie where they can be mapped
    file.write(len(text).to_bytes(8, "little") + text)
    for name, weight in weights.items():
        tensor = weight.to("cpu", torch.float32)
        file.write((tensor.t() if name.endswith(_PROJECTIONS) else tensor).contiguous().numpy().data)


def _writer(content: bytes | dict[str, Any]) -> Callable[[BinaryIO], object]:
    if isinstance(content, dict):
        content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return lambda file: file.write(content)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write under another name, flush to the disk, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_progress(model: str) -> dict[str, int]:
    """The step and the tokens so far in the trainer.json of a checkpoint; {} where there is none.

    Raises:
        ValueError: a trainer.json that holds no JSON object.
    """
    path = Path(model) / "trainer.json"
    state = read_json(path) if path.is_file() else {}
    return {name: state[name] for name in ("step", "tokens") if type(state.get(name)) is int}
