"""TensorBoard and W&B: each step once after a resume, and a tracker that fails stops nothing."""

import os
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from run_rows import open_log, rows_of, train_row, write_run

from gpt2_train.config import TrainConfig
from gpt2_train.trackers import check_trackers


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path) -> None:
    with closing(open_log(tmp_path, tensorboard=True)) as log:
        write_run(log, 1, 12)
    killed = open_log(tmp_path, first_step=10, tensorboard=True)
    for step in range(11, 14):
        killed.train(train_row(step, loss=77.0))
    killed.flush()
    newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    killed.close()
    os.truncate(newest, newest.stat().st_size - 5)  # killed while it was written
    with closing(open_log(tmp_path, first_step=10, tensorboard=True)) as log:
        write_run(log, 11, 15)
    assert scalars(tmp_path, "train/loss") == [(step, pytest.approx(10 / step)) for step in range(1, 16)]
    assert scalars(tmp_path, "val/loss") == [(5, 3.0), (10, 3.0), (15, 3.0)]
    assert scalars(tmp_path, "train/tokens_per_second")[0] == (1, 2000.0)
    with closing(open_log(tmp_path, tensorboard=True)) as log:  # a fresh start in the same folder
        write_run(log, 1, 2)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2]


def scalars(folder: Path, tag: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class FakeRun:
    """A run of W&B as far as it is used: wandb.init returns it, `step` is the newest that it has."""

    def __init__(self, settings) -> None:
        self.settings, self.step, self.rows, self.finished, self.fails = settings, 0, [], False, None

    def log(self, values, step):
        if self.fails:
            raise self.fails
        assert step >= self.step
        self.step = step
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: runs by id, as its server keeps them."""
    module, runs = ModuleType("wandb"), {}
    module.__version__, module.Settings = "0", SimpleNamespace
    module.init = lambda **settings: runs.setdefault(settings["id"], FakeRun(settings))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return SimpleNamespace(module=module, runs=runs)


def test_wandb_goes_on_in_the_same_run(tmp_path, wandb) -> None:
    with closing(open_log(tmp_path, wandb="gpt2")) as log:
        write_run(log, 1, 12)
    with closing(open_log(tmp_path, first_step=10, wandb="gpt2")) as log:
        write_run(log, 11, 15)
    (run,) = wandb.runs.values()
    assert run.finished
    assert run.settings["project"] == "gpt2"
    assert run.settings["config"]["batch_tokens"] == 1000
    assert run.settings["dir"] == str(tmp_path)
    losses = [(step, row["train/loss"]) for step, row in run.rows if "train/loss" in row]
    assert losses[:11] == [(step, 10.0 / step) for step in range(1, 12)]
    assert losses[-1] == (15, 10.0 / 15)
    assert (15, {"val/loss": 3.0}) in run.rows
    open_log(tmp_path, wandb="gpt2").close()
    assert len(wandb.runs) == 2  # a fresh start is another run


def test_wandb_that_fails_stops_nothing_and_tells_no_secret(tmp_path, wandb, capfd, monkeypatch) -> None:
    """tests/faults/test_train_hangs.py has secrets of whole runs, which W&B, absent there, takes no part in."""
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "0123456789" + name)
    with closing(open_log(tmp_path, tensorboard=True, wandb="gpt2")) as log:
        log.train(train_row(1))
        (run,) = wandb.runs.values()
        run.fails = ConnectionError("no route for\n0123456789WANDB_API_KEY or 0123456789HF_TOKEN")
        write_run(log, 2, 6)
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if "warning" in line] == [
        "warning: W&B failed (ConnectionError: no route for <WANDB_API_KEY> or <HF_TOKEN>): the run continues "
        "without it; metrics.jsonl has all rows"
    ]
    assert len(rows_of(tmp_path)) == 7
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) >= 4
    assert [name for name, content in files.items() if b"0123456789" in content] == []
    assert "0123456789" not in said + repr(run.settings) + repr(run.rows)


def test_a_tracker_that_failed_is_tried_again_at_the_next_checkpoint(tmp_path, wandb, capsys) -> None:
    """The kind of prime-rl #1763: a tracker that is away for a while, at any call, costs no run and few values."""
    with closing(open_log(tmp_path, wandb="gpt2")) as log:
        (run,) = wandb.runs.values()
        for step in range(1, 10):
            run.fails = OSError(f"no network at step {step}") if 2 <= step <= 5 else None
            log.train(train_row(step))
            if step % 3 == 0:
                log.flush()
    assert [step for step, _ in run.rows] == [1, 7, 8, 9]
    assert capsys.readouterr().err.count("warning") == 1


def test_wandb_that_does_not_start_ends_a_fresh_run_alone(tmp_path, wandb, capsys) -> None:
    def fail(**_):
        raise PermissionError("No API key configured.\nUse `wandb login`")

    wandb.module.init = fail
    with pytest.raises(
        ValueError, match="W&B does not start .*No API key configured. Use `wandb login`"
    ) as caught:
        open_log(tmp_path, wandb="gpt2")
    assert "\n" not in str(caught.value)
    with closing(open_log(tmp_path, first_step=3, wandb="gpt2")) as log:
        log.train(train_row(4))
    assert "warning: W&B does not start" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_at_the_start(tmp_path, monkeypatch, name) -> None:
    settings = {name: True if name == "tensorboard" else "p"}
    folder_of_that_name = ModuleType(name)
    for there in (None, folder_of_that_name):
        monkeypatch.setitem(sys.modules, name, there)
        with pytest.raises(ValueError, match=f"--{name} needs .* pip install {name}$"):
            check_trackers(TrainConfig(**settings))
        with pytest.raises(ValueError, match=f"--{name} needs .* pip install {name}$"):
            open_log(tmp_path, **settings)
