"""Checkpoints: a Hugging Face model folder, the optimizer, and where the run stood.

    step-00005000/  config.json model.safetensors ...   the model, as transformers loads it
                    optimizer.safetensors               AdamW's two moments of each parameter, by its name
                    trainer.json                        step, loader state, resolved config, versions
                    manifest.json                       size and SHA-256 of every file, written last

A checkpoint is written under another name, flushed, and renamed: a kill leaves all of it or nothing. No format in
use notices a flipped bit by itself, so the hashes are checked before any tensor is used. Nothing is pickled.
There is no generator state: after the first weights nothing draws from one. The order of the data and the samples
depend on (seed, step) alone, and GPT-2 is pretrained without dropout.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from gpt2_model import GPT

FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")


def save_checkpoint(
    run: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]
) -> Path:
    """Write checkpoints/step-<step> of a run and return its path; one that is there and good is left alone.

    Raises:
        OSError: the disk is full or not writable; checkpoints that were there are untouched.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    if folder.exists():
        if not verify_checkpoint(folder):
            return folder
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(".tmp-*"):  # a kill left it; only one process writes here, under a lock
        shutil.rmtree(abandoned)
    temporary = folder.parent / f".tmp-{folder.name}"
    temporary.mkdir()
    try:
        model.save_pretrained(temporary)
        tensors, steps = _optimizer_tensors(model, optimizer)
        safetensors.torch.save_file(tensors, temporary / "optimizer.safetensors", {"format": "pt"})
        document = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "optimizer_steps": steps,
            **trainer,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        (temporary / "trainer.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        names = sorted(path.name for path in temporary.iterdir())
        hashes = {n: {"bytes": (temporary / n).stat().st_size, "sha256": _sha256(temporary / n)} for n in names}
        manifest = {"format_version": FORMAT_VERSION, "files": hashes}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in [*names, "manifest.json", "."]:
            _fsync(temporary / name)
        temporary.rename(folder)
        _fsync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        needed, free = 12 * model.config.num_parameters, shutil.disk_usage(folder.parent).free
        raise OSError(
            f"cannot write {folder}: {error} (about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free); "
            "the checkpoints before it are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def verify_checkpoint(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a finding; an empty list when every byte is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'manifest.json'} cannot be read: {type(error).__name__} {error}"]
    if version != FORMAT_VERSION:
        return [f"{folder} has checkpoint format {version}; this program reads {FORMAT_VERSION}"]
    problems = []
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"):
        if name not in expected:
            problems.append(f"{folder / 'manifest.json'} does not list {name}")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not _FILE_NAME.fullmatch(name):
            problems.append(f"{folder / 'manifest.json'} lists {name!r}, which is no plain file name")
        elif not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif _sha256(path) != digest:
            problems.append(f"{path} is damaged: its SHA-256 is not the recorded one")
    return problems


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whatever their state, lowest step first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if _STEP_FOLDER.fullmatch(path.name))


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the highest step that verifies, and what was wrong with those above it.

    By step, not by time: clocks jump.
    """
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        found = verify_checkpoint(folder)
        if not found:
            return folder, problems
        problems += found
    return None, problems


def choose_checkpoint(run: Path, resume: str) -> Path | None:
    """The verified checkpoint that a run goes on from; None to begin at step 0.

    Args:
        resume: "auto" for the newest good one in `run`, "never", or a checkpoint folder.

    Raises:
        ValueError: the one asked for is damaged, all of them are, or "never" would write over a run.
    """
    if resume == "never":
        if checkpoints(run):
            raise ValueError(f"{run} holds a run, and --resume never was given: choose another --out")
        return None
    if resume != "auto":
        problems = verify_checkpoint(Path(resume))
        if problems:
            raise ValueError(f"cannot resume {resume}: {problems[0]}")
        return Path(resume)
    found, problems = find_checkpoint(run)
    if found is None and problems:
        raise ValueError(
            f"every checkpoint in {run} is damaged ({problems[0]}): repair one, or choose another --out"
        )
    for problem in problems:
        print(f"warning: {problem}; going back to {found}", file=sys.stderr)
    return found


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return state


def load_optimizer(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the moments of a verified checkpoint, bit for bit."""
    tensors = safetensors.torch.load_file(folder / "optimizer.safetensors")
    steps = read_trainer_state(folder)["optimizer_steps"]
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            # Fused AdamW keeps its count of steps beside the parameter, in fp32.
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
        }


def prune(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest good checkpoints, after the newest one has been verified.

    Damaged ones do not count, so that they never push out a good one. A folder is renamed before it is emptied:
    a kill in between leaves nothing that looks like a checkpoint.
    """
    folders, good = checkpoints(run), 0
    if len(folders) <= keep:  # nothing to delete, and so gigabytes that need no hashing
        return
    for folder in reversed(folders):
        if good < keep:
            good += not verify_checkpoint(folder)
            continue
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be: two trainers in one folder would mix their checkpoints.

    The kernel drops the lock with the process, however that ends.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be made or written to.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            raise ValueError(f"{run} is in use by process {owner}: wait for it, or choose another --out") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], int]:
    tensors, steps = {}, 0
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:  # before the first step there is nothing yet
            state = {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = state[key].detach().cpu().contiguous()
        steps = int(state["step"])
    return tensors, steps


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
