"""Checkpoints as people have them, from public reports: wrapped names, containers, other scripts' files, pointers.

Unless a test says otherwise, a model loads when its weights come back bit for bit.
"""

import json
import os
import sys
from collections import OrderedDict
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_files import HEAD, WTE, as_file, refused, tensors_of
from click.testing import CliRunner

from gpt2_model import GPT, GPTConfig
from gpt2_model.checkpoints.huggingface import _NEUTRAL, read_config
from gpt2_model.cli import main


def assert_loads(path: Path, model: GPT) -> None:
    loaded = GPT.from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_only_the_heads_name_of_a_tied_pair(folder, model) -> None:
    """transformers #38870, accelerate #2875: safetensors' save_model stores a shared tensor once."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    safetensors.torch.save_model(theirs, str(folder / "model.safetensors"))
    assert HEAD in tensors_of(folder)
    assert WTE not in tensors_of(folder)
    assert_loads(folder, model)
    huge = tensors_of(folder) | {HEAD: torch.zeros(1, 32).expand(10**6, 32)}
    as_file(folder, huge)  # as the embedding's, its bytes are counted
    refused(folder, "bytes of tensors, more than it has")


def test_a_tied_pair_in_two_types(folder) -> None:
    """transformers #38870: one of the pair was converted. Equal values are the same model, others are not."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    safetensors.torch.save_file(tensors | {HEAD: tensors[WTE].float()}, folder / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(folder).wte.weight, tensors[WTE].float())
    safetensors.torch.save_file(tensors | {HEAD: tensors[WTE].float() + 1e-6}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        GPT.from_pretrained(folder)
    safetensors.torch.save_file(tensors | {HEAD: tensors[WTE].int()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        GPT.from_pretrained(folder)


def inside(wrapper: str):
    """Names as if each block, or its attention, had been wrapped."""
    return lambda name: name.replace(".attn.", f".{wrapper}attn.").replace(".mlp.", f".mlp.{wrapper}")


NAMES = {
    "opacus": lambda name: f"_module.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{inside('_fsdp_wrapped_module.')(name)}",
    "activation_checkpointing": inside("_checkpoint_wrapped_module."),
    "lightning": lambda name: f"model.{name}",
    "lightning_of_compiled": lambda name: f"model._orig_mod.{name}",
    "blocks_compiled": inside("_orig_mod."),
    "all": lambda name: (
        f"module._orig_mod.model.{inside('_fsdp_wrapped_module._checkpoint_wrapped_module.')(name)}"
    ),
    "an_attribute": lambda name: f"student.net.{name}",
    "bare": lambda name: name.removeprefix("transformer."),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES.keys())
def test_names_of_wrappers_anywhere(folder, model, rename) -> None:
    """dp-transformers #33, pytorch #74810: what wraps a module adds to the names of its weights."""
    tensors = tensors_of(folder)
    tensors |= {HEAD: tensors[WTE].clone(), "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    wrapped = {rename(name): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(wrapped, folder / "model.safetensors")
    assert_loads(folder, model)
    twice = {"model." + rename("transformer.ln_f.bias"): torch.zeros(32)}
    safetensors.torch.save_file(wrapped | twice, folder / "model.safetensors")
    refused(folder, "holds 'ln_f.bias' twice, under different prefixes")


CONTAINERS = {
    "lightning.ckpt": lambda w: {
        "epoch": 3, "pytorch-lightning_version": "2.5.0", "optimizer_states": [{"state": {0: w["model." + HEAD]}}],
        "state_dict": w, "hyper_parameters": {"lr": 1e-3}, "loops": None, "callbacks": {"a": {"b": torch.ones(1)}},
    },
    "script.pt": lambda w: {"model_state_dict": w, "optimizer_state_dict": {}, "epoch": 1, "loss": 3.2},
    "mp_rank_00_model_states.pt": lambda w: {"module": OrderedDict(w), "ds_version": "0.14", "optimizer": None},
    "pytorch_model.bin": lambda w: {"model": {"state_dict": w, "step": 3}, "args": None},
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("name", "wrap"), CONTAINERS.items(), ids=CONTAINERS.keys())
def test_weights_inside_a_dict_of_a_training_script(folder, model, name, wrap, zipped) -> None:
    """dp-transformers #33, pytorch #74810: Lightning's, DeepSpeed's and everybody's torch.save({...})."""
    tensors = tensors_of(folder)
    weights = {f"model.{name}": tensor for name, tensor in (tensors | {HEAD: tensors[WTE]}).items()}
    assert_loads(as_file(folder, wrap(weights), name, _use_new_zipfile_serialization=zipped), model)


def test_two_sets_of_weights_in_a_file_are_refused(folder) -> None:
    """dp-transformers #33: which one is meant cannot be known."""
    tensors = tensors_of(folder)
    refused(as_file(folder, {"model": tensors, "module": tensors}), "holds weights under model and module")
    endless: dict = {"epoch": 1}
    endless["model"] = endless
    refused(as_file(folder, endless), "holds 'epoch': int, not only tensors")


def script_class(monkeypatch, module: str, *names: str) -> type:
    """The GPTConfig of a script, which pickle finds by its module."""
    fields = names or ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    kind = make_dataclass("GPTConfig", fields, namespace={"__module__": module})
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules[module], "GPTConfig", kind, raising=False)
    return kind


def linear(model: GPT, vocabulary: int) -> dict[str, torch.Tensor]:
    """Weights as nn.Linear has them, the embedding padded and tied."""
    weights = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    weights[WTE] = weights[HEAD] = torch.nn.functional.pad(weights[WTE], (0, 0, 0, vocabulary - len(weights[WTE])))
    return weights


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
@pytest.mark.parametrize(("vocabulary", "kept"), [(100, 100), (50304, 50257)])
def test_build_nanogpts_own_checkpoint(tmp_path, monkeypatch, module, vocabulary, kept) -> None:
    """build-nanogpt, train_gpt2.py: log/model_19072.pt has its config as an object of the script's class."""
    model = GPT(GPTConfig(16, kept, 2, 2, 32))
    config = script_class(monkeypatch, module)(16, vocabulary, 2, 2, 32)
    content = {"model": linear(model, vocabulary), "config": config, "step": 19072, "val_loss": 3.08}
    path = as_file(tmp_path, content, "model_19072.pt")
    monkeypatch.undo()
    assert GPT.inspect(path) == model.config
    assert_loads(path, model)
    assert CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out")]).exit_code == 0
    assert_loads(tmp_path / "out", model)


class Reduced:
    """Unpickled in the usual way, it calls a function, and may set a state."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


def deep(levels: int) -> list:
    nested: list = []
    for _ in range(levels):
        nested = [nested]
    return nested


SIZES = {"block_size": 16, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}
HOSTILE = {
    "reduce": (lambda kind, evil: Reduced(kind, (evil,)), "it asks for '(posix|nt).system'"),
    "argument": (lambda kind, evil: Reduced(kind, ("rm -rf ~",)), "is damaged, or holds more than tensors"),
    "state": (lambda kind, evil: kind(evil, 100, 2, 2, 32), "it asks for '(posix|nt).system'"),
    "class": (lambda kind, evil: Reduced(kind, (), ({}, {"__class__": dict})), "is damaged, or holds more"),
    "setstate": (lambda kind, evil: Reduced(kind, (), SIZES | {"__setstate__": print, "n_head": 3}),
                 "builtins.print|it asks for 'print'"),
    "other_name": (lambda kind, evil: Reduced(make_dataclass, ("A", [])), "asks for 'dataclasses.make_dataclass'"),
    "float": (lambda kind, evil: kind(16, 100, 2, 2.0, 32), "n_head must be a positive whole number, not 2.0"),
    "tensor": (lambda kind, evil: kind(16, 100, torch.ones(2), 2, 32), "n_layer must be a positive whole number"),
    "deep": (lambda kind, evil: Reduced(kind, (), SIZES | {"n_head": deep(300)}), "n_head must be|recursion"),
    "huge": (lambda kind, evil: kind(16, 100, 10**4000, 2, 32), "holds more than tensors; nothing was run"),
    "scalar": (lambda kind, evil: kind(16, 50304, 2, 2, 32), r"wte.weight has shape \(\), the config says"),
    "none": (lambda kind, evil: Reduced(kind, ()), r"of a known layout: see \['block_size'"),
    "fork": (lambda kind, evil: Reduced(kind, (), SIZES | {"rope": 1}), r"of a known layout: see \['rope'\]"),
    "keys": (lambda kind, evil: Reduced(kind, (), SIZES | {3: 1, "a": 2}), r"of a known layout: see \[3, 'a'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_object_under_that_name_is_harmless(tmp_path, monkeypatch, model, make, message, zipped) -> None:
    """build-nanogpt, model_19072.pt: the name of the script's class gives a file nothing but plain data."""
    canary = tmp_path / "it-ran"
    config = make(script_class(monkeypatch, "__main__"), Reduced(os.system, (f"touch {canary}",)))
    weights = linear(model, 100)
    if getattr(config, "vocab_size", None) == 50304:
        weights[WTE] = weights[HEAD] = torch.tensor(1.0)
    content = {"model": weights, "config": config}
    refused(as_file(tmp_path, content, "model.pt", _use_new_zipfile_serialization=zipped), message)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_fp64_is_converted_and_integers_are_refused(folder, model, kind) -> None:
    """numpy's default type, from a script that averaged checkpoints."""
    double = {name: tensor.double() for name, tensor in tensors_of(folder).items()}

    def save(tensors: dict) -> None:
        if kind == "bin":
            as_file(folder, tensors)
        else:
            safetensors.torch.save_file(tensors, folder / "model.safetensors")

    save(double)
    assert_loads(folder, model)
    assert GPT.from_pretrained(folder, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save(double | {WTE: double[WTE].to(dtype)})
        refused(folder, f"wte.weight is {dtype}; it must be fp32, fp16 or bf16, or fp64")
        save(double | {HEAD: double[WTE].to(dtype)})
        refused(folder, "lm_head.weight differs from wte.weight")


FAMILIES = ("Bert", "Llama", "GPTNeo", "GPTNeoX", "OPT", "Bloom", "T5", "Gemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_other_families_are_named_and_change_nothing(folder, family, capsys) -> None:
    """transformers' GPT2Config takes any field, and its GPT-2 reads none of those that other families have."""
    own = json.loads((folder / "config.json").read_text())
    other = getattr(transformers, f"{family}Config")().to_dict()
    foreign = {name: value for name, value in other.items() if value is not None
               and name not in transformers.GPT2Config.attribute_map and name != "is_encoder_decoder"}  # fmt: skip
    text = json.dumps(foreign | own | {"use_alibi": True, "layer_norm_eps": 0.5})
    (folder / "config.json").write_text(text)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 100, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(folder)(ids)[0], theirs(ids).logits, rtol=0, atol=1e-4)
    GPT.inspect(folder)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "config.json" in line]
    assert line.startswith(f"warning: {folder}/config.json: ignored, as transformers does for GPT-2: ")
    assert "layer_norm_eps" in line


@pytest.mark.parametrize("field", [{"is_causal": False}, {"sliding_window": 4}, {"attention_chunk_size": 4}])
def test_fields_that_transformers_reads_for_any_family_are_refused(folder, field) -> None:
    """They are in no GPT2Config, but its mask and its cache read them: the logits of cached steps are others."""
    ids = torch.randint(0, 100, (1, 12))

    def stepwise() -> torch.Tensor:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            first = theirs(ids[:, :8], use_cache=True)
            rest = theirs(ids[:, 8:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, rest.logits], dim=1)

    before = stepwise()
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | field))
    assert (stepwise() - before).abs().max() > 0.01
    (name,) = field
    assert name in _NEUTRAL
    refused(folder, f"{name} = .* is not supported")


def test_a_warning_about_hostile_fields_is_one_short_line(folder, capsys) -> None:
    own = json.loads((folder / "config.json").read_text())
    odd = {f"x\n\x1b[2J{number}" + "y" * 1000: 1 for number in range(1000)}
    (folder / "config.json").write_text(json.dumps(own | odd))
    read_config(folder / "config.json")
    err = capsys.readouterr().err
    assert len(err) < 3000
    assert err.rstrip("\n").isprintable()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 548105171\n"
POINTED = ("model.safetensors", "pytorch_model.bin", "ckpt.pt", "config.json", "tokenizer.json", "merges.txt",
           "model.safetensors.index.json", "model-00001-of-00001.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", POINTED)
def test_a_git_lfs_pointer_is_named(folder, name) -> None:
    """transformers #27923: a clone without git-lfs has a text of three lines in each large file's place."""
    if "ind" in name or "0001" in name:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(["a"], "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    path = folder / name if name == "ckpt.pt" else folder
    refused(path, f"{name} is a git-lfs pointer, not the file: run git lfs pull")


def test_a_folder_or_file_that_hides_a_model_of_the_hub(tmp_path, monkeypatch) -> None:
    """build-nanogpt #103: a folder called gpt2 is taken for the model, and it holds none."""
    monkeypatch.chdir(tmp_path)
    hint = "; if you mean the hub's {0}, write {0}@main$"
    Path("gpt2").mkdir()
    refused("gpt2", "^gpt2 holds no weights: no model.safetensors, .* in it, it is empty" + hint.format("gpt2"))
    Path("gpt2/README.md").touch()
    refused("gpt2", "in it, only 'README.md'; if you")
    Path("openai-community/gpt2").mkdir(parents=True)
    refused("openai-community/gpt2", hint.format("openai-community/gpt2"))
    Path("distilgpt2").write_text("notes")
    refused("distilgpt2", "is not a weights file of .*" + hint.format("distilgpt2"))
    for name in ("model.bin", "notes.txt"):
        torch.save({"a": torch.zeros(1)}, name)
        refused(name, "it has no config.json$")
    for path in ("./gpt2", "gpt2/", tmp_path / "gpt2"):
        refused(path, "in it, only 'README.md'$")
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached|could not be downloaded"):
        GPT.inspect("gpt2@main")  # the folder is not in its way


FOLDERS = {
    "model.safetensors": "holds no weights",
    "config.json": "has no config.json",
    "a.safetensors": "Is a direc",
}


@pytest.mark.parametrize(("name", "message"), FOLDERS.items(), ids=FOLDERS.keys())
def test_a_folder_in_a_files_place_is_one_line(folder, name, message) -> None:
    index = {"weight_map": {"a": "a.safetensors"}}
    if name == "a.safetensors":
        as_file(folder, {}, "unused.pt")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    refused(folder, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_one_line(tmp_path, value) -> None:
    model = GPT(GPTConfig(16, 50257, 1, 2, 32))
    with torch.no_grad():
        model.ln_f.weight[3] = value
    model.save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["generate", "-m", str(tmp_path), "Hi"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_names_that_are_not_utf8(tmp_path, kind) -> None:
    """llama_index #10369, medusa #8364: "surrogates not allowed". safetensors and torch take UTF-8 names only."""
    named, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"out-\xe9")
    GPT(GPTConfig(16, 50257, 1, 2, 32)).save_pretrained(named)
    if kind.endswith("bin"):
        as_file(named, tensors_of_bytes(named))
    generate = ["generate", "-m", named, "--max-new-tokens", "2", "Hi"]
    for command in (["info", named], generate, ["convert", named, out], ["info", out]):
        result = CliRunner().invoke(main, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
    missing = CliRunner().invoke(main, ["info", str(tmp_path / os.fsdecode(b"no\xe9"))])
    assert missing.exit_code == 1
    assert missing.stderr.count("\n") == 1


def tensors_of_bytes(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "model.safetensors").read_bytes())
