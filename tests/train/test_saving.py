"""Checkpoints are written beside training: of a copy, one at a time, and nothing is lost when that fails."""

import threading

import pytest
import torch
from tiny_run import TINY, fingerprint

from gpt2_model import GPT
from gpt2_train import TrainConfig, checkpoint, find_checkpoint, loop, train, verify_checkpoint
from gpt2_train.checkpoint import Saver
from gpt2_train.distributed import World
from gpt2_train.optimizer import make_optimizers

WORLD = World(0, 1, torch.device("cpu"))
TRAINER = {"updates": 1, "loader": {}, "guard": {}, "dataset": "", "config": {}}


@pytest.fixture
def model() -> GPT:
    return GPT(TrainConfig(**TINY).model_config)


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Writing waits until this event is set."""
    event, write = threading.Event(), checkpoint.write_checkpoint

    def wait_first(*arguments) -> object:
        assert event.wait(30)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", wait_first)
    return event


def test_what_is_written_is_the_state_at_the_save(model, tmp_path, held) -> None:
    optimizers = make_optimizers(model, TrainConfig(**TINY))
    saver, before = Saver(tmp_path, 3, WORLD), {name: t.clone() for name, t in model.state_dict().items()}
    saver.save(1, model, optimizers, TRAINER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    held.set()
    saver.wait()
    assert saver.take_error() is None
    saved = GPT.from_pretrained(tmp_path / "checkpoints" / "step-00000001").state_dict()
    for name, tensor in before.items():
        assert torch.equal(saved[name], tensor), name


def test_training_goes_on_while_a_checkpoint_is_written(dataset, tmp_path, held, monkeypatch) -> None:
    """The second checkpoint waits for the first; the steps between them do not."""
    stepped, update = [], loop._update

    def count(run) -> None:
        update(run)
        stepped.append(run.step)
        if run.step == 8:
            held.set()

    monkeypatch.setattr(loop, "_update", count)
    assert train(TrainConfig(**TINY, data=str(dataset), out=str(tmp_path))) == 0
    assert stepped == list(range(1, 13))
    assert [verify_checkpoint(checkpoint.checkpoint_folder(tmp_path, step)) for step in (4, 8, 12)] == [[], [], []]


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("a bug"), MemoryError()])
def test_the_loop_learns_of_a_failed_save_at_the_next_step(dataset, tmp_path, monkeypatch, error) -> None:
    write = checkpoint.write_checkpoint

    def fail_at_8(run, step, *rest) -> object:
        if step == 8:
            raise error
        return write(run, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", fail_at_8)
    with pytest.raises(OSError, match="no space|saving failed: "):
        train(TrainConfig(**{**TINY, "steps": 400}, data=str(dataset), out=str(tmp_path)))
    found, problems = find_checkpoint(tmp_path)
    assert (found, problems) == (checkpoint.checkpoint_folder(tmp_path, 4), [])
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") <= 12  # the next one is due


def test_a_run_may_go_on_without_one_checkpoint_but_not_without_the_last(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    write, failing = checkpoint.write_checkpoint, {4}

    def fail(run, step, *rest) -> object:
        if step in failing:
            raise OSError("no space left")
        return write(run, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", fail)
    config = TrainConfig(**TINY, data=str(dataset), out=str(tmp_path), on_save_error="continue")
    assert train(config) == 0
    assert "no space left; training continues" in capsys.readouterr().err
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-00000008", "step-00000012"]
    failing.add(14)
    with pytest.raises(OSError, match="no space left"):
        train(TrainConfig(**{**TINY, "steps": 14}, data=str(dataset), out=str(tmp_path), on_save_error="continue"))


def test_a_disk_that_gives_back_something_else_is_noticed(model, tmp_path, monkeypatch) -> None:
    optimizers, saver = make_optimizers(model, TrainConfig(**TINY)), Saver(tmp_path, 1, WORLD)
    saver.save(1, model, optimizers, TRAINER)
    saver.wait()
    before, fsync = fingerprint(tmp_path, 1), checkpoint._fsync

    def flip_a_bit(path) -> None:
        fsync(path)
        if path.name == "model.safetensors":
            data = bytearray(path.read_bytes())
            data[-5] ^= 4
            path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "_fsync", flip_a_bit)
    saver.save(2, model, optimizers, TRAINER)
    saver.wait()
    assert "the disk does not give back what was written: " in str(saver.take_error())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert fingerprint(tmp_path, 1) == before


def test_weights_that_are_not_finite_push_out_no_checkpoint(model, tmp_path) -> None:
    optimizers, saver = make_optimizers(model, TrainConfig(**TINY)), Saver(tmp_path, 1, WORLD)
    saver.save(1, model, optimizers, TRAINER)
    saver.wait()
    with torch.no_grad():
        model.h[1].mlp.c_fc.bias[3] = float("nan")
    saver.save(2, model, optimizers, TRAINER)
    saver.wait()
    assert "h.1.mlp.c_fc.bias is not finite at step 2" in str(saver.take_error())
    assert find_checkpoint(tmp_path)[0] == checkpoint.checkpoint_folder(tmp_path, 1)


def test_older_checkpoints_go_only_after_the_new_one_was_read_back(dataset, tmp_path, monkeypatch) -> None:
    order = []
    verify, remove = checkpoint.verify_checkpoint, checkpoint._remove
    monkeypatch.setattr(
        checkpoint, "verify_checkpoint", lambda f: (order.append(("verify", f.name)), verify(f))[1]
    )
    monkeypatch.setattr(checkpoint, "_remove", lambda f: (order.append(("remove", f.name)), remove(f))[1])
    train(TrainConfig(**TINY, data=str(dataset), out=str(tmp_path), keep=1))
    assert order == [
        ("verify", ".tmp-step-00000004"),
        ("verify", ".tmp-step-00000008"), ("remove", "step-00000004"),
        ("verify", ".tmp-step-00000012"), ("remove", "step-00000008"),
    ]  # fmt: skip


def test_the_copy_is_made_once(model, tmp_path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        Saver, "_allocate", lambda self, *a, original=Saver._allocate: (made.append(1), original(self, *a))
    )
    optimizers, saver = make_optimizers(model, TrainConfig(**TINY)), Saver(tmp_path, 2, WORLD)
    for step in (1, 2, 3):
        saver.save(step, model, optimizers, TRAINER)
        saver.wait()
        assert saver.take_error() is None
    assert made == [1]
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
