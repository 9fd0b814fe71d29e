"""Files of tensors from strangers: safetensors and torch's own, whole or in shards.

Files are mapped, and a tensor is a view of the map that was checked to lie inside it. So no header makes us
allocate, a name, shape or type is known before any data is read, and nothing is ever unpickled but by torch's
safe unpickler.
"""

import json
import math
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a GPT-2 is stored in; its causal mask, a buffer, is U8 or BOOL.
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# JSON and pickles take up to 60 times their size once read. The header of the largest GPT-2 has 70 kB, its
# pickle 60 kB; a config.json with many labels may have a few MB.
MAX_JSON = 10_000_000
_MAX_PICKLE = 1_000_000
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def short(value: Any) -> str:
    """`value` for a message: one line, no control characters, not a page, whatever a stranger wrote."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        ValueError: too large, not valid JSON, not an object, a key that comes twice, or a number above 64 bits.
    """
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is larger than any {path.name} of a GPT-2 ({MAX_JSON:,} bytes)")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, source: Path) -> dict[str, Any]:
    """See read_json."""

    def whole(digits: str) -> int:
        if len(digits) > 19:  # 64 bits
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{short(name)} comes twice")
            found[name] = value
        return found

    try:
        content = json.loads(text, object_pairs_hook=once, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} is not valid JSON for a model: it holds no object")
    return content


def map_file(path: Path) -> Tensor:
    """The bytes of a file, (size,) uint8, read when they are looked at; writing to them leaves the file alone."""
    with path.open("rb") as file:  # where it may not be read, an OSError; torch would raise something else
        size = os.fstat(file.fileno()).st_size
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def piece(raw: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose bytes begin at `start` in a mapped file; the caller has checked that they end in it."""
    data = raw[start : start + dtype.itemsize * math.prod(shape)]
    if start % dtype.itemsize:  # behind a header of odd length; seldom, since writers pad it
        data = data.clone()
    return data.view(dtype).view(shape)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped. Format: github.com/huggingface/safetensors, README.md.

    Raises:
        ValueError: a header that is not one, or does not describe exactly the bytes that follow it.
    """
    damaged = f"{path} is damaged or no safetensors file"
    raw = map_file(path) if path.stat().st_size >= 8 else torch.empty(0, dtype=torch.uint8)
    length = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    if len(raw) < 8 or length > min(len(raw) - 8, MAX_JSON):
        raise ValueError(f"{damaged}: {len(raw)} bytes, with a header of {length}")
    header = parse_json(raw[8 : 8 + length].numpy().tobytes(), path)
    header.pop("__metadata__", None)

    spans = []
    for name, entry in header.items():
        spans.append((*_span(entry, f"{damaged}: {short(name)}"), name))
    tensors = {}
    end = 8 + length
    for start, stop, dtype, shape, name in sorted(spans, key=lambda span: span[:2]):
        if start + 8 + length != end:
            raise ValueError(f"{damaged}: {short(name)} overlaps another tensor, or leaves a hole before it")
        end = stop + 8 + length
        if end > len(raw):
            raise ValueError(f"{damaged}: {short(name)} ends {end - len(raw)} bytes behind the file's end")
        tensors[name] = piece(raw, start + 8 + length, dtype, shape)
    if end != len(raw):
        raise ValueError(f"{damaged}: {len(raw) - end} bytes belong to no tensor")
    return tensors


def _span(entry: Any, where: str) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """(start, end, dtype, shape) in an entry of the header, consistent with each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} needs exactly dtype, shape and data_offsets")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in _DTYPES:
        raise ValueError(f"{where} is stored as {short(stored)}, GPT-2s as {', '.join(_DTYPES)}")
    for numbers in (shape, offsets):
        # Eight dimensions of 48 bits: enough for anything, and their product is computed at once.
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(_is_size(n) for n in numbers):
            raise ValueError(f"{where} has a shape or offsets that are no lists of sizes")
    dtype = _DTYPES[stored]
    if len(offsets) != 2 or offsets[1] - offsets[0] != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{where} has offsets that do not fit its shape")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def read_torch(path: Path) -> dict[Any, Any]:
    """What torch.save wrote: a dict of tensors, or of more; mapped where the format allows it (since torch 1.6).

    Raises:
        ValueError: a damaged file, one that holds more than tensors and plain values, or another format.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
        if start.startswith(_ZIP):
            _check_zip(path)
        elif start == _LEGACY:
            _check_legacy(path)
        else:
            raise ValueError("it is no file of torch.save")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(_ZIP))
    except OSError:
        raise
    except Exception as error:  # torch tells of bad files in a dozen ways
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        text = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        reason = f"it asks for {short(forbidden[1])}" if forbidden else text[:100]
        raise ValueError(f"{path} is damaged, or holds more than tensors; nothing was run: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _check_zip(path: Path) -> None:
    """torch.save packs nothing, so that no file holds more than its size."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is a compressed archive, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members claim more bytes than it has")
    if any(member.file_size > _MAX_PICKLE for member in members if member.filename.endswith(".pkl")):
        raise ValueError(f"its list of tensors is longer than {_MAX_PICKLE:,} bytes")


def _check_legacy(path: Path) -> None:
    """The format before torch 1.6: a magic number, a version, the system, the object, then raw storages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for part in ("magic", "version", "system", "object", "storages"):
            for _, argument, position in pickletools.genops(file):
                if position is not None and position > _MAX_PICKLE:
                    raise ValueError(f"its list of tensors is longer than {_MAX_PICKLE:,} bytes")
                if part == "object" and type(argument) is int and argument > size:
                    raise ValueError(f"a tensor of {argument:,} values in a file of {size:,} bytes")


def state_dict(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """`content`, checked to be names and dense tensors in memory that all fit in the file.

    Raises:
        ValueError: something else.
    """
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} holds {short(name)}: {type(tensor).__name__}, not only tensors by name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES.values():
            raise ValueError(f"{path}: {short(name)} is {tensor.dtype}, {tensor.layout} on {tensor.device.type}")
    # Strides of 0 and shared storages make much of little. A tied head is the one tensor that comes twice.
    claimed = sum(tensor.nbytes for name, tensor in content.items() if not name.endswith("lm_head.weight"))
    if claimed > path.stat().st_size:
        raise ValueError(f"{path} claims {claimed:,} bytes of tensors, more than it has")
    return content


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all the files that an index names (model.safetensors.index.json), mapped.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: no index, a shard that is not a file beside it, or one with other tensors than the index says.
    """
    names_in: dict[str, set[str]] = {}
    for name, shard in shard_names(index).items():
        names_in.setdefault(shard, set()).add(name)
    for shard in names_in:
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard}, which is not beside it")
    tensors: dict[str, Tensor] = {}
    for shard, names in names_in.items():
        path = index.parent / shard
        found = read_safetensors(path) if path.suffix == ".safetensors" else state_dict(read_torch(path), path)
        if found.keys() != names:
            odd = sorted(found.keys() ^ names)[0]
            raise ValueError(f"{path} does not hold what {index.name} says: {short(odd)} is only in one of them")
        tensors.update(found)
    return tensors


def shard_names(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index, each a plain name.

    Raises:
        ValueError: no index, or a name with a path in it.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for shard in names.values():
        # A backslash is a separator elsewhere.
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or not shard.endswith(suffix):
            raise ValueError(f"{index} names {short(shard)}, which is not a {suffix} file beside it")
    return names
