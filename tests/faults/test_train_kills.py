"""T1, T7, T15: runs that are killed end with the same weights, optimizer and loss log, by SHA-256."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from train_faults import checkpoint, good_steps, steps_of

import soak

LONG = [pytest.param(1, 160, marks=pytest.mark.long), pytest.param(2, 60, marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 40), (2, 20), *LONG])
def test_killed_at_random_instants(tmp_path, ranks, kills) -> None:
    told = soak.soak(tmp_path, kills, ranks, seed=ranks, steps=60)
    assert told["problems"] == []
    assert told["kills"] == kills
    assert told["finished"] >= 1


def test_soak_tells_a_run_that_is_not_the_same(tmp_path, runs) -> None:
    out = runs.copy(tmp_path / "run")
    whole = soak.loss_log(out)
    assert soak.interrupted_problems(out, whole, 60) == (60, [])
    shutil.rmtree(checkpoint(out, 60))
    assert soak.interrupted_problems(out, whole, 60)[1] == [
        "no good checkpoint from step 60 on, where there was one"
    ]
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:20] + lines[19:]))
    assert "train rows up to the checkpoint of step 57 are not" in soak.interrupted_problems(out, whole, 0)[1][0]


@pytest.mark.slow
def test_killed_before_every_change_of_the_folder(tmp_path, runs) -> None:
    """Process n dies before its n-th change: in every file, rename and deletion of a save and of a rotation."""
    out, kills, newest = tmp_path / "run", 0, 0
    changes = {"keep": 1, "eval_every": 30, "steps": 36}
    whole = tmp_path / "whole"
    assert runs.run(whole, **changes) == 0
    log = soak.loss_log(whole)
    for number in range(1, 200):
        code = runs.run(out, ("kill_at_change", {"folder": str(tmp_path), "number": number}), **changes)
        if code == 0:
            break
        assert code == -9, runs.said(out)
        kills += 1
        newest, problems = soak.interrupted_problems(out, log, newest)
        assert problems == [], number
    assert code == 0
    assert kills > 30
    assert soak.loss_log(out) == log
    assert soak.outcome(out, 36) == soak.outcome(whole, 36)
    assert not list((out / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_good_checkpoint_at_every_instant(tmp_path, runs, keep) -> None:
    """Looked at before every change of the folder, with half-made folders of higher steps lying about."""
    out, report = tmp_path / "run", tmp_path / "report"
    for step in (90, 96):
        folder = checkpoint(out, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    faults = ("observe_changes", {"folder": str(out), "report": str(report)})
    # All of what is there is damaged, so the run must not begin before the newcomers are there beside a good one.
    shutil.copytree(checkpoint(runs.wind_back(tmp_path / "start", 54), 54), checkpoint(out, 54))
    shutil.copy(runs.whole() / "metrics.jsonl", out)
    shutil.copy(runs.whole() / "samples.jsonl", out)
    assert runs.run(out, faults, keep=keep) == 0, runs.said(out)
    states = [line.split(" ")[1].strip() for line in report.read_text().splitlines()]
    assert len(states) > 30
    assert all(states), "an instant without a good checkpoint"
    assert {len(state.split(",")) for state in states} <= {1, *range(keep, keep + 2)} | set(range(1, keep + 1))
    assert good_steps(out) == [54, 57, 60][-keep:]
    assert soak.outcome(out) == soak.outcome(runs.whole())
    assert soak.loss_log(out) == soak.loss_log(runs.whole())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_folder_of_any_instant_is_gone_on_with(tmp_path, runs, seed) -> None:
    """Kills at changes drawn at random from one process to the next, in rotation more often than not."""
    draw, out = random.Random(seed), tmp_path / "run"
    for _ in range(4):
        number = draw.randint(20, 160)
        code = runs.run(out, ("kill_at_change", {"folder": str(tmp_path), "number": number}), keep=2)
        assert code in (0, -9), runs.said(out)
        assert len(good_steps(out)) >= (len(steps_of(out)) > 0)
    runs.must_finish_as_whole(out, keep=2)


PLANTED = """
import json, sys, inside
for name, options in json.loads(sys.argv.pop(1)):
    getattr(inside, name)(**options)
from gpt2_model.command import run_command as run
from gpt2_train.cli import main
run(main, "gpt2-train")
"""


def torchrun(tmp_path, runs, out, faults, restarts):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, str(script), json.dumps(faults), *soak.command_line(runs.data, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_torchrun_starts_it_again_after_a_worker_died(tmp_path, runs) -> None:
    """Rank 1 in an update, and then, for good, rank 0 in a save."""
    out = tmp_path / "run"
    faults = [
        ["in_update", {"step": 20, "do": "SIGKILL", "rank": 1, "life": 0}],
        ["in_save", {"number": 3, "do": "SIGKILL", "rank": 0, "life": 1}],
    ]
    done = torchrun(tmp_path, runs, out, faults, 1)
    assert done.returncode == 1
    assert "restart 1 of 1" in done.stderr
    assert done.stderr.count("resuming from") == 1
    newest, problems = soak.interrupted_problems(out, soak.loss_log(runs.whole(2)), 15)
    assert problems == []
    assert newest == 24, "the second life died in its third save"
    runs.must_finish_as_whole(out, ranks=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_is_used_up_on_one_rank_is_said(tmp_path, runs, rank) -> None:
    out = tmp_path / "run"
    children = runs.begin(out, ("in_update", {"step": 8, "do": "out of memory", "rank": rank}), ranks=2)
    assert runs.codes(children, 30) == [1, 1]
    said = runs.said(out, rank)
    assert f"Error: out of memory on rank {rank} (" in said, said
    assert "use a smaller --micro-batch" in said
    assert "Traceback" not in said
    runs.must_finish_as_whole(out, ranks=2)
