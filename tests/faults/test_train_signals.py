"""T2, T3: SIGTERM, SIGINT and SIGUSR1 at any time: saved, told how to go on, and as undisturbed after that."""

import os
import signal
import time

import pytest
from train_faults import good_steps, kill, rows, wait_for_step, wait_until

NUMBERS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


def stopped(runs, out, ranks=1, code=143) -> int:
    """The newest checkpoint's step, once it has been checked that the run told it and stopped there."""
    said = runs.said(out)
    step = good_steps(out)[-1] if (out / "checkpoints").exists() else 0
    onward = "resumes from there" if step else "begins anew"
    assert f"stopped by signal {code - 128} at step {step}; the same command {onward}" in said, said
    assert "Traceback" not in said
    assert [row["step"] for row in rows(out)] == list(range(1, step + 1))
    assert not list((out / "checkpoints").glob(".tmp*"))
    return step


@pytest.mark.parametrize(("name", "code"), NUMBERS.items())
def test_a_signal_in_a_step(tmp_path, runs, name, code) -> None:
    out = tmp_path / "run"
    assert runs.run(out, ("in_update", {"step": 8, "do": name}), seconds=10) == code
    assert stopped(runs, out, code=code) == 8
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("rank", [0, 1, None])
def test_a_signal_to_one_rank_or_both(tmp_path, runs, rank) -> None:
    out = tmp_path / "run"
    children = runs.begin(out, ("in_update", {"step": 8, "do": "SIGTERM", "rank": rank}), ranks=2)
    assert runs.codes(children, 20) == [143, 143]
    assert stopped(runs, out) == 8
    runs.must_finish_as_whole(out, ranks=2)


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
    out = tmp_path / "run"
    fault = (fault[0], {**fault[1], "rank": ranks - 1 if fault[0] != "in_save" else 0})
    assert runs.codes(runs.begin(out, fault, ranks=ranks), 20) == [143] * ranks, runs.said(out)
    found = stopped(runs, out)
    assert found == step if step is not None else 6 <= found <= 10
    runs.must_finish_as_whole(out, ranks=ranks)


def test_an_abandoned_evaluation_is_done_after_the_resume(tmp_path, runs) -> None:
    out = tmp_path / "run"
    runs.run(out, ("in_evaluation", {"number": 2, "do": "SIGINT"}))
    assert [row["step"] for row in rows(out, "val_loss")] == [0]
    # And killed in the middle of what it logs: no sample is there twice.
    assert runs.run(out, ("in_log", {"text": "val_loss", "do": "SIGKILL"})) == -9
    runs.must_finish_as_whole(out)


def test_many_signals_at_random_instants(tmp_path, runs) -> None:
    """Whenever it comes, from the moment the handler is there: a whole folder, and the run goes on."""
    out, codes = tmp_path / "run", []
    for delay in (0.02, 0.1, 0.2, 0.3, 0.05):
        before = len(runs.said(out))
        (child,) = runs.begin(out)
        wait_until(lambda at=before: len(runs.said(out)) > at)
        time.sleep(delay)
        child.send(signal.SIGTERM)
        codes.append(child.wait(10))
    assert set(codes) <= {0, 143}
    runs.must_finish_as_whole(out)


def test_a_second_interrupt_within_a_second_is_the_same_one(tmp_path, runs) -> None:
    out = tmp_path / "run"
    faults = [("slow_steps", {"seconds": 0.3}), ("in_update", {"step": 8, "do": "SIGINT"})]
    (child,) = runs.begin(out, *faults, ("in_update", {"step": 8, "do": "SIGINT"}))
    assert child.wait(20) == 130
    assert stopped(runs, out, code=130) == 8
    runs.must_finish_as_whole(out)


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
    out = tmp_path / "run"
    children = runs.begin(
        out, ("in_update", {"step": 7, "do": "SIGUSR1"}), ("in_save", {"number": 3, "do": "SIGTERM"})
    )
    try:
        assert runs.codes(children, 20) == [138]
    finally:
        kill(children)
    assert stopped(runs, out, code=138) == 7
    runs.must_finish_as_whole(out)
