"""Damage in checkpoints is found before a tensor is used; the run goes back to the one before."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import TINY, fingerprint, losses

from gpt2_train import TrainConfig, find_checkpoint, train, verify_checkpoint
from gpt2_train.checkpoint import CannotResume, prune


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    train(TrainConfig(**TINY, data=str(dataset), out=str(out)))
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def newest(run) -> Path:
    return run / "checkpoints" / "step-00000012"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_manifest_does_not_reach_outside(run) -> None:
    path = newest(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../secret"] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    assert "'../../../secret', which is no plain file name" in verify_checkpoint(newest(run))[0]


def test_a_newer_format_is_refused_and_an_older_one_passed_over(run) -> None:
    path = newest(run) / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"format_version": 2', '"format_version": 1'))
    assert find_checkpoint(run)[0] == run / "checkpoints" / "step-00000008"
    path.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    assert "has checkpoint format 3; this program reads 2" in verify_checkpoint(newest(run))[0]
    with pytest.raises(CannotResume, match="was written by a newer gpt2-train .*: update gpt2-train"):
        find_checkpoint(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, "other settings \\(lr: 0.01 -> 0.001\\): choose another --out"),
        ({"grad_compression": "bf16"}, "other settings \\(grad_compression: none -> bf16\\): choose another"),
        ({"seed": 1, "batch_tokens": 32}, "batch_tokens: 64 -> 32; seed: 0 -> 1"),
        ({"model": {**TINY["model"], "n_layer": 1}}, r"\(n_layer: 2 -> 1\)"),
        ({"resume": "never"}, "holds a run, and --resume never was given"),
    ],
)
def test_another_run_is_not_mixed_in(dataset, run, changes, message) -> None:
    before = fingerprint(run, 12)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{**TINY, **changes, "steps": 14}, data=str(dataset), out=str(run)))
    assert fingerprint(run, 12) == before


def test_an_older_checkpoint_of_the_same_run_is_refused_beside_newer_ones(dataset, run, capsys) -> None:
    """It would be deleted as the oldest, and the newest would be gone on with by the next command."""
    config = {**TINY, "steps": 14, "data": str(dataset), "out": str(run)}
    older = run / "checkpoints" / "step-00000008"
    with pytest.raises(CannotResume, match="has gone on to step-00000012: choose another --out, or move"):
        train(TrainConfig(**config, resume=str(older)))
    with pytest.raises(CannotResume, match="is no checkpoint: name a folder like"):
        train(TrainConfig(**{**config, "out": f"{run}-b"}, resume=str(run)))
    # Another folder begins from it, and goes on with its own by the same command.
    branch = {**config, "out": f"{run}-b", "resume": str(older)}
    assert train(TrainConfig(**{**branch, "steps": 10})) == 0
    assert train(TrainConfig(**branch)) == 0
    said = capsys.readouterr().err
    assert f"resuming from {older}" in said
    assert f"resuming from {run}-b/checkpoints/step-00000010" in said
    assert "steps: 10 -> 14; the learning rate follows the new schedule from here on" in said
    assert "steps: 10 -> 14, which does not" not in said


def test_other_data_is_refused(tmp_path, run) -> None:
    from gpt2_data import BuildConfig, build

    (tmp_path / "t.jsonl").write_text('{"text": "another text altogether"}\n' * 40)
    build(
        BuildConfig(
            sources=(str(tmp_path / "t.jsonl"),), out=str(tmp_path / "d"), val_tokens=20, workers=1, order="source"
        )
    )
    with pytest.raises(ValueError, match="is not the dataset that .* was trained on"):
        train(TrainConfig(**{**TINY, "steps": 14}, data=str(tmp_path / "d"), out=str(run)))


def test_more_steps_go_on(dataset, run, capsys) -> None:
    train(TrainConfig(**{**TINY, "steps": 14}, data=str(dataset), out=str(run)))
    assert "steps: 12 -> 14; the learning rate follows the new schedule from here on" in capsys.readouterr().err
    assert [step for step, _ in losses(run)] == list(range(1, 15))


def test_all_files_may_be_read_by_whoever_may_read_the_first(run) -> None:
    (newest,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    assert {path.stat().st_mode for path in newest.iterdir()} == {(newest / "config.json").stat().st_mode}


def test_prune_counts_good_ones_only(run) -> None:
    flip_a_bit(newest(run) / "model.safetensors")
    prune(run, keep=1, verified=set())
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
