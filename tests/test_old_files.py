"""Datasets, runs and scores that version 0.1 wrote: read, verified, resumed and rebuilt by the code of today."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2_data import BuildConfig, TokenLoader, build, convert, open_dataset, verify
from gpt2_eval import evaluate_hellaswag, evaluate_loss
from gpt2_model import GPT, GPTConfig
from gpt2_train import find_checkpoint, verify_checkpoint

OLD = Path(__file__).parent / "fixtures" / "v0.1"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
BUILDS = {
    "uint16": {"order": "source"},
    "arrow": {"order": "shuffled", "seed": 3, "format": "arrow"},
}


def command(package, *arguments, cwd):
    words = [Path(sys.executable).parent / package, *arguments]
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    """A copy of all of it, in which the checkpoint has its tokenizer's files again."""
    shutil.copytree(OLD, tmp_path / "old")
    tiny = GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=2))
    tiny.save_pretrained(tmp_path / "tiny")
    for name in TOKENIZER_FILES:
        shutil.copy(tmp_path / "tiny" / name, tmp_path / "old" / "run" / "checkpoints" / "step-00000004" / name)
    return tmp_path / "old"


@pytest.mark.parametrize("name", BUILDS)
def test_a_dataset_verifies_and_is_known_as_built(folder, name) -> None:
    assert verify(folder / name, "full").ok
    before = {path: path.stat().st_mtime_ns for path in (folder / name).iterdir()}
    flags = [word for flag, value in BUILDS[name].items() for word in (f"--{flag}", str(value))]
    done = command(
        "gpt2-data", "build", "docs.jsonl", "--out", name, "--shard-size", "2k", "--val-tokens", "1k", *flags,
        "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["already_built"]
    assert {path: path.stat().st_mtime_ns for path in (folder / name).iterdir()} == before


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_today_has_the_same_bytes(folder, name) -> None:
    config = BuildConfig(
        [folder / "docs.jsonl"], folder / "new", shard_size=2000, val_tokens=1000, workers=1, **BUILDS[name]
    )
    build(config)
    names = {path.name for path in (OLD / name).iterdir()}
    assert {path.name for path in (folder / "new").iterdir()} == names
    for file in names - {"build.jsonl"}:
        assert (folder / "new" / file).read_bytes() == (OLD / name / file).read_bytes(), file


@pytest.mark.parametrize("to", ["npy", "llmc", "nanogpt", "megatron", "arrow"])
def test_a_conversion_today_has_the_same_bytes(folder, to) -> None:
    convert(folder / "uint16", folder / "converted", to)
    rows = [line.split() for line in (OLD / "converted.sha256").read_text().splitlines()]
    wanted = {path.partition("/")[2]: digest for digest, path in rows if path.startswith(f"{to}/")}
    assert wanted
    written = {path.name: path.read_bytes() for path in (folder / "converted").iterdir()}
    assert {name: hashlib.sha256(written[name]).hexdigest() for name in wanted} == wanted


def test_samples_of_a_loader_continue_from_its_old_state(folder) -> None:
    state = json.loads((OLD / "run/checkpoints/step-00000004/trainer.json").read_text())["loader"]
    begun = TokenLoader(folder / "uint16", "train", 4, 32, seed=0)
    for _ in range(4):
        next(begun)
    resumed = TokenLoader(folder / "uint16", "train", 4, 32, seed=0)
    resumed.restore(state)
    for ours, old in zip(next(begun), next(resumed), strict=True):
        assert (ours == old).all()


def test_a_checkpoint_verifies_byte_for_byte(folder) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step-00000004"
    verify_checkpoint(checkpoint)
    assert find_checkpoint(folder / "run") == (checkpoint, [])
    # Written again, the model's files are those of 0.1.
    GPT.from_pretrained(checkpoint).save_pretrained(folder / "again")
    hashes = json.loads((checkpoint / "manifest.json").read_text())["files"]
    for file in (folder / "again").iterdir():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == hashes[file.name]["sha256"], file.name


def test_a_run_resumes_from_its_own_config(folder) -> None:
    old = [json.loads(line) for line in (OLD / "run" / "metrics.jsonl").read_text().splitlines()]
    done = command("gpt2-train", "--config", "run/config.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "step-00000004" in done.stderr + done.stdout
    new = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "val_loss" in row) for row in new] == [(row["step"], "val_loss" in row) for row in old]
    for before, now in zip(old, new, strict=True):
        assert before.keys() <= now.keys()
        for name in {"loss", "val_loss", "grad_norm", "lr"} & before.keys():
            assert now[name] == pytest.approx(before[name], rel=1e-5), (name, now)
    weights = load_file(folder / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    for name, tensor in load_file(OLD / "after-step-8.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_scores_are_the_same_and_are_compared_with_today_s(folder) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step-00000004"
    old = [json.loads(line) for line in (OLD / "scores.jsonl").read_text().splitlines()]
    for before, now in zip(old, evaluate_hellaswag(GPT.from_pretrained(checkpoint), OLD / "items.jsonl").records,
                           strict=True):  # fmt: skip
        assert (before["ind"], before["label"], before["hash"]) == (now["ind"], now["label"], now["hash"])
        for protocol in ("karpathy", "lm-eval"):
            for kind, values in before[protocol].items():
                assert now[protocol][kind] == pytest.approx(values, abs=2e-4)
    command("gpt2-eval", "hellaswag", "-m", checkpoint, "--data", "items.jsonl", "--out", "n.jsonl", cwd=folder)
    done = command("gpt2-eval", "compare", "scores.jsonl", "n.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_an_evaluation_that_was_killed_goes_on(folder) -> None:
    """A score that was kept is taken as it is: one that is wrong on purpose shows it."""
    rows = (OLD / "scores.rows-0").read_text().replace("-32.45131874084473", "-1.0")
    (folder / ".n.jsonl.rows-0").write_text(rows)
    done = command(
        "gpt2-eval", "hellaswag", "-m", "run/checkpoints/step-00000004", "--data", "items.jsonl", "--out",
        "n.jsonl", "--batch-size", "2", "-d", "cpu", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (folder / "n.jsonl").read_text()
    assert len(text.splitlines()) == 6
    assert text.count("-1.0") == 1
    assert not list(folder.glob(".n.jsonl*"))


def test_loss_is_the_same(folder) -> None:
    model = GPT.from_pretrained(folder / "run" / "checkpoints" / "step-00000004")
    result = evaluate_loss(model, open_dataset(folder / "uint16"))
    assert result.loss == pytest.approx(10.812464017672273, rel=1e-6)
    assert result.tokens == 1023
