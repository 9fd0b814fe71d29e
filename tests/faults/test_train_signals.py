"""T2, T3: SIGTERM, SIGINT and SIGUSR1 at any time: saved, told how to go on, and as undisturbed after that."""

import os
import signal
import time

import pytest
from train_faults import good_steps, rows, wait_for_step, wait_until

NUMBERS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


def stop(runs, out, *faults, step=None, code=143, ranks=1) -> None:
    """A run that a signal stops, here or at any step, tells it, saves, and is resumed."""
    said = runs.fail(out, *faults, code=code, ranks=ranks)
    saved = good_steps(out)[-1] if (out / "checkpoints").exists() else 0
    onward = "resumes from there" if saved else "begins anew"
    assert f"stopped by signal {code - 128} at step {saved}; the same command {onward}" in said, said
    assert [row["step"] for row in rows(out)] == list(range(1, saved + 1))
    assert saved == step if step is not None else 6 <= saved <= 10
    runs.must_finish_as_whole(out, ranks=ranks)


@pytest.mark.parametrize(("name", "code"), NUMBERS.items())
def test_a_signal_in_a_step(tmp_path, runs, name, code) -> None:
    stop(runs, tmp_path / "run", ("in_update", {"step": 8, "do": name}), step=8, code=code)


@pytest.mark.parametrize("rank", [0, 1, None])
def test_a_signal_to_one_rank_or_both(tmp_path, runs, rank) -> None:
    stop(runs, tmp_path / "run", ("in_update", {"step": 8, "do": "SIGTERM", "rank": rank}), step=8, ranks=2)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        (("in_save", {"number": 2, "do": "SIGTERM"}), None),
        (("in_evaluation", {"number": 2, "do": "SIGTERM"}), 12),
        (("in_update", {"step": 1, "do": "SIGTERM"}), 1),
        (("before_joining", {"do": "SIGTERM"}), 0),
    ],
    ids=["in a save", "in an evaluation", "in the first batch", "before the ranks meet"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_a_bad_time(tmp_path, runs, fault, step, ranks) -> None:
    name, options = fault
    rank = 0 if name == "in_save" else ranks - 1
    stop(runs, tmp_path / "run", (name, {**options, "rank": rank}), step=step, ranks=ranks)


def test_an_abandoned_evaluation_is_done_after_the_resume(tmp_path, runs) -> None:
    out = tmp_path / "run"
    runs.fail(out, ("in_evaluation", {"number": 2, "do": "SIGINT"}), code=130)
    assert [row["step"] for row in rows(out, "val_loss")] == [0]
    # And killed in the middle of what it logs: no sample is there twice.
    assert runs.run(out, ("in_log", {"text": "val_loss", "do": "SIGKILL"})) == -9
    runs.must_finish_as_whole(out)


def test_many_signals_at_random_instants(tmp_path, runs) -> None:
    """Whenever it comes, from the moment the handler is there: a whole folder, and the run goes on."""
    out, codes = tmp_path / "run", []
    for delay in (0.02, 0.1, 0.2, 0.3, 0.05):
        (child,) = runs.begin(out)
        wait_until(child.output)
        time.sleep(delay)
        child.send(signal.SIGTERM)
        codes.append(child.wait(10))
    assert set(codes) <= {0, 143}
    runs.must_finish_as_whole(out)


def test_a_second_interrupt_within_a_second_is_the_same_one(tmp_path, runs) -> None:
    interrupt = ("in_update", {"step": 8, "do": "SIGINT"})
    stop(runs, tmp_path / "run", ("slow_steps", {"seconds": 0.3}), interrupt, interrupt, step=8, code=130)


def test_a_later_second_interrupt_ends_at_once(tmp_path, runs) -> None:
    out = tmp_path / "run"
    (child,) = runs.begin(out, ("in_update", {"step": 8, "do": "sleep"}))
    wait_for_step(out, 7)
    os.kill(child.pid, signal.SIGINT)
    assert child.poll(1.3) is None, "the step is not at its end"
    assert "finishing the step, then saving; Ctrl-C again ends at once" in runs.said(out)
    # On a busy machine the first was perhaps noted so late that the next is within a second of it.
    codes = (os.kill(child.pid, signal.SIGINT) or child.poll(1.3) for _ in range(10))
    assert next(code for code in codes if code is not None) == 130
    assert good_steps(out)[-1] in (3, 6)
    runs.must_finish_as_whole(out)


def test_signals_of_another_kind_during_the_save_that_one_asked_for(tmp_path, runs) -> None:
    """Slurm sends SIGUSR1, then SIGTERM; torchrun SIGTERM after the terminal's SIGINT."""
    faults = ("in_update", {"step": 7, "do": "SIGUSR1"}), ("in_save", {"number": 3, "do": "SIGTERM"})
    stop(runs, tmp_path / "run", *faults, step=7, code=138)
