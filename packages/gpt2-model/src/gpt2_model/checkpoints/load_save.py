"""Load any checkpoint as (GPTConfig, tensors), and save these as a Hugging Face folder.

Most checkpoints keep the four projections of a block as OpenAI did, (in, out), "Conv1D"; they are transposed for
nn.Linear, (out, in). Names may contain those of wrappers ("module.") or be those of buffers (the causal mask).
"""

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gpt2_model.checkpoints import files
from gpt2_model.checkpoints.huggingface import WEIGHTS_FILES, download, hf_config, read_config
from gpt2_model.checkpoints.others import LLMC_MAGIC, read_llmc, read_nanogpt
from gpt2_model.checkpoints.tokenizer_files import TOKENIZER_FILES, SpecialIds, gpt2_files
from gpt2_model.command import write_whole
from gpt2_model.config import OPENAI_NAMES, PAPER_NAMES, PRESETS, GPTConfig
from gpt2_model.tokenizer import Tokenizer

# "attn" must be a whole part: "c_attn.bias" is a weight, "attn.bias" the mask, "attn.masked_bias" its -1e4. The
# second head of a GPT2DoubleHeadsModel is not part of the language model.
_NO_WEIGHT = re.compile(r"(^|\.)attn\.(bias|masked_bias)$|^multiple_choice_head\.")
# What wraps a module adds to its names: DDP "module", torch.compile "_orig_mod", FSDP "_fsdp_wrapped_module". Some
# wrap each block, so these are anywhere. The attributes that hold the model can have any name.
_WRAPPER = re.compile(r"(?<![^.])(_\w+|module)\.")
_PREFIX = re.compile(r"^.*?(?<![^.])(?=(wte|wpe|ln_f|lm_head|h\.\d+|multiple_choice_head)\.)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Checkpoint(NamedTuple):
    """A model on disk, whose values are not read yet."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    source: Path
    in_out: bool  # whether projections are stored as (in, out)

    @property
    def folder(self) -> Path | None:
        """The folder of a Hugging Face model, whose other files belong to it."""
        return self.source.parent if self.in_out else None


def load(name_or_path: str | Path, dtype: torch.dtype) -> tuple[GPTConfig, dict[str, Tensor], Path | None]:
    """Return the config, the state dict in `dtype`, and the Hugging Face folder, if it is one.

    GPT.from_pretrained lists the names and errors.
    """
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
        weights = dict(zip(names, pool.map(own, names), strict=True))
    return checkpoint.config, weights, checkpoint.folder


def inspect(name_or_path: str | Path) -> tuple[GPTConfig, Path | None]:
    """Return the config and the folder of a checkpoint, checked as by `load`, without loading its weights."""
    checkpoint = _open(str(name_or_path))
    _fitting(checkpoint)
    return checkpoint.config, checkpoint.folder


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
    # "a/b" can be a hub name; what starts like a path or has more slashes cannot.
    is_path = name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1
    if path.is_dir() or path.is_file():
        try:
            return _open_folder(path) if path.is_dir() else _open_file(path)
        except (FileNotFoundError, files.NotWeightsError) as error:
            if is_path or name.endswith("/") or "@" in name or (path.is_file() and path.suffix):
                raise
            raise FileNotFoundError(f"{error}; if you mean the hub's {name}, write {name}@main") from None
    if (size := PAPER_NAMES.get(name, name)) in PRESETS:
        raise FileNotFoundError(f"{name} is a size, not a model: use OpenAI's {OPENAI_NAMES[size]}")
    if path.exists() or is_path:
        raise FileNotFoundError(f"{name} is neither a model folder, a weights file nor a hub name")
    return _open_folder(download(name))


def _open_folder(folder: Path) -> _Checkpoint:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return _open_file(folder / name)
    if checkpoint := newest_checkpoint(folder):
        return _open_folder(checkpoint)
    names = [files.short(path.name) for path in sorted(folder.iterdir())[:4]]
    only = f"only {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else "it is empty"
    raise FileNotFoundError(f"{folder} holds no weights: no {', '.join(WEIGHTS_FILES)} in it, {only}")


def _open_file(path: Path) -> _Checkpoint:
    """Open a weights file; its content tells its kind, since a .bin is torch's or llm.c's."""
    start = files.first_bytes(path, len(LLMC_MAGIC))
    if path.suffix == ".safetensors":
        tensors = files.read_safetensors(path)
    elif path.suffix == ".json":
        tensors = files.read_shards(path)
    elif start == LLMC_MAGIC:
        return _Checkpoint(*read_llmc(path), path, in_out=False)
    else:
        content = files.read_torch(path)
        if "model_args" in content or isinstance(content.get("config"), SimpleNamespace):
            return _Checkpoint(*read_nanogpt(content, path), path, in_out=False)
        tensors = files.state_dict(content, path)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (path.parent / name).is_file():
            files.first_bytes(path.parent / name, 0)  # raises if it is a git-lfs pointer
    return _Checkpoint(read_config(path.parent / "config.json"), tensors, path, in_out=True)


def _fitting(checkpoint: _Checkpoint) -> dict[str, Tensor]:
    """Return the tensors under our names; raise a ValueError if they are not exactly those of the config."""
    config, stored, source, in_out = checkpoint
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        bare = _PREFIX.sub("", _WRAPPER.sub("", name))
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
    if head is not None:  # safetensors' save_model stores only one of the two, the first by name
        tensors.setdefault("wte.weight", head)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        lacks = f"{len(missing)} missing" + (f" ({missing[0]}, ...)" if missing else "")
        adds = f"{len(unknown)} unknown" + (f" ({files.short(unknown[0])}, ...)" if unknown else "")
        raise ValueError(f"{source} does not contain exactly this model's weights: {lacks}, {adds}")
    for name, needed in expected.items():
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if shape != needed:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {files.short(needed)}")
        if dtype not in _FLOATS:
            raise ValueError(f"{source}: {name} is {dtype}; it must be fp32, fp16 or bf16, or fp64")
    # A tied head may be stored as well, in any type. One that differs in value means that it was not tied.
    if head is not None and not _same_values(head, tensors["wte.weight"]):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight, but the config ties them")
    return tensors


def _same_values(a: Tensor, b: Tensor) -> bool:
    if a is b or a.dtype == b.dtype:
        return a is b or torch.equal(a, b)
    return a.shape == b.shape and a.dtype in _FLOATS and bool((a == b).all())  # compared in the wider type


def save(
    config: GPTConfig, weights: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer | None, ids: SpecialIds
) -> None:
    """Write a model, whose state_dict() is `weights`, as a Hugging Face folder, each file whole or not at all."""
    folder = Path(os.path.expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / "model.safetensors") as file:
        _write_safetensors(weights, file)
    contents: dict[str, Any] = {}
    special = dict(ids.config)
    if tokenizer is not None:
        ids, ends = tokenizer.ids, list(tokenizer.stop_ids)
        if "tokenizer.json" not in tokenizer.files and tokenizer.is_gpt2:
            contents |= gpt2_files(config.block_size)
        contents |= tokenizer.saved_files()
        special = {"bos_token_id": tokenizer.eot, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        special |= ids.config
    named = {name: value for name, value in special.items() if value is not None}
    contents["generation_config.json"] = ids.generation or named
    contents["config.json"] = hf_config(config, special)
    for name in set(TOKENIZER_FILES) - contents.keys():  # of another model that was here
        (folder / name).unlink(missing_ok=True)
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
