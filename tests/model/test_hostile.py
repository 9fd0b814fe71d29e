"""Files from strangers: refused with one line, in bounded memory, and nothing in them is run."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import WTE, as_file, refused, tensors_of

from gpt2_model import GPT


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def edit_header(folder: Path, change) -> None:
    """`change` gets the header, parsed, and returns it, or its text."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(name: str, **fields):
    """A change of one tensor's entry."""
    return lambda header: header | {name: header[name] | fields}


OFFSET, JSON, SIZE = "invalid offset for tensor", "invalid JSON in header", "overflow computing buffer size"
SHAPE = "invalid shape, data type, or offset"
SAFETENSORS = {
    "dtype_unknown": (entry(WTE, dtype="F7"), JSON),
    "dtype_integers": (entry(WTE, dtype="I32"), "wte.weight is torch.int32; it must be fp32, fp16 or bf16"),
    "shape_overflow": (entry(WTE, shape=[2**62, 4]), SIZE),
    "shape_deep": (entry(WTE, shape=[1] * 100_000), SHAPE),
    "shape_wrong": (entry(WTE, shape=[32, 100]), r"wte.weight has shape \(32, 100\), the config says"),
    "offsets_behind": (entry(WTE, data_offsets=[2**40, 2**40 + 12800]), OFFSET),
    "overlap": (entry("transformer.ln_f.bias", data_offsets=[0, 128]), OFFSET),
    "bad_utf8": (lambda header: b'{"\xff\xfe": 1}', "invalid UTF-8 in header"),
    "deep_json": (lambda header: b'{"a":' * 1_000_000, JSON),
    "twice": (lambda header: json.dumps(header).encode()[:-1] + b', "a": 1, "a": 1}', JSON),
    "name_with_a_line": (lambda header: {**header, "x\n\x1b[2J": header[WTE]}, OFFSET),
    "name_of_a_page": (lambda header: {**header, "x" * 100_000: header[WTE]}, OFFSET),
    "empty": (lambda header: b"{}", "file not fully covered"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_safetensors_headers(folder, change, message) -> None:
    edit_header(folder, change)
    refused(folder, message)


DAMAGES = [(lambda data, length=length: struct.pack("<Q", length) + data[8:])
           for length in (2**64 - 1, 2**63, 2**40, 10**8 + 1, 10**6, 0)]  # fmt: skip
DAMAGES += [(lambda data, size=size: data[:size]) for size in (0, 7, 8, 1000, -1, -5000)]
DAMAGES += [lambda data: data + b"#!/bin/sh"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_safetensors_of_another_length(folder, damage) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "is damaged or not a safetensors file")


def test_harmless_files_load(folder) -> None:
    expected = GPT.from_pretrained(folder).state_dict()
    for change in (
        lambda: edit_header(folder, lambda header: json.dumps(header).encode().ljust(5001)),
        lambda: shard(folder, suffix="bin"),
    ):
        change()
        loaded = GPT.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def tensors_changed(change):
    def damage(folder: Path) -> None:
        safetensors.torch.save_file(change(tensors_of(folder)), folder / "model.safetensors")

    return damage


BROKEN = {
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: no model.safetensors"),
    "no_config": (lambda f: (f / "config.json").unlink(), "is not a model folder: it has no config.json"),
    "deeper": (lambda f: edit_config(f, n_layer=3), r"12 missing \(h.2.attn.c_attn.bias, ...\), 0 unknown"),
    "missing": (tensors_changed(lambda t: {n: v for n, v in t.items() if "f.bias" not in n}), r"1 missing \(ln_f"),
    "twice": (tensors_changed(lambda t: t | {"ln_f.bias": torch.zeros(32)}), "holds 'ln_f.bias' twice"),
    "other_head": (tensors_changed(lambda t: t | {"lm_head.weight": t[WTE] + 1}), "lm_head.weight differs"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folders(folder, damage, message) -> None:
    damage(folder)
    refused(folder, message)


CONFIGS = {
    "deep": ({"n_layer": 10**9}, "holds 28 tensors, but the config has 1000000000 layers"),
    "wide": ({"n_embd": 2 * 10**9}, r"the config says \(100, 2000000000\)"),
    "astronomic": ({"vocab_size": 10**4000}, r"the config says \(1000"),
    "bottomless": ({"n_layer": 10**4000}, "the config has 1000.* layers"),
    "infinite": ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon must be a number"),
    "nan": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number"),
    "text": ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number"),
    "list": ({"activation_function": ["gelu"]}, "activation_function must be one of gelu_new"),
    "one": ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false"),
    "contradiction": ({"hidden_size": 64}, "contradicts itself: n_embd = 32 but hidden_size = 64"),
}


@pytest.mark.parametrize(("fields", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configs(folder, fields, message) -> None:
    edit_config(folder, **fields)
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "[]", "[" * 10**6, '{"n_layer": 2, "n_layer": 3}', " " * 10_000_001])
def test_configs_that_are_none(folder, text) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "is not valid JSON|is too large for a GPT-2's config.json")


class Touch:
    """Unpickled in the usual way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "nested", "key"])
def test_code_in_a_pickle_is_never_run(folder, tmp_path, place, zipped) -> None:
    canary = tmp_path / "it-ran"
    content = tensors_of(folder)
    content |= {
        "value": {"x": Touch(canary)},
        "nested": {"x": [{"y": (Touch(canary),)}]},
        "key": {(Touch(canary),): torch.zeros(1)},
    }[place]
    as_file(folder, content, _use_new_zipfile_serialization=zipped)
    refused(folder, r"holds more than tensors; nothing was run: it asks for '(posix|nt).system'")
    assert not canary.exists()


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


OTHERS = {
    "bare_pickle": lambda evil: pickle.dumps(evil),
    "protocol_0": lambda evil: pickle.dumps(evil, protocol=0),
    "zip_of_a_pickle": lambda evil: zip_of({"archive/data.pkl": pickle.dumps(evil, 2), "archive/version": b"3\n"}),
    "text": lambda evil: b"hello",
    "empty": lambda evil: b"",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS.keys())
def test_other_files_called_bin(folder, tmp_path, content) -> None:
    canary = tmp_path / "it-ran"
    as_file(folder, {}).write_bytes(content(Touch(canary)))
    refused(folder, "; nothing was run")
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bin_cut_anywhere(folder, zipped) -> None:
    path = as_file(folder, tensors_of(folder), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (3, 14, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "is damaged, or holds more|is not a weights file of safetensors, torch.save or llm.c")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_compressed_archive(folder) -> None:
    path = as_file(folder, tensors_of(folder))
    path.write_bytes(zip_of(members(path) | {"bomb": bytes(10**8)}, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 10**6
    refused(folder, "it is a compressed archive, which torch.save never writes")


def test_a_tensor_made_large_by_its_strides(folder) -> None:
    """100,000 rows of the same 32 numbers, as a config.json with that vocabulary asks for."""
    as_file(folder, tensors_of(folder) | {WTE: torch.zeros(1, 32).expand(10**5, 32)})
    edit_config(folder, vocab_size=10**5)
    refused(folder, "bytes of tensors, more than it has")


def test_many_tensors_of_one_storage(folder) -> None:
    shared = torch.zeros(96 * 32)
    tensors = {name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in tensors_of(folder).items()
               if tensor.numel() <= 96 * 32}  # fmt: skip
    as_file(folder, tensors | {WTE: torch.zeros(100, 32)})
    refused(folder, "bytes of tensors, more than it has")


def test_a_storage_that_claims_more_than_the_file(folder) -> None:
    """10^12 values: the number in the pickle, in both formats, changed by hand."""
    for zipped in (True, False):
        path = as_file(folder, {"a": torch.zeros(1000)}, _use_new_zipfile_serialization=zipped)
        short, long = b"M\xe8\x03", b"\x8a\x06" + (10**12).to_bytes(6, "little")  # BININT2 1000; LONG1 10^12
        if zipped:
            path.write_bytes(zip_of({name: data.replace(short, long) for name, data in members(path).items()}))
        else:
            data = path.read_bytes()
            assert short in data
            path.write_bytes(data.replace(short, long))
        refused(folder, "is damaged, or holds more than tensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({"a": 1}, "holds 'a': int, not only tensors"),
        ({3: torch.zeros(1)}, "holds 3: Tensor, not only tensors by name"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo on cpu, not dense"),
        ({"a": torch.zeros(3, device="meta")}, "on meta|holds more than tensors"),
        ({WTE: torch.zeros(100, 32).cfloat()}, "wte.weight is torch.complex64; it must be fp32, fp16 or bf16"),
    ],
)
def test_a_bin_of_something_else(folder, content, message) -> None:
    as_file(folder, content if isinstance(content, list) else tensors_of(folder) | content)
    refused(folder, message)


def test_a_pickle_that_grows(folder) -> None:
    """Two million empty lists in as many bytes take 120 MB once unpickled."""
    path = as_file(folder, {})
    bomb = b"\x80\x02(" + b"]" * 2_000_000 + b"l."
    path.write_bytes(zip_of({"archive/data.pkl": bomb, "archive/version": b"3\n"}))
    refused(folder, "its list of tensors is longer than 1,000,000 bytes")
    legacy = as_file(folder, {"a": torch.zeros(1)}, _use_new_zipfile_serialization=False)
    legacy.write_bytes(legacy.read_bytes()[:15] + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + bomb)
    refused(folder, "its list of tensors is longer than 1,000,000 bytes")


def shard(folder: Path, change_index=lambda index: index, suffix: str = "safetensors", extra=None) -> Path:
    """`folder` in two shards; the index as `change_index` leaves it."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    stem, save = ("pytorch_model", torch.save) if suffix == "bin" else ("model", safetensors.torch.save_file)
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[:9], sorted(tensors)[9:]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        save({n: tensors[n] for n in names} | (extra or {} if number == 2 else {}), folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = change_index({"metadata": {"total_size": 1}, "weight_map": weight_map})
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / f"{stem}.{suffix}.index.json").write_text(text)
    return folder


def moved(name):
    return lambda index: index | {"weight_map": index["weight_map"] | {WTE: name}}


INDEXES = {
    "upwards": (moved("../other.safetensors"), "names '../other.safetensors', which is not a .safetensors file"),
    "absolute": (moved("/etc/other.safetensors"), "which is not a .safetensors file beside it"),
    "backslash": (moved("..\\other.safetensors"), "which is not a .safetensors file beside it"),
    "other_format": (moved("other.bin"), "names 'other.bin', which is not a .safetensors file"),
    "number": (moved(1), "names 1, which"),
    "absent": (moved("absent.safetensors"), "absent.safetensors, which .* names, is not there: copy it"),
    "wrong_shard": (moved("model-00001-of-00002.safetensors"), "is in only one of them"),
    "unlisted": (
        lambda index: {"weight_map": {n: f for n, f in index["weight_map"].items() if n != WTE}},
        f"{WTE!r} is in only one of them",
    ),
    "listed_only": (
        lambda index: {"weight_map": index["weight_map"] | {"x": "model-00001-of-00002.safetensors"}},
        "'x' is in only one of them",
    ),
    "no_map": (lambda index: {}, "has no weight_map"),
    "a_list": (lambda index: {"weight_map": []}, "has no weight_map"),
    "twice": (lambda index: '{"weight_map": {"a": "b", "a": "c"}}', "a name occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), INDEXES.values(), ids=INDEXES.keys())
def test_indexes(folder, change, message) -> None:
    refused(shard(folder, change), message)


def test_a_tensor_in_two_shards(folder) -> None:
    twice = {"transformer.h.0.ln_1.weight": torch.zeros(32)}
    refused(shard(folder, extra=twice), "'transformer.h.0.ln_1.weight' is in only one of them")


def test_refusing_takes_little_memory(folder, tmp_path) -> None:
    """A process with 300 MB beyond what importing takes refuses claims of terabytes without noticing the limit."""
    huge = {"vocab_size": 2**40, "n_embd": 2**20, "n_positions": 2**40, "n_layer": 10**9, "n_inner": 2**40}
    folders = {name: tmp_path / name for name in ("sizes", "strides", "storage", "header")}
    for name, path in folders.items():
        shutil.copytree(folder, path)
        edit_config(path, **{"sizes": huge, "strides": {"vocab_size": 10**10}}.get(name, {}))
    tensors = tensors_of(folder)
    as_file(folders["strides"], tensors | {WTE: torch.zeros(1, 32).expand(10**10, 32)})
    claim = as_file(folders["storage"], {"a": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    claim.write_bytes(claim.read_bytes().replace(b"M\xe8\x03", b"\x8a\x06" + (10**12).to_bytes(6, "little")))
    edit_header(folders["header"], entry(WTE, shape=[2**40, 32], data_offsets=[0, 2**47]))
    program = f"""
import pathlib, resource
import torch._weights_only_unpickler
from gpt2_model import GPT
import gpt2_model.checkpoints.load_save
statm = pathlib.Path("/proc/self/statm")
if statm.exists():  # elsewhere the limit is not enforced either
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 300_000_000,) * 2)
for path in {[str(path) for path in folders.values()]}:
    try:
        GPT.from_pretrained(path)
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    values = "1,000,000,000,000 values"
    reasons = ("the config has 1000000000 layers", "more than it has", values, "invalid offset for tensor")
    lines = result.stdout.splitlines()
    assert [reason in line for reason, line in zip(reasons, lines, strict=True)] == [True] * 4, result.stderr
