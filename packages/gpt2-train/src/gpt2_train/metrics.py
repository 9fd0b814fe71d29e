"""What a run records: metrics.jsonl and samples.jsonl in its folder, the terminal, TensorBoard, W&B.

A row is one write of one line, so that a kill leaves at most the last one in pieces. Rows reach the disk before a
checkpoint does (flush), and a run that goes on from it drops the later ones, which are about to be written again.
"""

import json
import math
import os
import re
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from gpt2_train.config import TrainConfig
from gpt2_train.console import Console
from gpt2_train.trackers import TensorBoard, Tracker, WeightsAndBiases, check_trackers, in_one_line

# Dense bf16 with sums in fp32, TFLOP/s, of the makers' data sheets; the first that fits. Other GPUs, parts of one
# (MIG) and the slower ones of the same name are not guessed at.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0,
    "H800": 989.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "MI300X": 1307.0,
}  # fmt: skip
_OTHER_THAN_NAMED = re.compile(r"\b(MIG|Laptop|Max-Q|4090 D)\b")


class RunLog:
    """All that a run tells. Made on every rank; it does nothing on those where it is not enabled.

    Args:
        config: the run, its precision resolved.
        folder: of the run.
        first_step: the step that training goes on from; rows of later steps are dropped. -1: a fresh start, no
            row is kept.
        world_size: processes of the run.
        device: this process's.
        flops_per_token: llm.c's count, forward and backward.
        enabled: on rank 0.

    Attributes:
        last_evaluation: step of the newest evaluation that was kept, None if there is none. Of rank 0 alone:
            share it before deciding by it.

    Raises:
        ValueError: a tracker was asked for that is not installed, or, in a fresh run, does not start.
        OSError: the files cannot be read or written; also from the methods that write them.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        first_step: int,
        world_size: int,
        device: torch.device,
        flops_per_token: int,
        enabled: bool,
    ) -> None:
        self.config, self.enabled, self.flops_per_token = config, enabled, flops_per_token
        self.last_evaluation: int | None = None
        self.trackers: list[Tracker] = []
        if not enabled:
            return
        check_trackers(config)
        evaluated, broken = _repair(folder, first_step)
        self.last_evaluation = max(evaluated, default=None)
        self.metrics, self.samples = _Lines(folder / "metrics.jsonl"), _Lines(folder / "samples.jsonl")
        _sync_folder(folder)
        self.console = Console(config)
        if broken:
            self.say(f"metrics.jsonl, samples.jsonl: {broken} broken line{'s' * (broken > 1)} dropped")
        peak = peak_tflops(config, device)
        self.peak = peak[1] * 1e12 * world_size if peak else None
        self.say(_about_mfu(config, device, world_size, flops_per_token, peak))
        if config.tensorboard:
            self.trackers.append(TensorBoard(folder, first_step))
        if config.wandb:
            self._start_wandb(folder, first_step)

    def _start_wandb(self, folder: Path, first_step: int) -> None:
        try:
            self.trackers.append(WeightsAndBiases(self.config, folder, first_step))
        except RuntimeError as error:
            # Whoever starts a run wants to know. One that goes on, at night after a restart, goes on without.
            if first_step < 0:
                raise ValueError(f"{error}; leave --wandb away, or set WANDB_MODE=offline") from None
            self.say(f"warning: {error}; the run goes on without it")

    def train(self, row: dict[str, Any]) -> None:
        """Record a step.

        Args:
            row: step, tokens, loss, grad_norm, lr, seconds, data_seconds, peak_memory; where it applies
                skipped (why the update was left out).
        """
        if not self.enabled:
            return
        speed = None
        if row["seconds"] > 0:
            speed = self.config.batch_tokens / row["seconds"]
        used = None if speed is None or self.peak is None else speed * self.flops_per_token / self.peak
        row = finite({**row, "tokens_per_second": speed, "mfu": used})
        self.metrics.append(row)
        names = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds", "data_seconds", "peak_memory")
        self._track("scalars", row["step"], {f"train/{name}": row[name] for name in names if name in row})
        self.console.step(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record an evaluation: step, tokens, val_loss and hellaswag_acc_norm where they were measured, seconds.

        Its samples come before it: without this row, they are dropped when the run goes on.
        """
        if not self.enabled:
            return
        row = finite(row)
        self.metrics.append(row)
        self.last_evaluation = row["step"]
        self.console.left.evaluated(row.get("seconds", 0.0))
        parts = []
        for name, title, form in (
            ("val_loss", "validation loss", ".4f"),
            ("hellaswag_acc_norm", "HellaSwag", ".2%"),
            ("seconds", "in", ".1f"),
        ):
            if name in row:
                value = "not finite" if row[name] is None else format(row[name], form)
                parts.append(f"{title} {value}" + " s" * (name == "seconds"))
            if name in row and name != "seconds":
                self._track("scalars", row["step"], {f"val/{name.removeprefix('val_')}": row[name]})
        self.say(f"step {row['step']:,}: {'   '.join(parts)}")

    def sample(self, row: dict[str, Any]) -> None:
        """Record a text (step, row, prompt, text), and show the first of an evaluation on one line."""
        if not self.enabled:
            return
        self.samples.append(row)
        if row["row"] == 0:
            # A model may write anything, also what moves the cursor or renames the window.
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{row['prompt']}|{row['text']}")
            self.say(f"  {text}"[:160])

    def say(self, text: str) -> None:
        """One line on stderr. Never fails."""
        if self.enabled:
            self.console.say(text)

    def flush(self) -> None:
        """Have all rows on the disk: a checkpoint must not be older than they are."""
        if self.enabled:
            self.metrics.sync()
            self.samples.sync()
            self._track("flush")

    def close(self) -> None:
        """End it; once is enough. Lines may still be said."""
        if not self.enabled:
            return
        self.console.close()
        self._track("close")
        self.trackers = []
        self.metrics.close()
        self.samples.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _track(self, method: str, *arguments: Any) -> None:
        """Tell the trackers; one that fails is told no more, and the run goes on."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(
                    f"warning: {tracker.name} failed ({in_one_line(error)}): the run goes on without it; "
                    "metrics.jsonl has all rows"
                )


def peak_tflops(config: TrainConfig, device: torch.device) -> tuple[str, float] | None:
    """The device's name and its peak in TFLOP/s, by --peak-tflops or, in bf16, by the table; None if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if config.peak_tflops:
        return name, config.peak_tflops
    if device.type != "cuda" or config.precision != "bf16" or _OTHER_THAN_NAMED.search(name):
        return None
    return next(
        ((part, peak) for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(part)}\b", name)), None
    )


