"""A log of a run, and rows for it."""

import json
from pathlib import Path

import torch

from gpt2_train.config import TrainConfig
from gpt2_train.distributed import World
from gpt2_train.metrics import RunLog


def open_log(folder: Path, first_step: int = -1, world_size: int = 1, enabled: bool = True, **settings) -> RunLog:
    """Return the log of a run in a folder, opened on rank 0; `evaluated` is what opening it returned."""
    folder.mkdir(exist_ok=True)
    settings = {"steps": 100, "batch_tokens": 1000, "precision": "bf16", "eval_every": 5, **settings}
    world = World(int(not enabled), world_size, torch.device("cpu"))
    log = RunLog(settings["steps"], world)
    log.evaluated = log.open(TrainConfig(out=str(folder), **settings), first_step) if enabled else None
    return log


def train_row(step: int, **changes):
    return {
        "step": step, "tokens": step * 1000, "loss": 10.0 / step, "grad_norm": 1.0, "lr": 1e-3, "seconds": 0.5,
        "data_seconds": 0.001, "peak_memory": 10**6, **changes,
    }  # fmt: skip


def write_run(log: RunLog, first: int, last: int) -> None:
    """Steps first to last, an evaluation with two samples after each fifth."""
    for step in range(first, last + 1):
        log.train(train_row(step))
        if step % 5 == 0:
            for row in range(2):
                log.sample({"step": step, "row": row, "prompt": "Hi", "text": "two\u2028lines\x85 \x1b[2J"})
            log.evaluation({"step": step, "tokens": step * 1000, "val_loss": 3.0, "seconds": 2.0})


def rows_of(folder: Path, name: str = "metrics.jsonl"):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_bytes().splitlines()]
