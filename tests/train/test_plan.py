"""`gpt2-train --dry-run`: its figures, its checks, and that it leaves nothing behind."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fork_server import start_ranks
from tiny_run import TINY, flags
from train_faults import SETTINGS, SHAPE

import gpt2_train.memory
from gpt2_model import flops_per_token
from gpt2_train import RECIPES, TrainConfig, load_config, train
from gpt2_train.cli import main
from gpt2_train.memory import check_space, checkpoint_bytes, checkpoints_at_once, most_that_fit, peak_memory

README = Path(__file__).parents[2] / "packages/gpt2-train/README.md"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def dry_run(data, out, *more: str, **changes):
    return CliRunner().invoke(main, [*flags(data, out, **changes), "--dry-run", *more])


def free_disk(monkeypatch, free: float) -> None:
    monkeypatch.setattr(gpt2_train.memory.shutil, "disk_usage", lambda _path: SimpleNamespace(free=int(free)))


def test_figures(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = dry_run(dataset, tmp_path / "run", "--json", micro_batch="auto", batch_tokens=128, peak_tflops=0.001)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    config = TrainConfig(**{**TINY, "batch_tokens": 128, "micro_batch": "auto"})
    shape = config.model_config
    assert plan["parameters"] == shape.num_parameters
    assert plan["tokens"] == 12 * 128
    assert plan["epochs"] == plan["tokens"] / plan["train_tokens"]
    assert (plan["processes"], plan["micro_batch"], plan["accumulation"]) == (2, 4, 1)
    assert plan["gradient_bytes_sent"] == 4 * shape.num_parameters  # 2 (n - 1) / n of them, 4 bytes each
    assert plan["flops"] == flops_per_token(shape, 16) * 12 * 128
    assert plan["flops_per_second"] == pytest.approx(0.7 * 1e9)
    assert plan["hours"] == pytest.approx(plan["flops"] / (2 * 0.7 * 1e9) / 3600)
    assert plan["memory"]["host_bytes"] == peak_memory(config, 4, 2, "cpu").host_bytes
    assert plan["checkpoints_at_once"] == 3  # steps 4, 8, 12; four could be there
    assert plan["problems"] == []
    assert "a run with WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT: use torchrun" in plan["warnings"]
    assert not (tmp_path / "run").exists()


def test_lines_and_a_measured_speed(dataset, tmp_path) -> None:
    result = dry_run(dataset, tmp_path / "run")
    assert result.exit_code == 0, result.output
    for fact in ("12 of 64 tokens, 768 in all", "1 on cpu, fp32", "1 x 4 x 16 tokens on each process",
                 "6 N + 6 L C T", "activations 0.1 MB", "copy for checkpoints 0.1 MB",
                 "3 at once: 12.4 MB of", "GFLOP/s of a matrix product, measured here"):  # fmt: skip
        assert fact in " ".join(result.stdout.split())
    assert "exchange" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_bytes_that_cross_the_processes(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    changes = {"grad_compression": "bf16", "micro_batch": "auto", "batch_tokens": 8 * 16, "peak_tflops": 1.0}
    size = 2 * 7 / 8 * 2 * TrainConfig(**TINY).model_config.num_parameters
    line = f"exchange      {size / 1e6:.1f} MB of gradients sent by each process in a step, in a ring"
    assert line in dry_run(dataset, tmp_path / "run", **changes).stdout.splitlines()


def test_checkpoint_size_is_that_of_a_checkpoint(dataset, tmp_path) -> None:
    settings = {**TINY, "steps": 1, "model": {**SHAPE, "vocab_size": 50257}}  # with the vocabulary's files
    train(TrainConfig(**settings, data=str(dataset), out=str(tmp_path)))
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step-00000001").iterdir())
    assert checkpoint_bytes(TrainConfig(**settings)) == pytest.approx(written, rel=0.05)


def test_a_folder_that_hides_the_hubs_model_is_said_before_the_run(dataset, tmp_path, monkeypatch) -> None:
    """build-nanogpt #103: `gpt2/` with a README was taken for --init gpt2, and --dry-run passed."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/README.md").touch()
    monkeypatch.chdir(tmp_path)
    result = dry_run(dataset, "run", init="gpt2", peak_tflops=1.0)
    assert result.exit_code == 1
    assert "only 'README.md'; if you mean the hub's gpt2, write gpt2@main" in result.stderr


