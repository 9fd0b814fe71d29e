"""Where a run's folder can be, and what its checkpoints take there. No torch here."""

import os
import shutil
from pathlib import Path

from gpt2_model.config import GPTConfig
from gpt2_train.config import TrainConfig

FILES_BYTES = 4_000_000  # of a checkpoint beside its tensors: vocabulary, settings, hashes


def check_out(out: Path) -> None:
    """Raise OSError if the run's folder is not there and cannot be made, or cannot be written to."""
    parent = existing(out)
    if not parent.is_dir():
        raise NotADirectoryError(f"--out {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {parent} cannot be written to")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def checkpoint_bytes(config: TrainConfig, shape: GPTConfig) -> int:
    """Size of a checkpoint: 12 bytes a parameter with AdamW, and the vocabulary's files."""
    return 4 * shape.num_parameters + optimizer_bytes(config, shape, 1) + FILES_BYTES


def checkpoints_at_once(config: TrainConfig) -> int:
    """How many are on the disk at most: those to keep, and the one that is written before the oldest goes."""
    written = config.steps // config.checkpoint_every if config.checkpoint_every else 0
    last = 1 if not config.checkpoint_every or config.steps % config.checkpoint_every else 0
    return min(config.keep + 1, written + last)


def check_space(run: Path, config: TrainConfig, shape: GPTConfig) -> None:
    """See to it that the checkpoints which will be there at once fit on the disk of the run's folder.

    What the run has there counts as free: it makes room as new ones are written.

    Raises:
        OSError: they do not; says how much is needed and free.
    """
    each, number = checkpoint_bytes(config, shape), checkpoints_at_once(config)
    own = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(existing(run)).free
    if number * each > free + own:
        raise OSError(
            f"{run} will need {in_gb(number * each)} for {number} checkpoints of {in_gb(each)}, and "
            f"{in_gb(free)} are free{f' beside the {in_gb(own)} it has' if own else ''}: free some, choose "
            "another --out or a lower --keep"
        )


def optimizer_bytes(config: TrainConfig, shape: GPTConfig, world_size: int) -> int:
    """Of the optimizer's state on a process: AdamW has two fp32 moments, Muon one, for the blocks' matrices.

    Shared out, whole tensors go to the processes, so that one has the token embedding's at least.
    """
    muon = shape.matrix_parameters if config.optimizer == "muon" else 0
    total = 8 * shape.num_parameters - 4 * muon
    if not config.shard_optimizer:
        return total
    return max(-(-total // world_size), 8 * shape.vocab_size * shape.n_embd)


def in_gb(size: float) -> str:
    """Bytes as "1.50 GB"."""
    return f"{size / 1e9:,.2f} GB" if size < 99.5e9 else f"{size / 1e9:,.0f} GB"
