"""slurm.sh, with an srun and an scontrol of a few lines in the place of Slurm's: two nodes, both this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import flags, losses

from gpt2_train import verify_checkpoint

SCRIPT = Path(__file__).parents[2] / "packages" / "gpt2-train" / "slurm.sh"
# Slurm sends a signal to a step's tasks, not to what these have started.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words) for _ in range(int(os.environ["SLURM_NNODES"]))]
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
def test_a_job_that_is_out_of_time_is_saved_and_queued_again(dataset, tmp_path, slurm) -> None:
    out = tmp_path / "run"
    job = slurm(*flags(dataset, out, micro_batch=2, checkpoint_every=0, steps=100_000), nodes=2)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and losses(out)) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1, output  # torchrun's, whose processes ended with 138
    last = losses(out)[-1][0]
    assert f"stopped by signal 10 at step {last}; the same command resumes from there" in output
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert verify_checkpoint(out / "checkpoints" / f"step-{last:08d}") == []


def test_a_run_that_fails_ends_the_job(tmp_path, slurm) -> None:
    """Not queued again: it would fail again."""
    job = slurm("--no-such-option", nodes=1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "No such option" in output
    assert (tmp_path / "calls").read_text() == ""
