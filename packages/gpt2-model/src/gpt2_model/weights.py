"""Hugging Face model folders to GPT, and back.

The checkpoint differs from our module in two ways. Its four projections a block are "Conv1D", stored (in, out),
where nn.Linear stores (out, in): they are transposed. And names may carry a prefix ("transformer.") or name
buffers that hold no weights (the causal mask). Everything else is equal, name by name.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .config import GPTConfig
from .model import GPT
from .tokenizer import EOT, vocabulary_file

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
WEIGHTS_FILE = "model.safetensors"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The end of a whole name: "c_attn.bias" is a weight, "attn.bias" the mask, "attn.masked_bias" its -1e4.
_BUFFER = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|transformer\.)+")

# GPTConfig's names for the fields of config.json that are called otherwise there; first the one we write.
_HF_NAMES = {
    "block_size": ("n_positions", "max_position_embeddings", "n_ctx"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
}
# Fields of config.json that change the function, which GPT does not have: the only value that leaves it alone.
_MUST_BE = {"model_type": "gpt2", "add_cross_attention": False, "is_encoder_decoder": False}


def load(name_or_path: str | Path, dtype: torch.dtype) -> GPT:
    """See GPT.from_pretrained."""
    folder, weights_file = _locate(str(name_or_path))
    config = read_config(folder / "config.json")
    try:
        stored = safetensors.torch.load_file(weights_file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_file} is damaged or no safetensors file: {error}") from None
    tensors = _our_names(stored, weights_file)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = GPT(config)
    _check_fit(model, tensors, weights_file)
    for name, tensor in tensors.items():
        if name.endswith(_TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.to(dtype).contiguous()
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig in a Hugging Face config.json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or a field that asks for a function that GPT does not compute.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no model folder: it has no config.json")
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    for name, value in _MUST_BE.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{path}: {name} = {raw[name]!r} is not GPT-2 as built here (needs {value!r})")
    values = {}
    for field in fields(GPTConfig):
        for name in _HF_NAMES.get(field.name, (field.name,)):
            if name in raw:
                values[field.name] = raw[name]
                break
    try:
        return GPTConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save(model: GPT, folder: Path) -> None:
    """See GPT.save_pretrained. Each file appears whole under its name or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.state_dict().items():
        tensor = parameter.detach().to("cpu", torch.float32)
        if name.endswith(_TRANSPOSED):
            tensor = tensor.t()
        tensors[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    _write(folder / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))
    if model.config.vocab_size == 50257:  # another size is another vocabulary, whose files we do not have
        for name, content in _tokenizer_files(model.config).items():
            _write(folder / name, _writer(content))
    generation = {"bos_token_id": EOT, "eos_token_id": EOT} if model.config.vocab_size > EOT else {}
    _write(folder / "generation_config.json", _writer(generation))
    _write(folder / "config.json", _writer(_hf_config(model.config)))


def _hf_config(config: GPTConfig) -> dict[str, Any]:
    """config.json: transformers reads n_positions, llama.cpp's converter n_ctx, vLLM the architectures."""
    ours = {_HF_NAMES.get(f.name, (f.name,))[0]: getattr(config, f.name) for f in fields(GPTConfig)}
    special = EOT if config.vocab_size > EOT else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **ours,
        "n_ctx": config.block_size,
        "attn_pdrop": 0.0,  # dropout as in our training: none
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": special,
        "eos_token_id": special,
        "use_cache": True,
        "dtype": "float32",
    }


def _locate(name: str) -> tuple[Path, Path]:
    """The folder with config.json and the weights file, downloaded first where `name` is a hub name."""
    path = Path(name)
    if path.is_file() and path.suffix == ".safetensors":
        return path.parent, path
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"{path} holds no weights: no {WEIGHTS_FILE} in it")
        return path, path / WEIGHTS_FILE
    # "a/b" can be a hub id; what starts like a path or goes deeper cannot.
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is neither a model folder, a .safetensors file nor a hub name")
    return _download(name)


def _download(name: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download  # half a second, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call] # the error below says it in one line
    try:
        weights = hf_hub_download(name, WEIGHTS_FILE)
        config = hf_hub_download(name, "config.json")
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{name} is no local model folder, not in Hugging Face's cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        known = ", ".join(HUB_NAMES)
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name} is neither a local model folder nor a GPT-2 on the hub (such as {known}): {reason}"
        ) from None
    return Path(config).parent, Path(weights)


def _our_names(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Drop prefixes and buffers; a name that comes twice is an error."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = _PREFIX.sub("", name)
        if _BUFFER.search(short):
            continue
        if short in ours:
            raise ValueError(f"{source} holds {short} twice, under different prefixes")
        ours[short] = tensor
    # A tied head may be stored as well. One that differs from the embedding means that it was not tied.
    return ours


def _check_fit(model: GPT, tensors: dict[str, Tensor], source: Path) -> None:
    head = tensors.get("lm_head.weight")
    if head is not None and model.config.tie_word_embeddings:
        if not torch.equal(head, tensors.get("wte.weight", head)):
            raise ValueError(f"{source}: lm_head.weight differs from wte.weight, but config.json ties them")
        del tensors["lm_head.weight"]
    expected = {
        name: tuple(reversed(p.shape)) if name.endswith(_TRANSPOSED) else tuple(p.shape)
        for name, p in model.state_dict().items()
    }
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{source} does not hold this model's weights: {len(missing)} missing"
            f"{f' ({missing[0]}, ...)' if missing else ''}, {len(unknown)} unknown"
            f"{f' ({unknown[0]}, ...)' if unknown else ''}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, config.json says {shape}")


def _tokenizer_files(config: GPTConfig) -> dict[str, Any]:
    """The files by which transformers, vLLM and llama.cpp know GPT-2's tokenizer: OpenAI's two, and the
    same as one tokenizer.json, whose `<|endoftext|>` is a special token."""
    merges = vocabulary_file("vocab.bpe").decode("utf-8")
    vocab = json.loads(vocabulary_file("encoder.json"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {
        "vocab.json": vocabulary_file("encoder.json"),
        "merges.txt": merges.encode("utf-8"),
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": EOT, **end, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "vocab": vocab,
                "merges": [line for line in merges.splitlines()[1:] if line],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": config.block_size,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        },
        "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    }


def _writer(content: bytes | dict[str, Any]) -> Callable[[Path], object]:
    if isinstance(content, bytes):
        return lambda path: path.write_bytes(content)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, flush to the disk, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        try:
            write(temporary)
        except safetensors.SafetensorError as error:  # a full disk, told in its own way
            raise OSError(f"cannot write {path}: {error}") from None
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
