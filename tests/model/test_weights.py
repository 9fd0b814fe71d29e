"""Model folders: what is read and written, and the memory that this takes."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from gpt2_model import GPT, GPTConfig
from gpt2_model.cli import main

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    GPT(SMALL).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


OTHER = dataclasses.replace(SMALL, n_inner=48, activation_function="relu", tie_word_embeddings=False)


@pytest.mark.parametrize("config", [SMALL, OTHER])
def test_round_trip_is_bit_equal(tmp_path, config) -> None:
    model = GPT(config)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == config
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())


def test_half_precision_weights_become_the_asked_type(folder) -> None:
    half = {name: t.half() for name, t in safetensors.torch.load_file(folder / "model.safetensors").items()}
    safetensors.torch.save_file(half, folder / "model.safetensors")
    assert GPT.from_pretrained(folder).wte.weight.dtype == torch.float32
    assert GPT.from_pretrained(folder, dtype=torch.bfloat16).wte.weight.dtype == torch.bfloat16


def test_aliases_of_config_fields_and_a_file_beside_its_config(folder) -> None:
    text = (folder / "config.json").read_text()
    aliases = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_positions": "max_position_embeddings"}  # fmt: skip
    for name, alias in aliases.items():
        assert name in text
        text = text.replace(f'"{name}"', f'"{alias}"')
    (folder / "config.json").write_text(text)
    assert GPT.from_pretrained(folder / "model.safetensors").config == SMALL


def test_a_vocabulary_of_its_own_gets_no_gpt2_tokenizer(folder) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a model folder, a weights file nor a hub name"):
        GPT.from_pretrained(name)


def test_a_disk_that_fills_while_saving_leaves_the_old_files(folder, monkeypatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt2_model.command.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        GPT(SMALL).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_memory_of_loading_and_saving(tmp_path) -> None:
    """Loading: the file, mapped, and the model. Saving: one tensor more than the model. The rest is slack."""
    program = """
import resource, sys
from gpt2_model import GPT, GPTConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)).save_pretrained("small")
GPT.from_pretrained("small")
before = peak()
model = GPT.from_pretrained("large")
loaded = peak()
model.save_pretrained("again")
print(loaded - before, peak() - loaded)
"""
    GPT(GPTConfig(n_layer=4, n_head=8, n_embd=640, block_size=8)).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    loading, saving = map(int, result.stdout.split())
    assert loading < 2.3 * size
    assert saving < 0.3 * size


def test_a_runs_folder_stands_for_its_newest_whole_checkpoint(tiny_hf_folder, tmp_path, capsys) -> None:
    for step in (9, 10, 11):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        shutil.copytree(tiny_hf_folder, folder)
        (folder / "trainer.json").write_text(json.dumps({"step": step, "tokens": 512 * step}))
        if step < 11:  # which is still being written
            (folder / "manifest.json").write_text("{}")
    GPT(GPTConfig(16, 64, 1, 1, 16)).save_pretrained(tmp_path / "run/checkpoints/step-00000010")
    assert GPT.from_pretrained(tmp_path / "run").config.n_layer == 1
    result = CliRunner().invoke(main, ["info", str(tmp_path / "run"), "--json"])
    facts = json.loads(result.stdout)
    assert (facts["step"], facts["tokens"], facts["n_layer"]) == (10, 5120, 1)
    assert result.stderr.endswith(
        "using its newest checkpoint, " + str(tmp_path / "run/checkpoints/step-00000010\n")
    )
