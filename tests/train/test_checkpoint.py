"""Damage in checkpoints is found before a tensor is used; the run goes back to the one before."""

import shutil
from pathlib import Path

import pytest
from tiny_run import TINY

from gpt2_train import TrainConfig, train
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


def test_all_files_may_be_read_by_whoever_may_read_the_first(run) -> None:
    (newest,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    assert {path.stat().st_mode for path in newest.iterdir()} == {(newest / "config.json").stat().st_mode}


def test_prune_counts_good_ones_only(run) -> None:
    flip_a_bit(newest(run) / "model.safetensors")
    prune(run, keep=1, verified=set())
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
