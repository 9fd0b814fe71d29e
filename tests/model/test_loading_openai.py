"""OpenAI's TensorFlow folders, without TensorFlow: a real one, and ones that this file writes and damages.

fixtures/openai was written once by TensorFlow 2.21, with `tf.compat.v1.train.Saver(save_relative_paths=True)` and
`save(session, "model.ckpt", write_meta_graph=False)`, from variables with OpenAI's names in the order and with the
values of `fixture_values` below; hparams.json by hand.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from gpt2_model import GPT, GPTConfig
from gpt2_model.cli import main
from gpt2_model.openai import crc32c, read_bundle

FIXTURE = Path(__file__).parent / "fixtures" / "openai"
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=40)


def fixture_values() -> dict[str, np.ndarray]:
    width = 16
    shapes = {"wpe": (8, width), "wte": (40, width)}
    for layer in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{norm}/g": (width,), f"h{layer}/{norm}/b": (width,)}
        for name, (rows, columns) in {
            "attn/c_attn": (width, 3 * width),
            "attn/c_proj": (width, width),
            "mlp/c_fc": (width, 4 * width),
            "mlp/c_proj": (4 * width, width),
        }.items():
            shapes |= {f"h{layer}/{name}/w": (1, rows, columns), f"h{layer}/{name}/b": (columns,)}
    shapes |= {"ln_f/g": (width,), "ln_f/b": (width,)}
    values, count = {}, 0
    for name, shape in shapes.items():
        numbers = np.arange(count, count + math.prod(shape))
        values[f"model/{name}"] = ((numbers * 7919 % 1009 - 504) / 1024).astype(np.float32).reshape(shape)
        count += len(numbers)
    return values


def eight_bits(register: int) -> int:
    for _ in range(8):
        register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register


TABLE = [eight_bits(byte) for byte in range(256)]


def slow_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ TABLE[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


def masked_bytes(data: bytes) -> bytes:
    crc = slow_crc32c(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def proto(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer: numbers as varints, bytes with their length."""
    parts = []
    for number, value in fields:
        if isinstance(value, bytes):
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
        else:
            parts.append(varint(number << 3) + varint(value))
    return b"".join(parts)


def block(entries: list[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    body, last = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    body += bytes(4) + (1).to_bytes(4, "little")  # one restart point, at 0
    return body + bytes([kind]) + masked_bytes(body + bytes([kind]))


def write_table(path: Path, entries: dict[bytes, bytes], per_block: int = 5, kind: int = 0) -> None:
    ordered = sorted(entries.items())
    data, index = b"", []
    for start in range(0, len(ordered), per_block):
        part = block(ordered[start : start + per_block], kind)
        index.append((ordered[start : start + per_block][-1][0], varint(len(data)) + varint(len(part) - 5)))
        data += part
    handles = b""
    for entries_of in ([], index):
        part = block(entries_of)
        handles += varint(len(data)) + varint(len(part) - 5)
        data += part
    path.write_bytes(data + handles.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little"))


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray], kinds=None, **changes) -> None:
    """`changes`: entry fields (number -> value) that lie, by tensor name."""
    data, entries = b"", {b"": proto((1, 1), (3, proto((1, 1))))}
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        shape = proto(*((2, proto((1, size))) for size in tensor.shape))
        dtype = {"float32": 1, "float16": 19, "int64": 9}[str(tensor.dtype)]
        fields = {1: dtype, 2: shape, 4: len(data), 5: len(raw)} | changes.get("lies", {}).get(name, {})
        crc = bytes([6 << 3 | 5]) + masked_bytes(raw)
        entries[name.encode()] = proto(*fields.items()) + crc
        data += raw
    entries |= changes.get("raw", {})
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)
    write_table(prefix.with_name(prefix.name + ".index"), entries, kind=changes.get("compression", 0))


def write_openai(folder: Path, model: GPT, name: str = "model.ckpt", dtype: str = "float32", **changes) -> None:
    """`model` as OpenAI's folder."""
    folder.mkdir(exist_ok=True)
    config = model.config
    hparams = {"n_vocab": config.vocab_size, "n_ctx": config.block_size}
    hparams |= {"n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    tensors = {}
    for ours, parameter in model.state_dict().items():
        values = parameter.numpy().astype(dtype)
        theirs = "model/" + ours.replace("h.", "h", 1).replace(".", "/")
        if values.ndim == 2 and ours.startswith("h."):
            values = np.ascontiguousarray(values.T)[None]
        if ours in ("wte.weight", "wpe.weight"):
            theirs = theirs.removesuffix("/weight")
        norm = "ln_" in ours
        tensors[theirs.replace("/weight", "/g" if norm else "/w").replace("/bias", "/b")] = values
    write_bundle(folder / name, tensors, **changes)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def test_what_tensorflow_wrote() -> None:
    stored = read_bundle(FIXTURE / "model.ckpt")
    values = fixture_values()
    assert stored.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(stored[name].numpy(), value), name
    model = GPT.from_pretrained(FIXTURE)
    assert model.config == SMALL
    assert np.array_equal(model.h[1].attn.c_attn.weight.detach().numpy(), values["model/h1/attn/c_attn/w"][0].T)
    assert np.array_equal(model.h[0].ln_2.bias.detach().numpy(), values["model/h0/ln_2/b"])


def test_to_hugging_face(tmp_path) -> None:
    """By `gpt2-model convert`, then loaded by transformers alone: bit for bit what TensorFlow wrote."""
    result = CliRunner().invoke(main, ["convert", str(FIXTURE), str(tmp_path)])
    assert result.exit_code == 0, result.output
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    values = fixture_values()
    weights = theirs.transformer.state_dict()
    for name, value in values.items():
        ours = name.removeprefix("model/").replace("/", ".")
        ours = f"h.{ours[1:]}" if ours.startswith("h") else ours
        for theirs_end, ours_end in ((".g", ".weight"), (".w", ".weight"), (".b", ".bias")):
            ours = ours.removesuffix(theirs_end) + ours_end if ours.endswith(theirs_end) else ours
        stored = weights[ours if "." in ours else f"{ours}.weight"].numpy()
        assert np.array_equal(stored, value[0] if value.ndim == 3 else value), name
    tokens = torch.randint(0, 40, (2, 8))
    with torch.no_grad():
        ours = GPT.from_pretrained(FIXTURE)(tokens)[0]
        torch.testing.assert_close(theirs.eval()(tokens).logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 1000, 2**20 + 3])
