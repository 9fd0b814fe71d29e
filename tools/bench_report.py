"""Where a benchmark's figures come from, what follows from them, and how they are written down."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

FEATURES = (
    "avx2",
    "sha_ni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)
LIBRARIES = {
    "decode": ("gpt2-model", "torch", "transformers", "ctranslate2", "numpy"),
    "data": ("gpt2-data", "tiktoken", "gigatoken", "pyarrow", "datasets", "transformers", "tokenizers", "numpy"),
    "eval": ("gpt2-eval", "gpt2-model", "torch", "transformers", "lm-eval", "numpy"),
    "train": ("gpt2-train", "gpt2-model", "torch", "triton", "transformers", "accelerate", "numpy"),
    "scaling": ("gpt2-train", "gpt2-model", "gpt2-data", "torch", "numpy"),
    "suite": (
        "gpt2-model",
        "gpt2-data",
        "gpt2-train",
        "gpt2-eval",
        "torch",
        "tiktoken",
        "gigatoken",
        "pyarrow",
        "numpy",
    ),
}
LIBRARIES["compare"] = LIBRARIES["suite"]


def say(text: str) -> None:
    """Progress."""
    click.echo(text, err=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def in_short(values: dict[str, Any], scale: float = 1.0) -> str:
    """Its median and ends, to three digits or so."""
    median, least, most = (short(values[name] * scale) for name in ("median", "min", "max"))
    return f"{median} ({least}..{most})"


def short(value: float) -> str:
    """1.24G, 83.1M, 12k, 792, 37.6, 5.25."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    if value >= 10_000:
        return f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bar(text: str, value: float, least: float = 0.0, most: float = float("inf")) -> dict[str, Any]:
    """A line of what `--check` holds."""
    return {"bar": text, "value": value, "holds": least <= value <= most}


def provenance(command: str, device: str = "cpu") -> dict[str, Any]:
    """What was run, when, on which commit of the project, and on what."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES[command]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu = ""
    lines = dict(part.split(":", 1) for part in cpu.splitlines() if ":" in part)
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
    }
    if device == "cuda":
        import torch

        driver = f"CUDA {torch.version.cuda}"
        machine["gpu"] = f"{torch.cuda.get_device_name()}, {driver}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": machine,
        "versions": versions,
    }


def _commit() -> str | None:
    """Short, with a + where the working tree has changes; None outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run(
        [*git, "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True
    )
    return found.stdout.strip() or None


def write(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
