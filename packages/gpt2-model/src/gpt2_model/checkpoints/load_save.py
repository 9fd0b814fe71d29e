"""Load any checkpoint as (GPTConfig, tensors), and save these as a Hugging Face folder.

Most checkpoints keep the four projections of a block as OpenAI did, (in, out), "Conv1D"; they are transposed for
nn.Linear, (out, in). Names may carry a prefix ("transformer.") or be those of buffers (the causal mask).
"""

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gpt2_model.checkpoints import files
from gpt2_model.checkpoints.huggingface import WEIGHTS_FILES, download, hf_config, read_config, tokenizer_files
from gpt2_model.checkpoints.others import LLMC_MAGIC, read_llmc, read_nanogpt
from gpt2_model.command import write_whole
from gpt2_model.config import OPENAI_NAMES, PAPER_NAMES, PRESETS, GPTConfig
from gpt2_model.tokenizer import EOT, PADDED

# "attn" must be a whole part: "c_attn.bias" is a weight, "attn.bias" the mask, "attn.masked_bias" its -1e4. The
# second head of a GPT2DoubleHeadsModel is not part of the language model.
_NO_WEIGHT = re.compile(r"(^|\.)attn\.(bias|masked_bias)$|^multiple_choice_head\.")
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|transformer\.)+")


class _Checkpoint(NamedTuple):
    """A model on disk, whose values are not read yet."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    source: Path
    in_out: bool  # whether projections are stored as (in, out)


def load(name_or_path: str | Path, dtype: torch.dtype) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the config and the state dict, in `dtype`, for GPT.from_pretrained, which lists names and errors."""
    checkpoint = _open(str(name_or_path))
    tensors = _fitting(checkpoint)

    def own(name: str) -> Tensor:
        # A copy, since a mapped tensor would change with the file. The same pass transposes and converts it.
        stored = tensors[name].t() if name.endswith(files.PROJECTIONS) and checkpoint.in_out else tensors[name]
        return torch.empty(stored.shape, dtype=dtype).copy_(stored)

    # Transposing takes twice as long as copying; two threads make up for it. The largest tensors come first: in
    # the file's order one thread ends long before the other, and 124M take 182 ms, not 156.
    names = sorted(tensors, key=lambda name: -tensors[name].numel())
    with ThreadPoolExecutor(2) as pool:
        return checkpoint.config, dict(zip(names, pool.map(own, names), strict=True))


def inspect(name_or_path: str | Path) -> GPTConfig:
    """Return the config of a checkpoint, checked as by `load`, without loading its weights."""
    checkpoint = _open(str(name_or_path))
    _fitting(checkpoint)
    return checkpoint.config


def read_progress(model: str) -> dict[str, int]:
    """Return the step and the tokens so far from a training checkpoint's trainer.json; {} if it has none."""
    path = Path(model) / "trainer.json"
    state = files.read_json(path) if path.is_file() else {}
    return {name: state[name] for name in ("step", "tokens") if type(state.get(name)) is int}


