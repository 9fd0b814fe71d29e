"""T8, S5: a rank that hangs ends the run, and prints all stacks; no secret is in what a run leaves."""

import gzip
import signal
import time

import pytest
from fork_server import Child, rank_variables
from train_faults import PLANTED, command_line, good_steps, planted, rows, wait_for_step

LIMITS = {"hang_seconds": 2}


@pytest.mark.parametrize(("do", "ranks", "seconds"), [("sleep", 2, 2), ("hold the GIL", 1, 0.8)])
def test_a_rank_that_hangs(tmp_path, runs, do, ranks, seconds) -> None:
    out, fault = tmp_path / "run", ("in_update", {"step": 20, "do": do, "rank": ranks - 1})
    children = runs.begin(out, fault, ranks=ranks, hang_seconds=seconds)
    wait_for_step(out, 19)
    began = time.monotonic()
    codes = runs.codes(children, 20)
    assert all(codes), codes
    assert time.monotonic() - began < 15
    for rank in range(ranks):
        said = runs.said(out, rank)
        assert "most recent call first" in said
        assert "in _update" in said
        if do == "sleep" or rank != ranks - 1:
            assert f"rank {rank}: no progress for 2 s in step 20 (update)" in said
    assert "in act" in runs.said(out, ranks - 1)  # what it hangs in
    assert good_steps(out)[-1] in (15, 18)  # held, the interpreter does not let the last one be finished
    runs.must_finish_as_whole(out, ranks=ranks)


def test_a_rank_that_is_stopped(tmp_path, runs) -> None:
    """SIGSTOP: the stopped rank can print nothing, the other one does and ends."""
    out = tmp_path / "run"
    children = runs.begin(out, ("in_update", {"step": 20, "do": "SIGSTOP", "rank": 1}), ranks=2, **LIMITS)
    assert children[0].wait(30) == 1
    assert "rank 0: no progress for 2 s in step 20 (update)" in runs.said(out)
    assert children[1].poll() is None
    children[1].send(signal.SIGCONT)
    assert children[1].wait(20) != 0
    assert good_steps(out)[-1] in (15, 18)
    runs.must_finish_as_whole(out, ranks=2)


def test_a_run_that_was_stopped_goes_on(tmp_path, runs) -> None:
    """Ctrl-Z, and fg after longer than --hang-seconds: the time in between is no hang."""
    out = tmp_path / "run"
    (child,) = runs.begin(out, ("slow_steps", {"seconds": 0.02}), hang_seconds=1)
    wait_for_step(out, 10)
    child.send(signal.SIGSTOP)
    time.sleep(2.5)
    assert len(rows(out)) < 60
    child.send(signal.SIGCONT)
    assert child.wait(20) == 0, child.output()


def test_a_bug_on_a_rank_does_not_wait_for_one_that_hangs(tmp_path, runs) -> None:
    """Python would, as it ends: it frees the process group, which waits for the answer to what is under way."""
    out, (first, second) = tmp_path / "run", rank_variables(2)
    stop = ("in_update", {"step": 8, "do": "SIGSTOP"})
    stopped = Child(command_line(runs.data, out), runs.log(out), [stop], **first)
    failed = planted(
        [["in_update", {"step": 8, "do": "bug in an exchange"}]], runs.data, out, "-c", PLANTED, **second
    )
    assert failed.returncode == 1
    assert "RuntimeError: planted" in failed.stderr
    stopped.send(signal.SIGKILL)
    assert stopped.wait() == -9


def test_a_save_that_hangs(tmp_path, runs) -> None:
    """The disk does not answer: the next save waits for the one before it, and that is watched."""
    out = tmp_path / "run"
    assert runs.run(out, ("in_save", {"number": 3, "do": "sleep"}), **LIMITS) == 1
    assert "(checkpoint)" in runs.said(out)
    assert "in write_checkpoint" in runs.said(out)
    assert good_steps(out) == [3, 6]
    runs.must_finish_as_whole(out)


def test_slow_is_not_hung(tmp_path, runs) -> None:
    """Ten times the usual time is allowed, however short --hang-seconds is; to the first time, half an hour."""
    out = tmp_path / "run"
    faults = [("slow_steps", {"seconds": 0.15}), ("in_evaluation", {"number": 1, "do": "pause"})]
    # No checkpoints: 0.02 s for one is a busy disk's tenth.
    assert runs.run(out, *faults, steps=12, hang_seconds=0.1, checkpoint_every=0) == 0, runs.said(out)
    assert len(rows(out)) == 12


CANARIES = {
    "HF_TOKEN": "hf_CANARYCANARYCANARYCANARYCANARYCANA",
    "WANDB_API_KEY": "CANARY0123456789abcdef0123456789abcdef",
    "HTTPS_PROXY": "http://somebody:CANARY-password@proxy.invalid:3128",
    "AWS_SECRET_ACCESS_KEY": "CANARY/secret",
}


@pytest.mark.parametrize(
    ("faults", "changes", "code"),
    [
        ([], {"tensorboard": True, "profile": 2}, 0),
        ([("in_save", {"number": 2, "do": "bug"})], {"debug": True}, 1),
        ([("in_update", {"step": 8, "do": "bug"})], {"debug": True}, 1),
        ([("in_update", {"step": 8, "do": "sleep"})], LIMITS, 1),
        ([], {"lr": "x"}, 2),
    ],
    ids=["finished", "failed save", "bug", "hang", "wrong usage"],
)
def test_no_secret_is_in_anything_that_a_run_leaves(tmp_path, runs, faults, changes, code) -> None:
    out = tmp_path / "run"
    assert runs.run(out, *faults, env=CANARIES, **changes) == code, runs.said(out)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files |= {path: gzip.decompress(files[path]) for path in files if path.suffix == ".gz"}
    assert [path for path, content in files.items() if b"CANARY" in content] == []
    assert len(files) >= (1 if code == 2 else 5 if code else 8)