def test_checksum(length) -> None:
    data = np.random.default_rng(0).integers(0, 256, length, np.uint8)
    assert crc32c(data) == slow_crc32c(data.tobytes())
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_through_the_format(tmp_path, model, dtype) -> None:
    write_openai(tmp_path / "m", model, dtype=dtype)
    again = GPT.from_pretrained(tmp_path / "m")
    assert again.config == SMALL
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before.to(getattr(torch, dtype)).float(), after), name


@pytest.mark.parametrize("state", ["model-50", "/where/it/was/trained/model-50", "C:\\\\runs\\\\model-50"])
def test_the_checkpoint_that_the_state_file_names(tmp_path, model, state) -> None:
    write_openai(tmp_path / "m", model, name="model-50")
    (tmp_path / "m" / "checkpoint").write_text(f'model_checkpoint_path: "{state}"\n')
    assert torch.equal(GPT.from_pretrained(tmp_path / "m").wte.weight, model.wte.weight)


def test_any_flipped_byte_is_noticed(tmp_path) -> None:
    """A few of the index's bytes are never read; its blocks and the tensors have checksums."""
    shutil.copytree(FIXTURE, tmp_path / "m")
    whole = read_bundle(FIXTURE / "model.ckpt")
    index = tmp_path / "m" / "model.ckpt.index"
    original = index.read_bytes()
    refused = 0
    for position in range(0, len(original), 5):
        changed = bytearray(original)
        changed[position] ^= 0x40
        index.write_bytes(changed)
        try:
            tensors = read_bundle(tmp_path / "m" / "model.ckpt")
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            assert all(torch.equal(tensors[name], tensor) for name, tensor in whole.items())
    assert refused > 0.9 * len(original) / 5
    index.write_bytes(original)
    data = tmp_path / "m" / "model.ckpt.data-00000-of-00001"
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(ValueError, match="has changed since it was written"):
        GPT.from_pretrained(tmp_path / "m")


EMPTY_CRC = b"\x35" + masked_bytes(b"")
HOSTILE = {
    "behind_the_end": ({"lies": {"model/wte": {4: 2**40}}}, "ends behind the end of its data file"),
    "overlap": ({"lies": {"model/wpe": {4: 4}}}, "overlaps another tensor"),
    "size_and_shape": ({"lies": {"model/wte": {5: 4}}}, "does not fit its shape"),
    "huge_shape": (
        {"lies": {"model/wte": {2: proto((2, proto((1, 2**62))))}}}, "4611686018427387904 where a size should be"
    ),
    "many_dimensions": ({"lies": {"model/wte": {2: proto(*[(2, proto((1, 1)))] * 9)}}}, "9 dimensions"),
    "integers": ({"lies": {"model/wte": {1: 9}}}, "of type 9, not float"),
    "compressed": ({"compression": 1}, "it is compressed"),
    "big_endian": ({"raw": {b"": proto((1, 1), (2, 1))}}, "a big-endian checkpoint"),
    "shards": ({"raw": {b"": proto((1, 2**31))}}, "2147483648 files"),
    "other_shard": ({"lies": {"model/wte": {3: 1}}}, "names model.ckpt.data-00001-of-00001"),
    "unknown_tensor": (
        {"raw": {b"model/x": proto((1, 1), (2, proto((2, proto((1, 0))))), (4, 29440)) + EMPTY_CRC}},
        r"1 unknown \('x'",
    ),
    "garbage": ({"raw": {b"model/x": b"\xff" * 20}}, "longer than 64 bits"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bundles_are_refused(tmp_path, model, changes, message) -> None:
    write_openai(tmp_path / "m", model, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        GPT.from_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)


BROKEN = {
    "no_index": (lambda f: (f / "model.ckpt.index").unlink(), "no model.ckpt.index in it"),
    "no_data": (lambda f: (f / "model.ckpt.data-00000-of-00001").unlink(), "which is not beside it"),
    "empty_index": (lambda f: (f / "model.ckpt.index").write_bytes(b""), "is damaged or no TensorFlow index"),
    "large_index": (lambda f: (f / "model.ckpt.index").write_bytes(bytes(10**6 + 1)), "larger than any"),
    "path_upwards": (
        lambda f: (f / "checkpoint").write_text('model_checkpoint_path: "a/.."\n'), "names no checkpoint"
    ),
    "hparams": (lambda f: (f / "hparams.json").write_text('{"n_vocab": 40}'), "hparams.json should hold n_vocab"),
    "sizes": (
        lambda f: (f / "hparams.json").write_text(
            '{"n_vocab": 40, "n_ctx": 8, "n_embd": 16, "n_head": 2, "n_layer": 1000000000}'
        ),
        "speaks of 1000000000 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folders_are_refused(tmp_path, damage, message) -> None:
    shutil.copytree(FIXTURE, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_pretrained(tmp_path / "m")
