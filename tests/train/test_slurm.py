"""slurm.sh, with an srun and an scontrol of a few lines in the place of Slurm's: two nodes, both this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import flags, losses
from train_faults import good_steps, wait_until

SCRIPT = Path(__file__).parents[2] / "packages" / "gpt2-train" / "slurm.sh"
# Slurm sends a signal to a step's tasks, not to what these have started. The first node has a GPU more.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
more = [word.replace("nproc_per_node=1", "nproc_per_node=2") for word in words]
nodes = [more, words][: int(os.environ["SLURM_NNODES"])]
tasks = [subprocess.Popen(words) for words in nodes]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
  *) echo "$@" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Arguments of slurm.sh -> the job."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "calls").touch()
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost,localhost",
    }  # fmt: skip

    def start(*words: str, nodes: int) -> subprocess.Popen:
        command, environment = ["bash", SCRIPT, *words], {**os.environ, **variables, "SLURM_NNODES": str(nodes)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


@pytest.mark.slow
def test_a_job_that_is_out_of_time_is_saved_and_queued_again(dataset, tmp_path, runs, slurm) -> None:
    """Three ranks on two nodes: until then they train as one process does."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    changes = {"batch_tokens": 6 * 16, "checkpoint_every": 0, "eval_every": 0, "schedule": "wsd", "decay_steps": 1}
    assert runs.run(alone, steps=20, micro_batch=6, **changes) == 0
    job = slurm(*flags(dataset, out, steps=100_000, micro_batch=1, **changes), nodes=2)
    wait_until(lambda: job.poll() is not None or len(losses(out)) >= 12, 120)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1, output  # torchrun's, whose processes ended with 138
    assert "fp32 on 3 x cpu" in output
    np.testing.assert_allclose(losses(out)[:12], losses(alone)[:12], rtol=1e-5)
    last = losses(out)[-1][0]
    assert f"stopped by signal 10 at step {last}; the same command resumes from there" in output
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert good_steps(out) == [last]


@pytest.mark.slow
def test_a_run_that_fails_ends_the_job(tmp_path, slurm) -> None:
    """Not queued again: it would fail again."""
    job = slurm("--no-such-option", nodes=1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "No such option" in output
    assert (tmp_path / "calls").read_text() == ""