def test_a_run_that_is_there_is_said(runs) -> None:
    result = dry_run(runs.data, runs.whole(), **SETTINGS, peak_tflops=1.0)
    assert result.exit_code == 0, result.output
    assert "which is done already: " in " ".join(result.stdout.split())


def test_what_is_unwise_is_a_warning(dataset, tmp_path) -> None:
    settings = {"steps": 10**7, "warmup": 10**7, "peak_tflops": 1e-6}
    result = dry_run(dataset, tmp_path / "run", **settings)
    assert result.exit_code == 0, result.output
    for words in ("each text is seen ", "never reaches its peak", "try --warmup 1000000", " days here"):
        assert words in result.stderr


def test_ranks_print_one_plan(dataset, tmp_path) -> None:
    words = flags(dataset, tmp_path / "run", micro_batch="auto", peak_tflops=1.0)
    first, second = start_ranks([*words, "--dry-run", "--json"], tmp_path / "log", 2)
    assert (first.wait(), second.wait()) == (0, 0)
    plan = json.loads(first.output())
    assert (plan["processes"], plan["micro_batch"]) == (2, 2)
    assert second.output() == ""


def test_space_for_the_checkpoints_that_will_be_there(tmp_path, monkeypatch) -> None:
    out = tmp_path / "new"
    config = TrainConfig(out=str(out), steps=100, checkpoint_every=10, keep=2)
    each = checkpoint_bytes(config)
    free_disk(monkeypatch, 3 * each)
    check_space(config)
    assert not out.exists()
    free_disk(monkeypatch, 3 * each - 1)
    message = "will need 4.49 GB for 3 checkpoints of 1.50 GB, and 4.49 GB are free: free some"
    with pytest.raises(OSError, match=message):
        check_space(config)
    # What the run's own take is given back as they are pruned.
    folder = out / "checkpoints/step-00000010"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0")
    check_space(config)


@pytest.mark.parametrize(
    ("steps", "every", "keep", "expected"), [(100, 10, 3, 4), (25, 10, 3, 3), (20, 10, 3, 2), (100, 0, 3, 1)]
)
def test_no_space_is_asked_for_that_is_not_needed(steps, every, keep, expected) -> None:
    assert checkpoints_at_once(TrainConfig(steps=steps, checkpoint_every=every, keep=keep)) == expected


def recipe_table() -> list[str]:
    """Peak memory of each recipe on one process, as the README has it: lines of Markdown."""
    lines = [
        "| recipe | parameters | 80 GB GPU, bf16, compiled | the same, activation checkpointing | CPU, fp32 |",
        "|---|---|---|---|---|",
    ]
    for name in RECIPES:
        config = TrainConfig(**load_config(recipe=name))
        cells = [name, f"{config.model_config.num_parameters / 1e6:,.0f}M"]
        for kind, precision, checkpointing in (
            ("cuda", "bf16", False), ("cuda", "bf16", True), ("cpu", "fp32", False)
        ):  # fmt: skip
            settings = replace(config, activation_checkpointing=checkpointing, precision=precision)
            micro_batch = most_that_fit(settings, 1, kind, 0.95 * 80e9 if kind == "cuda" else float("inf"))
            memory = peak_memory(settings, micro_batch, 1, kind)
            size = memory.device_bytes if kind == "cuda" else memory.host_bytes
            cells.append(f"{micro_batch} x {config.seq_len:,}: {size / 1e9:.1f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_readme_has_the_table() -> None:
    assert "\n".join(recipe_table()) in README.read_text()
