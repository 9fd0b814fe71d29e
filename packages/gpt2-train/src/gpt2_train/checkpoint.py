"""Checkpoints: a Hugging Face model folder, the optimizer, and where the run stood.

    step-00005000/  config.json model.safetensors ...   the model, as transformers loads it
                    optimizer.safetensors               the optimizer's state of each parameter, by its name
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
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from gpt2_model import GPT
from gpt2_train.config import CannotResume
from gpt2_train.space import existing

FORMAT_VERSION = 2  # 1, of gpt2-train 0.1.0, had a loader's state that is no longer read
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")


def write_checkpoint(
    run: Path, step: int, model: GPT, optimizer: Mapping[str, torch.Tensor], trainer: Mapping[str, Any]
) -> Path:
    """Write checkpoints/step-<step> of a run, verify it, and return its path.

    Args:
        model, optimizer: on the CPU; nothing may change them meanwhile.

    Raises:
        OSError: the disk is full or not writable, or does not give back what was written; the checkpoints that
            were there are untouched.
    """
    folder = checkpoint_folder(run, step)
    if not run.is_dir():  # made at the start of a run: if it is gone, a new one would hold half a run
        raise OSError(f"{run} is gone: the run's folder must stay while it trains")
    folder.parent.mkdir(exist_ok=True)
    remove_abandoned(run)
    temporary = folder.parent / f".tmp-{folder.name}"
    try:
        temporary.mkdir()
        model.save_pretrained(temporary)
        safetensors.torch.save_file(dict(optimizer), temporary / "optimizer.safetensors", {"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(temporary / "config.json", temporary / "optimizer.safetensors")
        document = {"format_version": FORMAT_VERSION, "step": step, **trainer, "versions": versions()}
        _write_json(temporary / "trainer.json", document)
        names = sorted(path.name for path in temporary.iterdir())
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
            for name in names
        }
        _write_json(temporary / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})
        for name in [*names, "manifest.json", "."]:
            _fsync(temporary / name)
        if problems := verify_checkpoint(temporary):
            raise OSError(f"the disk does not give back what was written: {problems[0]}")
        if folder.exists():  # a damaged one of this step, or the run would have gone on from it
            _remove(folder)
        temporary.rename(folder)
        _fsync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        # ignore_errors: the folder may be gone with all of the run
        shutil.rmtree(temporary, ignore_errors=True)
        needed, free = 12 * model.config.num_parameters, shutil.disk_usage(existing(folder)).free
        raise OSError(
            f"cannot write {folder}: {error} (about {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free); "
            "the checkpoints before it are untouched"
        ) from error
    return folder


def versions() -> dict[str, str]:
    """Of what the bits of a run hang on besides its config."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:08d}"


def remove_abandoned(run: Path) -> None:
    """Delete what a kill in mid-write or mid-deletion left. Only one process writes here, under a lock."""
    for abandoned in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(abandoned)


def verify_checkpoint(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a finding; an empty list when every byte is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        elif (found := _sha256(path)) != digest:
            problems.append(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., not the recorded {str(digest)[:12]}..."
            )
    return problems


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whatever their state, lowest step first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if _STEP_FOLDER.fullmatch(path.name))


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the highest step that verifies, and what was wrong with those above it.

    By step, not by time: clocks jump.

    Raises:
        CannotResume: one above it is of a newer program, which an older one must not undo.
    """
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        found = verify_checkpoint(folder)
        if not found:
            return folder, problems
        _refuse_newer(folder)
        problems += found
    return None, problems


def _refuse_newer(folder: Path, name: str = "manifest.json") -> None:
    try:
        version = json.loads((folder / name).read_text(encoding="utf-8"))["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CannotResume(
            f"{folder} was written by a newer gpt2-train (checkpoint format {version}, this one reads "
            f"{FORMAT_VERSION}): update gpt2-train, or choose another --out"
        )


def choose_checkpoint(run: Path, resume: str) -> Path | None:
    """The verified checkpoint that a run goes on from; None to begin at step 0.

    Args:
        resume: "auto" for the newest good one in `run`, "never", or a checkpoint folder: the newest good one of
            `run`, or another run's, from which `run` begins (and, once it has checkpoints of its own, goes on).

    Raises:
        CannotResume: the one asked for is damaged or not the newest, all of them are, or "never" would write over
            a run.
    """
    if resume == "never":
        if checkpoints(run):
            raise CannotResume(f"{run} holds a run, and --resume never was given: choose another --out")
        return None
    asked = Path(resume)
    inside = asked.absolute().parent == (run / "checkpoints").absolute()
    if resume != "auto" and (inside or not checkpoints(run)):  # else it was begun from before: go on with it
        _refuse_newer(asked)
        if not (asked / "manifest.json").exists():
            raise CannotResume(
                f"--resume {resume} is no checkpoint: name a folder like {checkpoint_folder(run, 5000)}"
            )
        newest = find_checkpoint(run)[0] if inside else None
        if newest is not None and newest.name == asked.name:
            return asked  # verified just now: gigabytes that need no more hashing
        if problems := verify_checkpoint(asked):
            raise CannotResume(f"cannot resume {resume}: {problems[0]}")
        if newest is not None and newest.name > asked.name:
            raise CannotResume(
                f"{run} has gone on to {newest.name}: choose another --out, or move the checkpoints after "
                f"{asked.name} away"
            )
        return asked
    found, problems = find_checkpoint(run)
    if found is None and problems:
        raise CannotResume(
            f"every checkpoint in {run} is damaged ({problems[0]}): repair one, choose another --out, or delete "
            f"{run / 'checkpoints'} to begin again at step 0"
        )
    for problem in problems:
        print(f"warning: {problem}; going back to {found}", file=sys.stderr)
    return found


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer.json of a verified checkpoint. Raises CannotResume if a newer program wrote it."""
    state: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    _refuse_newer(folder, "trainer.json")
    return state


class OptimizerFile:
    """The optimizer's tensors of a verified checkpoint, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "optimizer.safetensors"

    def __getitem__(self, name: str) -> torch.Tensor:
        with safetensors.safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


def prune(run: Path, keep: int, verified: set[str]) -> None:
    """Delete all but the `keep` newest good checkpoints.

    Damaged ones do not count, so that they never push out a good one. A folder is renamed before it is emptied:
    a kill in between leaves nothing that looks like a checkpoint.

    Args:
        verified: names of those that this process has read back already; gigabytes that need no more hashing.
            Those that are checked here are added.
    """
    folders, good = checkpoints(run), 0
    if len(folders) <= keep:
        return
    for folder in reversed(folders):
        if good == keep:
            _remove(folder)
        elif folder.name in verified or not verify_checkpoint(folder):
            verified.add(folder.name)
            good += 1


def _remove(folder: Path) -> None:
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
            owner = file.read().strip() or "another process"
            raise ValueError(f"{run} is in use by {owner}: wait for it, or choose another --out") from None
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
        file.flush()
        yield


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Have the disk hold it, and the page cache forget it: what is read to verify it then comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
