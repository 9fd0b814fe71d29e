"""T2, T3: SIGTERM, SIGINT and SIGUSR1 at any time: saved, told how to go on, and as undisturbed after that."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from fork_server import Child, environment, rank_variables
from train_faults import PLANTED, command_line, good_steps, rows, wait_for_step, wait_until

NUMBERS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129, "SIGXCPU": 152}
SLOW = ["slow_steps", {"seconds": 0.1}]


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


def test_an_interrupt_before_the_first_step_promises_no_save(tmp_path, runs) -> None:
    said = runs.fail(tmp_path / "run", ("before_joining", {"do": "SIGINT"}), code=130)
    assert "stopping before the first step; Ctrl-C again ends at once\n" in said
    assert "then saving" not in said


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


def test_a_terminal_that_closes(tmp_path, runs) -> None:
    """pytorch #67538: ssh closes, so SIGHUP comes and the terminal is gone; what is said then has no reader."""
    out, (master, slave) = tmp_path / "run", pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PLANTED, json.dumps([SLOW]), *command_line(runs.data, out)], env=environment(),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_DFL), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(slave)
    wait_for_step(out, 5)
    os.close(master)
    assert process.wait(30) == 129
    assert good_steps(out)[-1] == rows(out)[-1]["step"] < 60
    runs.must_finish_as_whole(out)


def test_under_nohup_a_hangup_changes_nothing(tmp_path, runs) -> None:
    """pytorch #67538: what was started with SIGHUP ignored goes on."""
    runs.must_finish_as_whole(tmp_path / "run", ("nohup", {}), ("in_update", {"step": 8, "do": "SIGHUP"}))


def test_a_launcher_that_was_killed_ends_its_ranks(tmp_path, runs) -> None:
    """The system kills torchrun's own process: its ranks save, end within a step, and give the folder back."""
    out, script = tmp_path / "run", tmp_path / "planted.py"
    script.write_text(PLANTED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    with runs.log(out).open("w") as log:
        agent = subprocess.Popen(
            [sys.executable, *torchrun, json.dumps([SLOW]), *command_line(runs.data, out)],
            env=environment(), stdout=log, stderr=log,
        )  # fmt: skip
    wait_for_step(out, 5)
    ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    agent.kill()
    agent.wait()
    step = rows(out)[-1]["step"]

    def ended(pid: str) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rsplit(")")[-1].split()[0] == "Z"

    wait_until(lambda: all(map(ended, ranks)), 20)
    said = runs.said(out)
    assert f"torchrun (process {agent.pid}) has died" in said
    assert good_steps(out)[-1] == rows(out)[-1]["step"] <= step + 3, said
    assert f"stopped by signal 15 at step {good_steps(out)[-1]}; the same command resumes from there" in said
    runs.must_finish_as_whole(out, ranks=2)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize(
    ("rank", "says"), [(0, "rank 0 waits for 1 of 2 ranks (rank 1) at "), (1, "rank 1 waits for rank 0 at ")]
)
def test_a_rank_that_waits_says_for_whom_and_heeds_signals(tmp_path, runs, rank, says, name) -> None:
    """pytorch/examples #458: WORLD_SIZE and MASTER_ADDR of a cluster, and the others never come."""
    variables = {**rank_variables(2)[rank], "LOCAL_RANK": "0"}
    child = Child(command_line(runs.data, tmp_path / "run"), tmp_path / "log", **variables)
    place = f"127.0.0.1:{variables['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    wait_until(lambda: f"{says}{place}" in child.output(), 20)
    child.send(getattr(signal, name))
    assert child.wait(3) == NUMBERS[name]
    assert f"stopped by signal {NUMBERS[name] - 128} while it waited for the other ranks" in child.output()
    assert not (tmp_path / "run").exists()


def test_a_rank_whose_rank_0_goes_while_they_wait_says_so(tmp_path, runs) -> None:
    """pytorch/examples #458: two of three ranks are there, and rank 0 is stopped."""
    first, second, _ = rank_variables(3)
    children = [
        Child(command_line(runs.data, tmp_path / "run"), tmp_path / f"log{rank}", **{**env, "LOCAL_RANK": "0"})
        for rank, env in enumerate((first, second))
    ]
    wait_until(lambda: "waits for 1 of 3 ranks (rank 2)" in children[1].output(), 20)
    children[0].send(signal.SIGTERM)
    assert runs.codes(children, 20) == [143, 1]
    assert "Error: rank 1 cannot meet the others" in children[1].output()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is not a whole number"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1 and no WORLD_SIZE in the environment"),
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_ranks_that_do_not_fit_are_told(tmp_path, runs, variables, says) -> None:
    """pytorch/examples #458: RANK or WORLD_SIZE are set by a cluster, without torchrun; a dry run says it, too."""
    for more in [[], ["--dry-run"]] if "needs" not in says else [[]]:
        child = Child([*command_line(runs.data, tmp_path / "run"), *more], tmp_path / "log", **variables)
        assert child.wait(20) == 1
        assert child.output().count("\n") == 1
        assert says in child.output()
        assert "start the processes with torchrun" in child.output()


def test_ranks_of_unlike_settings_are_refused(tmp_path, runs) -> None:
    """torchrun on two machines, with another --lr on one of them."""
    children = [
        Child(command_line(runs.data, tmp_path / "run", lr=lr), tmp_path / f"log{rank}", **env)
        for rank, (lr, env) in enumerate(zip((1e-2, 2e-2), rank_variables(2), strict=True))
    ]
    assert runs.codes(children, 30) == [1, 1]
    assert "Error: rank 1 was started with other settings (lr: 0.02, rank 0 has 0.01)" in children[0].output()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_is_told_by_the_other(tmp_path, runs, lost) -> None:
    """A machine goes away: the others say where the run goes on, within seconds."""
    out = tmp_path / "run"
    children = runs.begin(out, ("in_update", {"step": 20, "do": "SIGKILL", "rank": lost}), ranks=2)
    assert runs.codes(children, 20)[1 - lost] == 1
    newest = out / "checkpoints" / f"step-{good_steps(out)[-1]:08d}"
    assert "another process of this run is gone" in children[1 - lost].output()
    assert f"the same command resumes from {newest} (step {good_steps(out)[-1]})" in children[1 - lost].output()


def test_nothing_is_silent_for_more_than_ten_seconds(tmp_path, runs) -> None:
    """A step of 128 micro-batches, a long validation: nothing is said for minutes, and one wonders."""
    out = tmp_path / "run"
    (step,) = runs.begin(out, ("in_update", {"step": 2, "do": "sleep"}), batch_tokens=128, micro_batch=4)
    (validation,) = runs.begin(tmp_path / "other", ("in_evaluation", {"number": 1, "do": "sleep"}))
    wait_until(lambda: "step 2: micro-batch 2 of 2, " in step.output(), 13)
    wait_until(lambda: "step 0: validation loss, " in validation.output(), 3)
    for child in (step, validation):
        child.send(signal.SIGKILL)
