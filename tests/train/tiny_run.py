"""The smallest run, its command line, and what it leaves behind."""

from pathlib import Path

from train_faults import SETTINGS, SHAPE, command_line, rows

TINY = {**SETTINGS, "steps": 12, "eval_every": 0, "checkpoint_every": 4, "micro_batch": "4", "model": SHAPE}


def flags(data: Path, out: Path, **changes) -> list[str]:
    """Return the command line of the smallest run, with changes."""
    return command_line(data, out, **{**TINY, **changes})


def losses(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of each training row, in the file's order."""
    return [(row["step"], row["loss"]) for row in rows(run)]
