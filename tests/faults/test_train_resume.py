"""T9, T10, T12, T16, T19: going on at another number of ranks, time, place or setting; never beside another."""

import hashlib
import os
import re
import signal
import socket
import time

import numpy as np
import pytest
from train_faults import SETTINGS, SHAPE, checkpoint, good_steps, outcome, rows, snapshot, steps_of, wait_until

from gpt2_data import convert, open_dataset
from gpt2_train import TrainConfig
from gpt2_train.config import CannotResume
from gpt2_train.start import starting_point


def tokens_of_steps(path, ranks) -> dict[int, str]:
    """Return, by step, the SHA-256 of the rows of tokens that it trained on, over all ranks, in any order."""
    by_step = {}
    for rank in range(ranks):
        for line in path.with_name(f"{path.name}.{rank}").read_text().splitlines():
            step, row = line.split(" ", 1)
            by_step.setdefault(int(step), []).append(row)
    return {step: hashlib.sha256("".join(sorted(rows)).encode()).hexdigest() for step, rows in by_step.items()}


def assert_close(out, whole, fields=("loss",)) -> None:
    """The same losses but for the rounding of a sum."""
    for field in fields:
        ours, theirs = ([(row["step"], row[field]) for row in rows(run, field)] for run in (out, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "shard"),
    [((1, 2, 1), False), ((2, 4, 1), True)],
    ids=str,
)
def test_on_another_number_of_ranks(tmp_path, runs, path, shard) -> None:
    """The same sequences each step, losses that differ by the rounding of a sum; only rank 0 writes."""
    out, whole, seen, changes = tmp_path / "run", tmp_path / "whole", {}, {"steps": 24}
    assert runs.run(whole, ("record_tokens", {"path": str(tmp_path / "tokens")}), **changes) == 0
    changes |= {"shard_optimizer": True} if shard else {}
    for ranks, stop in zip(path, (8, 16, 24), strict=True):
        tokens = tmp_path / f"tokens-{stop}"
        faults = [("change_nothing", {"folder": str(out), "rank": rank}) for rank in range(1, ranks)]
        faults.append(("record_tokens", {"path": str(tokens)}))
        if stop != 24:
            faults.append(("in_update", {"step": stop, "do": "SIGTERM", "rank": ranks - 1}))
        codes = runs.codes(runs.begin(out, *faults, ranks=ranks, **changes))
        assert codes == [0 if stop == 24 else 143] * ranks, runs.said(out)
        seen.update(tokens_of_steps(tokens, ranks))
    assert seen == tokens_of_steps(tmp_path / "tokens", 1)
    assert_close(out, whole, ("loss", "val_loss"))


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_another_micro_batch(tmp_path, runs, micro_batch) -> None:
    out = runs.wind_back(tmp_path / "run", 54)
    assert runs.run(out, micro_batch=micro_batch) == 0
    assert_close(out, runs.whole())


def test_the_clock_goes_back_a_day(tmp_path, runs) -> None:
    out = tmp_path / "run"
    jump = ("clock_jumps", {"step": 10})
    assert runs.run(out, jump, ("in_update", {"step": 20, "do": "SIGKILL"})) == -9
    # The times of the files say the opposite of the steps.
    now, good = time.time(), good_steps(out)
    for step in good:
        for path in (checkpoint(out, step), *checkpoint(out, step).iterdir()):
            os.utime(path, (now - 1000 * step, now - 1000 * step))
    runs.must_finish_as_whole(out, ("clock_jumps", {"step": 25}))
    assert f"resuming from {checkpoint(out, good[-1])}" in runs.said(out)
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows(out))
    assert all(row["seconds"] > 0 for row in rows(out, "val_loss"))


def test_a_second_trainer_is_refused_by_the_name_of_the_first(tmp_path, runs) -> None:
    out = tmp_path / "run"
    (first,) = runs.begin(out, ("in_update", {"step": 8, "do": "sleep"}))
    wait_until(lambda: 6 in steps_of(out))
    for ranks in (1, 2):
        says = [f"{out} is in use by process {first.pid} on {socket.gethostname()}"]
        runs.fail(out, ranks=ranks, says=says, log=tmp_path / f"second-{ranks}.log")
    first.send(signal.SIGKILL)
    first.wait()
    # Two at the same moment: one of them trains, and the other is refused, whoever comes first.
    both = [runs.begin(out, log=tmp_path / log)[0] for log in ("a.log", "b.log")]
    assert sorted(child.wait() for child in both) == [0, 1]
    runs.must_finish_as_whole(out)


