"""The smallest run, its command line, and what it leaves behind."""

import hashlib
import json
from pathlib import Path

# 800,000 parameters, nearly all of them embeddings, and 64 tokens a step: 30 steps take about a second.
TINY = {
    "steps": 12, "batch_tokens": 64, "seq_len": 16, "lr": 1e-2, "min_lr": 1e-3, "warmup": 3, "device": "cpu",
    "precision": "fp32", "eval_every": 0, "checkpoint_every": 4, "micro_batch": "4",
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32},
}  # fmt: skip


def flags(data: Path, out: Path, **changes) -> list[str]:
    """The command line of the smallest run, with changes."""
    settings = {**TINY, **changes, "data": data, "out": out}
    model = settings.pop("model")
    words = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return words + [part for name, value in model.items() for part in ("--model", f"{name}={value}")]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each training row, in the file's order."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of the weights and of the optimizer's state after a step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
