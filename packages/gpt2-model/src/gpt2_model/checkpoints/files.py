"""Read untrusted files: JSON, safetensors and torch's own, whole or sharded.

Tensors are memory-mapped: names, shapes and types are known before any data is read. Pickles are read by torch's
safe unpickler only. Limits that torch and safetensors lack are here: the size of JSON, headers and pickles.
"""

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2_model.command import LFS_POINTERS
from gpt2_model.config import GPTConfig

# Once read, JSON and pickles take up to 60 times their size. The largest GPT-2 has a header of 70 kB, or a pickle
# of 60 kB; a config.json with many labels has a few MB. safetensors' own limit, 100 MB, would take 1.7 GB.
MAX_JSON = 10_000_000
_MAX_PICKLE = 1_000_000
_TOO_LONG = f"its list of tensors is longer than {_MAX_PICKLE:,} bytes"
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# build-nanogpt pickles its config as this class of its script: it is read as plain data, under these names only.
_CONFIG_CLASSES = ("__main__.GPTConfig", "train_gpt2.GPTConfig")
# Where checkpoints of Lightning, DeepSpeed and many scripts have their weights.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")

PROJECTIONS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class NotWeightsError(ValueError):
    """A file is not of a kind that has weights."""


def tensor_shapes(config: GPTConfig, in_out: bool) -> dict[str, tuple[int, ...]]:
    """Return a checkpoint's tensor shapes, without a module: a hostile config would make it huge even if empty."""
    width, inner = config.n_embd, config.mlp_dim
    sizes = ((3 * width, width), (width, width), (inner, width), (width, inner))
    norms = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    block: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (width,))
    for name, (rows, columns) in zip(PROJECTIONS, sizes, strict=True):
        block[name] = (columns, rows) if in_out else (rows, columns)
        block[name.replace("weight", "bias")] = (rows,)
    shapes = {"wte.weight": (config.vocab_size, width), "wpe.weight": (config.block_size, width)}
    layers = {f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()}
    last = {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, width)}
    return {**shapes, **layers, **last, **head}


def short(value: Any) -> str:
    """Return a value for use in a message: one line of at most 100 characters, none of them control characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def checked_config(path: Path, **fields: Any) -> GPTConfig:
    """Return the GPTConfig with a file's fields; if they are invalid, the ValueError names the file."""
    try:
        return GPTConfig(**fields)
    except (ValueError, RecursionError) as error:  # RecursionError: a value too deep to be shown
        raise ValueError(f"{path}: {str(error)[:200]}") from None


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file; a ValueError names a git-lfs pointer in the file's place."""
    with path.open("rb") as file:
        start = file.read(max(count, *map(len, LFS_POINTERS)))
    if start.startswith(LFS_POINTERS):
        raise ValueError(f"{path} is a git-lfs pointer, not the file: run git lfs pull in its folder")
    return start[:count]


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """Give a name of a file for libraries that open UTF-8 names only: any other file is opened as a descriptor."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; a name that occurs twice raises a ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is too large for a GPT-2's {path.name}: the limit is {MAX_JSON:,} bytes")
    first_bytes(path, 0)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not valid JSON for a model: it is not an object")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, memory-mapped; the library checks its header against its size."""
    length = int.from_bytes(first_bytes(path, 8), "little")
    if length > MAX_JSON:
        raise ValueError(f"{path} is damaged or not a safetensors file: its header has {length:,} bytes")
    try:
        with utf8_name(path) as name, safe_open(name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} is damaged or not a safetensors file: {short(reason)}") from None


def read_torch(path: Path) -> dict[Any, Any]:
    """Return the dict of tensors and plain values that torch.save wrote, mapped where the format allows it."""
    start = first_bytes(path, len(_LEGACY))
    zipped = start.startswith(_ZIP)
    if not zipped and start != _LEGACY:
        raise NotWeightsError(f"{path} is not a weights file of safetensors, torch.save or llm.c; nothing was run")
    try:
        (_check_zip if zipped else _check_legacy)(path)
        plain_data = torch.serialization.safe_globals([(SimpleNamespace, name) for name in _CONFIG_CLASSES])
        with plain_data, utf8_name(path) as name:
            content = torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # torch reports bad files with a dozen kinds of errors
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        text = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        reason = f"it asks for {short(forbidden[1])}" if forbidden else text[:100]
        raise ValueError(f"{path} is damaged, or holds more than tensors; nothing was run: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _check_zip(path: Path) -> None:
    """Refuse compressed members, which torch would map as they are, and a pickle that would fill the memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is a compressed archive, which torch.save never writes")
    if any(member.file_size > _MAX_PICKLE for member in members if member.filename.endswith(".pkl")):
        raise ValueError(_TOO_LONG)


def _check_legacy(path: Path) -> None:
    """Refuse pickles of the format before torch 1.6 that would fill the memory."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for part in ("magic", "version", "system", "object", "storages"):
            for _, argument, position in pickletools.genops(file):
                if position is not None and position > _MAX_PICKLE:
                    raise ValueError(_TOO_LONG)
                if part == "object" and type(argument) is int and argument > size:
                    raise ValueError(f"a tensor of {argument:,} values in a file of {size:,} bytes")


def state_dict(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the dense CPU tensors by name in what torch.save wrote, also if they are inside a script's own dict.

    Anything else among them, or more bytes than the file can have, raises a ValueError.
    """
    for _ in _CONTAINERS:  # a hostile dict can contain itself
        inner = [name for name in _CONTAINERS if isinstance(content.get(name), dict)]
        if len(inner) > 1:
            raise ValueError(f"{path} holds weights under {' and '.join(inner)}: save only one of them")
        content = content[inner[0]] if inner else content
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} holds {short(name)}: {type(tensor).__name__}, not only tensors by name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {short(name)} is {tensor.layout} on {tensor.device.type}, not dense")
    # With strides of 0 or shared storages a small file can hold huge tensors. Only a tied head is stored twice.
    tied = ("lm_head.weight",) if any(name.endswith("wte.weight") for name in content) else ()
    claimed = sum(tensor.nbytes for name, tensor in content.items() if not name.endswith(tied))
    if claimed > path.stat().st_size:
        raise ValueError(f"{path} claims {claimed:,} bytes of tensors, more than it has")
    return content


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names (model.safetensors.index.json), mapped."""
    shard_of = shard_names(index)
    tensors: dict[str, Tensor] = {}
    for path in (index.parent / shard for shard in sorted(set(shard_of.values()))):
        if not path.exists():
            raise ValueError(f"{path}, which {index.name} names, is not there: copy it")
        part = read_safetensors(path) if path.suffix == ".safetensors" else state_dict(read_torch(path), path)
        if odd := sorted(part.keys() ^ {name for name, shard in shard_of.items() if shard == path.name}):
            raise ValueError(f"{path} and {index.name} disagree: {short(odd[0])} is in only one of them")
        tensors.update(part)
    return tensors


def shard_names(index: Path) -> dict[str, str]:
    """Return an index as tensor name -> file name; the file names have no folder in them."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in names.values():
        # On Windows a backslash is a separator, too.
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or not shard.endswith(suffix):
            raise ValueError(f"{index} names {short(shard)}, which is not a {suffix} file beside it")
    return names