def test_another_lr_ends_with_2_and_leaves_all_as_it_was(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run")
    before = snapshot(out / "checkpoints")
    says = ["batch_tokens: 64 -> 32; lr: 0.01 -> 0.5", "choose another --out"]
    runs.fail(out, code=2, says=says, batch_tokens=32, lr=0.5)
    # At the last step there are none more.
    assert "done: step 60" in runs.must_finish_as_whole(out)
    assert snapshot(out / "checkpoints") == before


def test_an_older_checkpoint_of_the_same_run_is_refused_beside_newer_ones(tmp_path, runs) -> None:
    """It would be deleted as the oldest, and the next command would resume from the newest."""
    out, branch = runs.wind_back(tmp_path / "run"), tmp_path / "branch"
    older = checkpoint(out, 54)
    says = ["already has step-00000060: choose another --out, or move"]
    runs.fail(out, code=2, says=says, resume=older)
    runs.fail(branch, code=2, says=[f"name a folder like {checkpoint(out, 60)}"], resume=out)
    # Another folder begins from it, and goes on with its own by the same command.
    assert runs.run(branch, resume=older, steps=56) == 0
    assert runs.run(branch, resume=older, steps=58) == 0
    said = runs.said(branch)
    assert f"resuming from {older}" in said
    assert f"resuming from {checkpoint(branch, 56)}" in said
    assert "steps: 56 -> 58; the learning rate follows the new schedule from here on" in said
    assert "steps: 56 -> 58, which changes nothing" not in said


def test_other_data_is_refused(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run")
    for name in ("train", "val"):
        np.arange(200, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    convert(tmp_path, tmp_path / "data", "llmc")
    settings = {**SETTINGS, "model": SHAPE, "data": str(tmp_path / "data"), "out": str(out)}
    with pytest.raises(ValueError, match="is not the dataset that .* was trained on"):
        starting_point(TrainConfig(**settings), open_dataset(tmp_path / "data"))


MATHS = {
    "lr": 0.02, "min_lr": 2e-3, "warmup": 4, "schedule": "wsd", "decay_steps": 7, "batch_tokens": 32, "seq_len": 8,
    "order": "sequential", "optimizer": "muon", "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.8, "eps": 1e-7,
    "grad_clip": 2.0, "seed": 1, "grad_compression": "bf16", "precision": "bf16", "spike_sigma": 6.0,
    "n_layer": 3, "vocab_size": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", MATHS)
def test_a_setting_that_changes_the_maths_is_refused_by_name(runs, name) -> None:
    """By the check of the start itself, which --dry-run makes too."""
    settings = {**SETTINGS, "data": str(runs.data), "out": str(runs.whole()), "model": dict(SHAPE)}
    before = TrainConfig(**settings)
    old = SHAPE[name] if name in SHAPE else getattr(before, name)
    (settings["model"] if name in SHAPE else settings)[name] = MATHS[name]
    text = re.escape(f"{name}: {old} -> {MATHS[name]}")
    with pytest.raises(CannotResume, match=f"{text}.*choose another --out"):
        starting_point(TrainConfig(**settings), open_dataset(runs.data))


def test_harmless_settings_are_told(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    changes = {"checkpoint_every": 2, "on_save_error": "continue", "max_skips": 3, "hang_seconds": 30}
    said = runs.must_finish_as_whole(out, **changes)
    for change in ("checkpoint_every: 3 -> 2", "on_save_error: abort -> continue", "max_skips: 10 -> 3"):
        assert change in said


def test_killed_before_there_is_a_checkpoint(tmp_path, runs) -> None:
    out = tmp_path / "run"
    for step in (1, 3):
        assert runs.run(out, ("in_update", {"step": step, "do": "SIGKILL"})) == -9
        assert good_steps(out) == []
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("step", [93, 94])
def test_stopped_at_the_end_of_an_epoch(tmp_path, runs, step) -> None:
    """6,000 tokens are 375 sequences of 16, less than 94 batches of 4: the next epoch begins in the 94th."""
    changes = {"steps": 100, "checkpoint_every": 50, "eval_every": 0}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs.run(whole, **changes) == 0
    assert runs.run(out, ("in_update", {"step": step, "do": "SIGTERM"}), **changes) == 143
    assert runs.run(out, **changes) == 0
    assert outcome(out, 100) == outcome(whole, 100)
    assert len(rows(out)) == 100
