"""T13, T14: a loss or gradient that is not finite, or a spike, on one rank: all skip alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from train_faults import checkpoint, good_steps, loss_log, outcome, rows, steps_of


def all_finite(out: Path) -> bool:
    tensors = [
        tensor
        for step in steps_of(out)
        for name in ("model", "optimizer")
        for tensor in safetensors.torch.load_file(checkpoint(out, step) / f"{name}.safetensors").values()
    ]
    assert tensors
    return all(torch.isfinite(tensor).all() for tensor in tensors)


def skipped(out: Path) -> list[int]:
    return [row["step"] for row in rows(out) if "skipped" in row]


@pytest.mark.parametrize(
    ("kind", "where", "ranks"),
    [("nan", "loss", 1), ("inf", "gradient", 1), ("nan", "gradient", 2), ("inf", "loss", 2)],
)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(tmp_path, runs, kind, where, ranks) -> None:
    """At step 9 of the last rank alone; had another made the update, later losses would not be those of one."""
    out, alone, changes = tmp_path / "run", tmp_path / "alone", {"steps": 15, "keep": 15, "checkpoint_every": 1}
    fault = ("unsound", {"steps": [9], "kind": kind, "where": where})
    assert runs.run(out, (fault[0], {**fault[1], "rank": ranks - 1}), ranks=ranks, **changes) == 0, runs.said(out)
    assert skipped(out) == [9]
    states = [outcome(out, step)[name] for name in ("model.safetensors", "optimizer.safetensors")
              for step in (8, 9, 10)]  # fmt: skip
    assert states[0] == states[1] != states[2]
    assert states[3] == states[4] != states[5]
    assert good_steps(out) == list(range(1, 16))
    assert all_finite(out)
    # A row is JSON for any reader: no NaN in it.
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert runs.run(alone, fault, **changes) == 0
    losses = [[row["loss"] for row in rows(run) if row["step"] != 9] for run in (out, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_skipped_step_and_a_resume_after_it(tmp_path, runs) -> None:
    fault = ("unsound", {"steps": [9, 10, 20], "kind": "nan"})
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs.run(whole, fault) == 0
    for step in (9, 10, 11, 20):
        assert runs.run(out, fault, ("in_update", {"step": step, "do": "SIGKILL"})) == -9
    assert runs.run(out, fault) == 0
    assert skipped(out) == [9, 10, 20]
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_for_ever_is_given_up_across_restarts_and_leaves_a_good_checkpoint(tmp_path, runs, ranks) -> None:
    """A restart inside a row of skips does not begin to count anew."""
    out, changes = tmp_path / "run", {"ranks": ranks, "max_skips": 5}
    fault = ("unsound", {"steps": list(range(14, 99)), "kind": "nan", "rank": ranks - 1})
    runs.fail(out, fault, ("in_update", {"step": 17, "do": "SIGTERM"}), code=143, **changes)
    runs.fail(out, fault, says=["5 updates in a row were skipped"], **changes)
    assert skipped(out) == [14, 15, 16, 17, 18]
    assert all_finite(out)
    # What made it so is gone: the same command trains on.
    assert runs.run(out, **changes) == 0, runs.said(out)
    assert all_finite(out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_spikes_are_skipped_by_choice_and_judged_alike_after_a_resume(tmp_path, runs, ranks) -> None:
    """A NaN, two spikes, a stop in the middle of the window, a spike: each is judged by sound steps alone."""
    changes = {"eval_every": 0, "spike_sigma": 30, "ranks": ranks}
    faults = [("unsound", {"steps": [35], "kind": "nan"}),
              ("unsound", {"steps": [36, 37, 50], "kind": "1e3", "rank": ranks - 1})]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs.run(whole, *faults, **changes) == 0, runs.said(whole)
    assert skipped(whole) == [35, 36, 37, 50]
    assert rows(whole)[49]["loss"] > 1000 / ranks
    assert "deviations above" in rows(whole)[49]["skipped"]
    stop = ("in_update", {"step": 43, "do": "SIGTERM", "rank": 0})
    assert runs.run(out, *faults, stop, **changes) == 143
    assert runs.run(out, *faults, **changes) == 0
    assert loss_log(out) == loss_log(whole)
    assert outcome(out) == outcome(whole)
    assert runs.run(tmp_path / "off", *faults, **{**changes, "spike_sigma": 0}) == 0
    assert skipped(tmp_path / "off") == [35]
