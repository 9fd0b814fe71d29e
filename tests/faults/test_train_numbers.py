"""T13, T14: a loss or gradient that is not finite, or a spike, on one rank: all skip alike."""

import json
from pathlib import Path

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
    """At step 9 of the last rank alone, where a checkpoint is due, too."""
    out = tmp_path / "run"
    faults = [
        ("unsound", {"steps": [9], "kind": kind, "where": where, "rank": ranks - 1}),
        ("dump_state", {"folder": str(tmp_path), "steps": [9, 10, 11]}),
    ]
    children = runs.begin(out, *faults, ranks=ranks, steps=15, keep=9)
    assert runs.codes(children) == [0] * ranks, runs.said(out)
    assert skipped(out) == [9]
    states = {(rank, step): (tmp_path / f"{rank}-{step}").read_text()
              for rank in range(ranks) for step in (9, 10, 11)}  # fmt: skip
    assert states[0, 9] == states[0, 10] != states[0, 11]
    for step in (9, 10, 11):
        assert len({states[rank, step] for rank in range(ranks)}) == 1
    assert good_steps(out) == [3, 6, 9, 12, 15]
    assert all_finite(out)
    # A row is JSON for any reader: no NaN in it.
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


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
def test_for_ever_is_given_up_and_leaves_a_good_checkpoint(tmp_path, runs, ranks) -> None:
    out = tmp_path / "run"
    fault = ("unsound", {"steps": list(range(14, 99)), "kind": "nan", "rank": ranks - 1})
    assert runs.codes(runs.begin(out, fault, ranks=ranks, max_skips=5)) == [1] * ranks
    said = runs.said(out)
    assert "5 updates in a row were left out" in said
    assert "Traceback" not in said
    assert skipped(out) == [14, 15, 16, 17, 18]
    assert all_finite(out)
    # What made it so is gone: the same command trains on.
    assert runs.run(out, ranks=ranks, max_skips=5) == 0, runs.said(out)
    assert all_finite(out)


def test_a_lasting_loss_of_sense_is_given_up_across_restarts(tmp_path, runs) -> None:
    """A restart inside a row of skips does not begin to count anew."""
    out = tmp_path / "run"
    fault = ("unsound", {"steps": list(range(14, 99)), "kind": "nan"})
    assert runs.run(out, fault, ("in_update", {"step": 17, "do": "SIGTERM"}), max_skips=6) == 143
    assert runs.run(out, fault, max_skips=6) == 1
    assert skipped(out) == list(range(14, 20))


def test_a_spike_is_skipped_only_by_choice(tmp_path, runs) -> None:
    fault = ("unsound", {"steps": [40], "kind": "1e3"})
    assert runs.run(tmp_path / "off", fault, eval_every=0) == 0
    assert skipped(tmp_path / "off") == []
    assert runs.run(tmp_path / "on", fault, eval_every=0, spike_sigma=30) == 0
    assert skipped(tmp_path / "on") == [40]
    assert rows(tmp_path / "on")[39]["loss"] > 1000
    assert "deviations above" in rows(tmp_path / "on")[39]["skipped"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_window_is_not_poisoned_and_is_resumed(tmp_path, runs, ranks) -> None:
    """A NaN, two spikes, a stop in the middle of the window, a spike: each is judged by sound steps alone."""
    changes = {"eval_every": 0, "spike_sigma": 30, "ranks": ranks}
    faults = [("unsound", {"steps": [35], "kind": "nan"}),
              ("unsound", {"steps": [36, 37, 50], "kind": "1e3", "rank": ranks - 1})]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert runs.run(whole, *faults, **changes) == 0, runs.said(whole)
    assert skipped(whole) == [35, 36, 37, 50]
    stop = ("in_update", {"step": 43, "do": "SIGTERM", "rank": 0})
    assert runs.run(out, *faults, stop, **changes) == 143
    assert runs.run(out, *faults, **changes) == 0
    assert loss_log(out) == loss_log(whole)
    assert outcome(out) == outcome(whole)
