"""T1, T7, T15: runs that are killed end with the same weights, optimizer and loss log, by SHA-256."""

import random
import shutil
import signal
import time

import pytest
from train_faults import PLANTED, Runs, checkpoint, good_steps, loss_log, newest_after_a_kill, outcome, planted

from gpt2_train import verify_checkpoint

PATIENCE = 30.0  # seconds in which the other ranks must notice that one is gone
LONG = [pytest.param(1, 160, marks=pytest.mark.long), pytest.param(2, 60, marks=pytest.mark.long)]


def end_by(children, until: float) -> bool:
    return all(child.poll(max(0.0, until - time.monotonic())) is not None for child in children)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 12), (2, 8), *LONG])
def test_killed_at_random_instants(tmp_path, ranks, kills) -> None:
    """Runs are killed, each at a random instant, and started again by the same command.

    After every kill the loss log must be whole up to the newest checkpoint, and no checkpoint may be lost.
    """
    draw, runs = random.Random(ranks), Runs(tmp_path)
    whole = runs.whole(ranks)  # its caches are cold
    began = time.monotonic()
    runs.must_finish_as_whole(tmp_path / "again", ranks=ranks)
    needed = time.monotonic() - began
    killed = number = newest = 0
    while True:
        out = tmp_path / f"run-{number}"
        children = runs.begin(out, ranks=ranks)
        # A third of the time that a run needs: every fourth start or so is the one that finishes.
        until = time.monotonic() + draw.uniform(0, needed / 3)
        if end_by(children, until if killed < kills else until + 600):  # the last run is left to finish
            assert runs.codes(children) == [0] * ranks, runs.said(out)
            assert outcome(out) == outcome(whole), f"after {killed} kills"
            if killed == kills:
                break
            number, newest = number + 1, 0
            continue
        # The other ranks must end by themselves, once they had met. torchrun would kill them before.
        victims = draw.choice([[child] for child in children] + ([children] if ranks > 1 else []))
        for child in victims if "parameters," in children[0].output() else children:
            child.send(signal.SIGKILL)
        runs.codes(children, PATIENCE)
        killed += 1
        newest = newest_after_a_kill(out, loss_log(whole), newest)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("resumed", [3, pytest.param(1000, marks=pytest.mark.long)])
def test_killed_before_any_change_of_the_folder(tmp_path, runs, keep, resumed) -> None:
    """The folder is copied before every change: in every file, rename and deletion of a save and of a rotation.

    That is what a kill leaves at that instant. There is a good checkpoint in each, with half-made folders of
    higher steps lying about, and the runs of some, drawn at random, are resumed.
    """
    out, copies, whole = runs.wind_back(tmp_path / "run", 54), tmp_path / "copies", loss_log(runs.whole())
    for step in (90, 96):
        checkpoint(out, step).mkdir()
        (checkpoint(out, step) / "model.safetensors").write_bytes(b"half")
    for path in (out / "checkpoints").glob("step-*"):
        if path != checkpoint(out, 54) and verify_checkpoint(path) == []:
            shutil.rmtree(path)  # the run must begin before the newcomers are there beside a good one
    runs.must_finish_as_whole(out, ("copy_at_changes", {"folder": str(out), "to": str(copies)}), keep=keep)
    assert good_steps(out) == [54, 57, 60][-keep:]
    newest, instants, numbers = 54, sorted(copies.iterdir()), set()
    assert len(instants) > 30
    for instant in instants:
        newest = newest_after_a_kill(instant, whole, newest)
        numbers.add(len(good_steps(instant)))
    assert numbers == set(range(1, keep + 2)) & set(range(1, 4))
    for instant in random.Random(keep).sample(instants, min(resumed, len(instants))):
        runs.must_finish_as_whole(instant, keep=keep)


def test_killed_before_any_change_of_a_new_folder(tmp_path, runs) -> None:
    out, copies, newest = tmp_path / "run", tmp_path / "copies", 0
    runs.must_finish_as_whole(out, ("copy_at_changes", {"folder": str(out), "to": str(copies), "last": 60}))
    instants = sorted(copies.iterdir())
    for instant in instants:
        newest = newest_after_a_kill(instant, loss_log(runs.whole()), newest)
    assert len(instants) >= 59  # before the first change there is no folder
    assert newest > 0
    for instant in random.Random(0).sample(instants, 3):
        runs.must_finish_as_whole(instant)


@pytest.mark.slow
def test_torchrun_starts_it_again_after_a_worker_died(tmp_path, runs) -> None:
    """Rank 1 in an update, and then, for good, rank 0 in a save."""
    out, script = tmp_path / "run", tmp_path / "planted.py"
    script.write_text(PLANTED)
    faults = [
        ["in_update", {"step": 20, "do": "SIGKILL", "rank": 1, "life": 0}],
        ["in_save", {"number": 3, "do": "SIGKILL", "rank": 0, "life": 1}],
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    done = planted(faults, runs.data, out, *torchrun, script)
    assert done.returncode == 1
    assert "restart 1 of 1" in done.stderr
    assert done.stderr.count("resuming from") == 1
    newest = newest_after_a_kill(out, loss_log(runs.whole(2)), 15)
    assert newest == 24, "the second life died in its third save"
    runs.must_finish_as_whole(out, ranks=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_is_used_up_on_one_rank_is_said(tmp_path, runs, rank) -> None:
    out, fault = tmp_path / "run", ("in_update", {"step": 8, "do": "out of memory", "rank": rank})
    runs.fail_and_resume(out, fault, ranks=2)
    said = runs.said(out, rank)
    assert f"Error: out of memory on rank {rank} (" in said, said
    assert "use a smaller --micro-batch" in said