def _about_mfu(
    config: TrainConfig, device: torch.device, world_size: int, flops: int, peak: tuple[str, float] | None
) -> str:
    formula = f"MFU: 6N + 6LCT = {flops / 1e6:,.0f} MFLOP a token"
    if peak is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        return f"{formula}; no peak known of {name} in {config.precision}: --peak-tflops gives one"
    source = "as --peak-tflops says" if config.peak_tflops else "bf16 dense"
    times = f"{world_size} x " if world_size > 1 else ""
    return f"{formula} of {times}{peak[0]}'s {peak[1]:,.4g} TFLOP/s ({source})"


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it: a number that is not finite is null, and `skipped` tells what it was.

    In a row that was not skipped, `not_finite` tells.
    """
    odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if not odd:
        return row
    told = ", ".join(f"{name} {row[name]}" for name in odd)
    nulls: dict[str, Any] = {**row, **dict.fromkeys(odd)}
    if "skipped" not in row:
        return {**nulls, "not_finite": told}
    return {**nulls, "skipped": f"{row['skipped']} ({told})"}


class _Lines:
    """A file that rows are appended to. It stays open: a process that is short of descriptors loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._cannot(error) from None
        self.close = weakref.finalize(self, os.close, self.descriptor)  # also when a run fails while it begins

    def append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
        end = os.lseek(self.descriptor, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a part first, and fails then
                written += os.write(self.descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self.descriptor, end)
            raise self._cannot(error) from None

    def sync(self) -> None:
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> OSError:
        text = f"{self.path} cannot be written ({error.strerror}): mend that, and the same command goes on"
        return OSError(error.errno, text)


def _repair(folder: Path, first_step: int) -> tuple[set[int], int]:
    """Drop rows after first_step, samples without an evaluation, and lines that a kill cut short.

    Returns:
        The steps whose evaluation was kept, and the number of lines that were broken.
    """
    rows, broken = _read(folder / "metrics.jsonl")
    kept = [(line, row) for line, row in rows if row["step"] <= first_step]
    evaluated = {row["step"] for _, row in kept if "loss" not in row}
    samples, broken_samples = _read(folder / "samples.jsonl")
    texts = [line for line, row in samples if row["step"] in evaluated]
    _replace(folder / "metrics.jsonl", [line for line, _ in kept])
    _replace(folder / "samples.jsonl", texts)
    return evaluated, broken + broken_samples


def _read(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """The lines that are rows, and how many are not. By bytes: a text may hold what str.splitlines cuts at."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    rows, broken = [], 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append((line + b"\n", row))
        else:
            broken += 1
    return rows, broken


def _replace(path: Path, lines: list[bytes]) -> None:
    content = b"".join(lines)
    if not path.exists() or path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