def newest_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in a run folder of gpt2-train, or None."""
    # manifest.json is written last. Its hashes are not compared: that would read gigabytes.
    whole = ("manifest.json", "config.json", "model.safetensors")
    steps = (run / "checkpoints").glob("step-*")
    return max((step for step in steps if all((step / name).is_file() for name in whole)), default=None)


def _open(name: str) -> _Checkpoint:
    name = os.path.expanduser(name)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_file(path)
    if (size := PAPER_NAMES.get(name, name)) in PRESETS:
        raise FileNotFoundError(f"{name} is a size, not a model: use OpenAI's {OPENAI_NAMES[size]}")
    # "a/b" can be a hub name; what starts like a path or has more slashes cannot.
    if path.exists() or name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1:
        raise FileNotFoundError(f"{name} is neither a model folder, a weights file nor a hub name")
    return _open_folder(download(name))


def _open_folder(folder: Path) -> _Checkpoint:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return _open_file(folder / name)
    if checkpoint := newest_checkpoint(folder):
        return _open_folder(checkpoint)
    raise FileNotFoundError(f"{folder} holds no weights: no {', '.join(WEIGHTS_FILES)} in it")


def _open_file(path: Path) -> _Checkpoint:
    """Open a weights file; its content tells its kind, since a .bin is torch's or llm.c's."""
    with path.open("rb") as file:
        start = file.read(len(LLMC_MAGIC))
    if path.suffix == ".safetensors":
        tensors = files.read_safetensors(path)
    elif path.suffix == ".json":
        tensors = files.read_shards(path)
    elif start == LLMC_MAGIC:
        return _Checkpoint(*read_llmc(path), path, in_out=False)
    else:
        content = files.read_torch(path)
        if "model_args" in content:
            return _Checkpoint(*read_nanogpt(content, path), path, in_out=False)
        tensors = files.state_dict(content, path)
    return _Checkpoint(read_config(path.parent / "config.json"), tensors, path, in_out=True)


def _fitting(checkpoint: _Checkpoint) -> dict[str, Tensor]:
    """Return the tensors under our names; raise a ValueError if they are not exactly those of the config."""
    config, stored, source, in_out = checkpoint
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        bare = _PREFIX.sub("", name)
        if _NO_WEIGHT.search(bare):
            continue
        if bare in tensors:
            raise ValueError(f"{source} holds {files.short(bare)} twice, under different prefixes")
        tensors[bare] = tensor
    if config.n_layer > len(tensors):  # else a huge n_layer would keep the next lines busy
        depth = files.short(config.n_layer)
        raise ValueError(f"{source} holds {len(tensors)} tensors, but the config has {depth} layers")
    expected = files.tensor_shapes(config, in_out)
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        lacks = f"{len(missing)} missing" + (f" ({missing[0]}, ...)" if missing else "")
        adds = f"{len(unknown)} unknown" + (f" ({files.short(unknown[0])}, ...)" if unknown else "")
        raise ValueError(f"{source} does not contain exactly this model's weights: {lacks}, {adds}")
    for name, needed in expected.items():
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if shape != needed:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {files.short(needed)}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{source}: {name} is {dtype}; it must be fp32, fp16 or bf16")
    # A tied head may be stored as well. One that differs from the embedding means that it was not tied.
    embedding = tensors["wte.weight"]
    if head is not None and not (head.dtype == embedding.dtype and torch.equal(head, embedding)):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight, but the config ties them")
    return tensors


def save(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model, whose state_dict() is `weights`, as a Hugging Face folder, each file whole or not at all."""
    folder = Path(os.path.expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / "model.safetensors") as file:
        _write_safetensors(weights, file)
    # Any other size is another vocabulary, whose files we do not have.
    contents = tokenizer_files(config) if EOT < config.vocab_size <= PADDED else {}
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), EOT)
    contents["generation_config.json"] = special if config.vocab_size > EOT else {}
    contents["config.json"] = hf_config(config)
    for name, content in contents.items():
        if isinstance(content, dict):
            content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        with write_whole(folder / name) as file:
            file.write(content)


def _write_safetensors(weights: Mapping[str, Tensor], file: BinaryIO) -> None:
    """Write one tensor at a time: safetensors' own save_file needs a second copy of all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        shape = list(weight.shape)[:: -1 if name.endswith(files.PROJECTIONS) else 1]
        stored_name = name if name == "lm_head.weight" else f"transformer.{name}"
        header[stored_name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * weight.numel()]}
        end += 4 * weight.numel()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # alignment, so that the tensors can be mapped
    file.write(len(text).to_bytes(8, "little") + text)
    for name, weight in weights.items():
        tensor = weight.detach().to("cpu", torch.float32)
        file.write((tensor.t() if name.endswith(files.PROJECTIONS) else tensor).contiguous().numpy().data)
