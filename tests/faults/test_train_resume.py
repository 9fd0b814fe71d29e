"""T9, T10, T12, T16, T19: going on at another number of ranks, time, place or setting; never beside another."""

import hashlib
import os
import re
import signal
import socket
import time

import numpy as np
import pytest
from fork_server import start_ranks
from train_faults import (
    SETTINGS,
    SHAPE,
    checkpoint,
    command_line,
    good_steps,
    outcome,
    rows,
    snapshot,
    wait_for_step,
    wait_until,
)

from gpt2_data import open_dataset
from gpt2_train import TrainConfig
from gpt2_train.config import CannotResume
from gpt2_train.setup import starting_point


def tokens_of_steps(path, ranks) -> dict[int, str]:
    """step -> SHA-256 of the rows of tokens that it trained on, over all ranks, in any order."""
    found = {}
    for rank in range(ranks):
        for line in path.with_name(f"{path.name}.{rank}").read_text().splitlines():
            step, row = line.split(" ", 1)
            found.setdefault(int(step), []).append(row)
    return {step: hashlib.sha256("".join(sorted(rows)).encode()).hexdigest() for step, rows in found.items()}


@pytest.mark.parametrize(
    ("path", "shard"),
    [
        ((1, 2, 1), False),
        ((2, 4, 1), True),
        pytest.param((1, 2, 1), True, marks=pytest.mark.long),
        pytest.param((2, 4, 1), False, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_on_another_number_of_ranks(tmp_path, runs, path, shard) -> None:
    """The same sequences each step, and losses that differ by the rounding of a sum."""
    out, seen = tmp_path / "run", {}
    stops = np.linspace(0, SETTINGS["steps"], len(path) + 1).astype(int)[1:]
    for ranks, stop in zip(path, stops, strict=True):
        tokens = tmp_path / f"tokens-{stop}"
        faults = [("record_tokens", {"path": str(tokens)})]
        if stop != stops[-1]:
            faults.append(("in_update", {"step": int(stop), "do": "SIGTERM", "rank": ranks - 1}))
        code = runs.run(out, *faults, ranks=ranks, **({"shard_optimizer": True} if shard else {}))
        assert code == (0 if stop == stops[-1] else 143), runs.said(out)
        seen.update({step: digest for step, digest in tokens_of_steps(tokens, ranks).items() if step})
    reference = tmp_path / "tokens"
    assert runs.run(tmp_path / "whole", ("record_tokens", {"path": str(reference)}), eval_every=0) == 0
    assert seen == tokens_of_steps(reference, 1)
    for field in ("loss", "val_loss"):
        mine, theirs = ([(row["step"], row[field]) for row in rows(o, field)] for o in (out, runs.whole()))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_a_batch_that_cannot_be_shared_out_is_told_before_training(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    before = snapshot(out / "checkpoints")
    assert runs.codes(runs.begin(out, ranks=3)) == [1, 1, 1]
    said = runs.said(out)
    assert (
        "a batch of 64 tokens does not divide into sequences of 16 on 3 processes: use --batch-tokens 48" in said
    )
    assert "Traceback" not in said + runs.said(out, 1) + runs.said(out, 2)
    assert snapshot(out / "checkpoints") == before


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_another_micro_batch(tmp_path, runs, micro_batch) -> None:
    out = runs.wind_back(tmp_path / "run", 54)
    assert runs.run(out, micro_batch=micro_batch) == 0
    mine, theirs = ([(row["step"], row["loss"]) for row in rows(o)] for o in (out, runs.whole()))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


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
    wait_for_step(out, 7)
    second = runs.server.start(command_line(runs.data, out), tmp_path / "second.log")
    assert second.wait() == 1
    said = second.output()
    assert f"{out} is in use by process {first.pid} on {socket.gethostname()}" in said
    assert "Traceback" not in said
    # Two ranks of another run: both end.
    pair = start_ranks(runs.server, command_line(runs.data, out), tmp_path / "pair.log", 2)
    assert [child.wait(20) for child in pair] == [1, 1]
    first.send(signal.SIGKILL)
    first.wait()
    runs.must_finish_as_whole(out)


def test_two_at_the_same_moment(tmp_path, runs) -> None:
    """One of them trains, and the other is refused, whoever comes first."""
    out = tmp_path / "run"
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    both = [runs.server.start(command_line(runs.data, out), log) for log in logs]
    assert sorted(child.wait() for child in both) == [0, 1]
    runs.must_equal_whole(out)


def test_another_lr_ends_with_2_and_leaves_all_as_it_was(runs) -> None:
    out = runs.whole()
    before, length = snapshot(out / "checkpoints"), len(runs.said(out))
    assert runs.run(out, batch_tokens=32, lr=0.5) == 2
    said = runs.said(out)[length:]
    assert "batch_tokens: 64 -> 32; lr: 0.01 -> 0.5" in said
    assert "choose another --out" in said
    assert snapshot(out / "checkpoints") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.02}, "lr: 0.01 -> 0.02"),
        ({"min_lr": 2e-3}, "min_lr: 0.001 -> 0.002"),
        ({"warmup": 4}, "warmup: 3 -> 4"),
        ({"schedule": "wsd"}, "schedule: cosine -> wsd"),
        ({"decay_steps": 7}, "decay_steps: 0 -> 7"),
        ({"batch_tokens": 32}, "batch_tokens: 64 -> 32"),
        ({"seq_len": 8}, "seq_len: 16 -> 8"),
        ({"order": "sequential"}, "order: shuffled -> sequential"),
        ({"optimizer": "muon"}, "optimizer: adamw -> muon"),
        ({"weight_decay": 0.2}, "weight_decay: 0.1 -> 0.2"),
        ({"beta1": 0.8}, "beta1: 0.9 -> 0.8"),
        ({"beta2": 0.8}, "beta2: 0.95 -> 0.8"),
        ({"eps": 1e-7}, "eps: 1e-08 -> 1e-07"),
        ({"grad_clip": 2.0}, "grad_clip: 1.0 -> 2.0"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"grad_compression": "bf16"}, "grad_compression: none -> bf16"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"spike_sigma": 6.0}, "spike_sigma: 0.0 -> 6.0"),
        ({"model": {"n_layer": 3}}, "n_layer: 2 -> 3"),
        ({"model": {"vocab_size": 300}}, "vocab_size: 256 -> 300"),
    ],
    ids=str,
)
def test_a_setting_that_changes_the_maths_is_refused_by_name(runs, changes, named) -> None:
    """By the check of the start itself, which --dry-run makes too."""
    settings = {**SETTINGS, "data": str(runs.data), "out": str(runs.whole()), **changes}
    settings["model"] = {**SHAPE, **settings.get("model", {})}
    with pytest.raises(CannotResume, match=f"{re.escape(named)}.*choose another --out"):
        starting_point(TrainConfig(**settings), open_dataset(runs.data))


def test_harmless_settings_are_told(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    runs.must_finish_as_whole(out, checkpoint_every=2, on_save_error="continue", max_skips=3, hang_seconds=30)
    said = runs.said(out)
    for change in ("checkpoint_every: 3 -> 2", "on_save_error: abort -> continue", "max_skips: 10 -> 3"):
        assert change in said


def test_at_the_last_step_there_is_none_more(tmp_path, runs) -> None:
    out = runs.copy(tmp_path / "run")
    before = snapshot(out / "checkpoints")
    runs.must_finish_as_whole(out)
    assert snapshot(out / "checkpoints") == before
    assert "done: step 60" in runs.said(out)


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
    wait_until(lambda: len(rows(out)) == 100, 1)
