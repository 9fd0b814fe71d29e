"""Checkpoints: a Hugging Face model folder, the optimizer's state, and the run's progress.

    step-00005000/  config.json model.safetensors ...   the model, as transformers loads it
                    optimizer.safetensors               the optimizer's state of each parameter, by its name
                    trainer.json                        step, loader state, resolved config, versions
                    manifest.json                       size and SHA-256 of every file, written last

A checkpoint appears whole or not at all, its hashes are checked before any tensor is used, and nothing is pickled.
There is no generator state: data and samples depend on (seed, step) alone, and there is no dropout.
"""

import errno
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import safetensors
import safetensors.torch
import torch

from gpt2_model import GPT
from gpt2_model.command import locked, sha256, sync
from gpt2_train.config import CannotResume, check_out
from gpt2_train.distributed import World
from gpt2_train.optimizer import Optimizers, own_state, state_shapes

FORMAT_VERSION = 2  # version 1, of gpt2-train 0.1.0, had a loader state that we no longer read
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]+")
Warn = Callable[[str], None]  # says a warning once


def write_checkpoint(
    run: Path, step: int, model: GPT, optimizer: Mapping[str, torch.Tensor], trainer: Mapping[str, Any],
    warn: Warn = lambda _: None,
) -> Path:  # fmt: skip
    """Write checkpoints/step-<step> of a run from tensors on the CPU, verify it, and return its path.

    Raises OSError if the disk is full or does not return what was written; older checkpoints stay untouched.
    """
    folder = checkpoint_folder(run, step)
    temporary = _temporary(folder)
    try:
        folder.parent.mkdir(exist_ok=True)  # and not the run's folder: a new one would hold only half of the run
        remove_abandoned(run, warn)
        temporary.mkdir()
        model.save_pretrained(temporary)
        safetensors.torch.save_file(dict(optimizer), temporary / "optimizer.safetensors", {"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(temporary / "config.json", temporary / "optimizer.safetensors")
        document = {"format_version": FORMAT_VERSION, "step": step, **trainer, "versions": versions()}
        (temporary / "trainer.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        paths = sorted(temporary.iterdir())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
        manifest = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2)
        (temporary / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
        for path in (*paths, temporary / "manifest.json", temporary):
            _fsync(path)
        if problems := verify_checkpoint(temporary):
            raise OSError(f"what the disk returns is not what was written: {problems[0]}")
        if folder.exists():  # a damaged one of this step, else the run would have resumed from it
            _delete(folder, warn)
        temporary.rename(folder)
        _fsync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be gone with all of the run
        if removed := [path for path in (run, folder.parent) if not path.is_dir()]:
            raise OSError(f"{removed[0]} was removed: the run folder must stay while the run trains") from error
        text = f"cannot write {folder}: {error}"
        # As Python and safetensors, which is written in Rust, say that the disk or the user's share of it is full.
        if re.search(rf"(Errno|os error) ({errno.ENOSPC}|{errno.EDQUOT})\b", str(error)):
            needed, free = 12e-9 * model.config.num_parameters, 1e-9 * shutil.disk_usage(run).free
            text += f" (about {needed:.3g} GB needed, {free:.3g} GB free)"
        text += "; the checkpoints before it are untouched" if checkpoints(run) else ""
        raise OSError(text) from error
    return folder


def versions() -> dict[str, str]:
    """Return the versions on which the bits of a run depend besides its config."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it exists or not."""
    return run / "checkpoints" / f"step-{step:08d}"


def remove_abandoned(run: Path, warn: Warn) -> None:
    """Delete what a kill during writing or deletion left. Only one process writes here, under a lock."""
    for abandoned in (run / "checkpoints").glob(".tmp-*"):
        _delete(abandoned, warn)


def _delete(folder: Path, warn: Warn) -> None:
    """Rename a folder, then delete it: what a kill in between leaves, or a disk keeps, is no checkpoint any more.

    A folder that cannot be deleted gets a warning: NFS keeps, renamed, a file that another process reads.
    """
    try:
        if not folder.name.startswith(".tmp-"):
            folder = folder.rename(_temporary(folder))
        shutil.rmtree(folder, ignore_errors=True)  # as much as can be
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        warn(f"{folder} cannot be deleted ({error.strerror}); the run continues, and each save tries again")


def _temporary(folder: Path) -> Path:
    """Return a new name that no checkpoint has: a folder of an older one may be there and stay."""
    return folder.with_name(f".tmp-{folder.name}-{token_hex(4)}")


def verify_checkpoint(folder: Path) -> list[str]:
    """Return what is wrong with a checkpoint, a line each; an empty list if every byte is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{folder / 'manifest.json'} cannot be read: {type(error).__name__} {error}"]
    if version != FORMAT_VERSION:
        return [f"{folder} has checkpoint format {version}; this program reads {FORMAT_VERSION}"]
    needed = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json")
    problems = [f"{folder / 'manifest.json'} does not list {name}" for name in needed if name not in expected]
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if not _FILE_NAME.fullmatch(name):
                problems.append(f"{folder / 'manifest.json'} lists {name!r}, which is no plain file name")
            elif not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")
            elif (actual := sha256(path)) != digest:
                problems.append(f"{path} is damaged: its SHA-256 is {actual[:12]}..., not {str(digest)[:12]}...")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return problems


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, whatever their state, lowest step first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _STEP_FOLDER.fullmatch(path.name))


def onward(run: Path) -> str:
    """Return where the run goes on from: the newest checkpoint, of which this does not read the gigabytes."""
    newest = next((path for path in reversed(checkpoints(run)) if (path / "manifest.json").exists()), None)
    return f"resumes from {newest} (step {int(newest.name[5:])})" if newest else "begins anew"


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the good checkpoint of the highest step (file times can be wrong), and what is wrong with later ones.

    Raises CannotResume if a newer program wrote a later one, whose work must not be undone.
    """
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        damage = verify_checkpoint(folder)
        if not damage:
            return folder, problems
        _refuse_newer(folder)
        problems += damage
    return None, problems


def _refuse_newer(folder: Path) -> None:
    try:
        version = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(version, int) and version > FORMAT_VERSION:
        newer = f"a newer gpt2-train (checkpoint format {version}, this one reads {FORMAT_VERSION})"
        raise CannotResume(f"{folder} was written by {newer}: update gpt2-train, or choose another --out")


def choose_checkpoint(run: Path, resume: str) -> Path | None:
    """Return the verified checkpoint that a run resumes from; None to begin at step 0.

    `resume` is "auto" for the newest good one in `run`, "never", or a checkpoint folder: the newest good one of
    `run`, or another run's, from which `run` begins until it has checkpoints of its own. Raises CannotResume if
    the one asked for is damaged or not the newest, if all are damaged, or if "never" would overwrite a run.
    """
    has_checkpoints, asked = bool(checkpoints(run)), Path(resume)
    if resume == "never":
        if has_checkpoints:
            raise CannotResume(f"{run} already contains a run, and --resume is never: choose another --out")
        return None
    inside = asked.absolute().parent == (run / "checkpoints").absolute()
    if resume == "auto" or (has_checkpoints and not inside):
        newest, problems = find_checkpoint(run)
        if newest is None and problems:
            advice = f"repair one, choose another --out, or delete {run / 'checkpoints'} to begin again at step 0"
            raise CannotResume(f"every checkpoint in {run} is damaged ({problems[0]}): {advice}")
        for problem in problems:
            with suppress(OSError, ValueError):  # nobody may be listening
                print(f"warning: {problem}; resuming from {newest}", file=sys.stderr)
        return newest
    _refuse_newer(asked)
    if not (asked / "manifest.json").exists():
        example = next(reversed(checkpoints(asked)), checkpoint_folder(run, 5000))
        raise CannotResume(f"--resume {resume} is not a checkpoint: name a folder like {example}")
    newest = find_checkpoint(run)[0] if inside else None
    if newest is not None and newest.name > asked.name:
        advice = f"choose another --out, or move the checkpoints after {asked.name} away"
        raise CannotResume(f"{run} already has {newest.name}: {advice}")
    # The newest was verified just now: its gigabytes need not be hashed again.
    if (newest is None or newest.name != asked.name) and (problems := verify_checkpoint(asked)):
        raise CannotResume(f"cannot resume {resume}: {problems[0]}")
    return asked


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Return the trainer.json of a verified checkpoint."""
    return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def optimizer_tensor(folder: Path, name: str) -> torch.Tensor:
    """Return a tensor of the optimizer's state in a verified checkpoint."""
    with safetensors.safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def prune(run: Path, keep: int, verified: set[str], warn: Warn) -> None:
    """Delete all but the `keep` newest good checkpoints; those named in `verified` are not hashed again.

    One that cannot be deleted is warned of. It takes no other's place: only newer ones count.
    """
    folders, good = checkpoints(run), 0
    if len(folders) <= keep:
        return
    for folder in reversed(folders):
        if good == keep:
            _delete(folder, warn)
        elif folder.name in verified or not verify_checkpoint(folder):
            verified.add(folder.name)
            good += 1


@contextmanager
def hold_folder(run: Path) -> Iterator[None]:
    """Lock a run's folder, created if needed and removed again if the run fails before it writes anything."""
    check_out(str(run))
    is_new = not run.exists()
    with locked(run):
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may have been moved away
                if is_new and [path.name for path in run.iterdir()] == [".lock"]:
                    (run / ".lock").unlink()
                    run.rmdir()


class Saver:
    """Saves a run while training continues: rank 0 copies it to host memory; its thread writes and verifies that.

    The copy takes 12 bytes a parameter from the first save on; with a GPU, its memory is page-locked.
    """

    def __init__(self, run: Path, keep: int, world: World, warn: Warn) -> None:
        self.run, self.keep, self.world, self.warn = run, keep, world, warn
        self.error: Exception | None = None  # the thread's error, which the loop raises or reports
        self._thread: threading.Thread | None = None
        self._model: GPT | None = None
        self._optimizer: dict[str, torch.Tensor] = {}
        self._verified: set[str] = set()  # names of checkpoints that this process has verified

    def save(self, step: int, model: GPT, optimizers: Optimizers, trainer: Mapping[str, Any]) -> None:
        """Copy the state as it is now, and begin to write it. Every rank must call it, after `wait`."""
        assert self._thread is None, "a checkpoint is still being written from the copy"
        if self.world.is_main and self._model is None:
            self._allocate(model, optimizers)
        if self._model is not None:
            for copy, tensor in zip(self._model.parameters(), model.parameters(), strict=True):
                copy.data.copy_(tensor.data, non_blocking=True)
        shapes = state_shapes(model, optimizers)
        self.world.collect(own_state(model, optimizers), self._optimizer or dict.fromkeys(shapes, torch.empty(0)))
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        if self._model is not None:
            self._thread = threading.Thread(target=self._write, args=(step, self._model, trainer), name="saver")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _allocate(self, model: GPT, optimizers: Optimizers) -> None:
        pin = self.world.device.type == "cuda"
        with torch.device("meta"):
            self._model = GPT(model.config)
        self._model.tokenizer, self._model.special_ids = model.tokenizer, model.special_ids
        weights = {name: torch.empty(tensor.shape, pin_memory=pin) for name, tensor in model.state_dict().items()}
        self._model.load_state_dict(weights, assign=True)
        shapes = state_shapes(model, optimizers)
        self._optimizer = {name: torch.empty(shape, pin_memory=pin) for name, shape in shapes.items()}

    def _write(self, step: int, model: GPT, trainer: Mapping[str, Any]) -> None:
        try:
            for name, tensor in (*model.named_parameters(), *self._optimizer.items()):
                if not torch.isfinite(tensor).all():
                    before = ": the checkpoints before it are good" if checkpoints(self.run) else ""
                    raise ValueError(f"{name} is not finite at step {step}{before}")
            written = write_checkpoint(self.run, step, model, self._optimizer, trainer, self.warn)
            self._verified.add(written.name)
            prune(self.run, self.keep, self._verified, self.warn)
        except (ValueError, OSError) as error:
            self.error = error
        except Exception as error:  # whatever it is, the loop must learn of it
            self.error = OSError(f"saving failed: {error!r}")


def _fsync(path: Path) -> None:
    """Flush the file and drop it from the page cache, so that verifying it reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
