"""Several torchrun agents meet as several nodes do, here on one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import TINY, flags, losses

from gpt2_train import TrainConfig, train, verify_checkpoint

SETTINGS = {"batch_tokens": 6 * 16, "micro_batch": 1, "checkpoint_every": 6, "eval_every": 6, "eval_tokens": 64}


def torchrun(program: list[str], options: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOG_OF_WRITES": str(log)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@pytest.mark.slow
def test_three_ranks_on_two_nodes_train_as_one_process(dataset, tmp_path) -> None:
    train(TrainConfig(**{**TINY, **SETTINGS, "micro_batch": "6"}, data=str(dataset), out=str(tmp_path / "alone")))
    nodes = [2, 1]  # ranks of each
    out, port = tmp_path / "run", free_port()
    program = [str(Path(__file__).with_name("logged_writes.py")), *flags(dataset, out, **SETTINGS)]
    meet = [f"--nnodes={len(nodes)}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=a"]
    agents = [
        torchrun(program, [*meet, "--local-addr=localhost", f"--nproc_per_node={ranks}"], tmp_path / "writes")
        for ranks in nodes
    ]
    for agent in agents:
        output, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, output

    np.testing.assert_allclose(losses(out), losses(tmp_path / "alone"), rtol=1e-5)
    folders = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000006", "step-00000012"]
    assert [verify_checkpoint(folder) for folder in folders] == [[], []]
    # Each was written once, and by rank 0; no other rank wrote anything into the run's folder.
    writes = [json.loads(line) for line in (tmp_path / "writes").read_text().splitlines()]
    renamed = [(rank, path) for rank, event, path in writes if event == "os.rename" and "/step-" in path]
    assert renamed == [("0", str(folder)) for folder in folders]
    assert {rank for rank, _, path in writes if path.startswith(str(out))} == {"0"}
    assert {rank for rank, event, _ in writes if event == "start"} == {str(rank) for rank in range(sum(nodes))}
