"""What a run records: metrics.jsonl and samples.jsonl in its folder, the terminal, TensorBoard, W&B; its speed.

A row is one line, written at once, so that a kill can break only the last one. Rows reach the disk before a
checkpoint does (flush), and a run that resumes from it drops the later rows, which it will write again.
No failure to report ends a run: it is said once, rows wait in memory for the disk, trackers for the next flush.
"""

import json
import math
import os
import re
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from gpt2_model import flops_per_token
from gpt2_model.command import sync, sync_folder, write_whole
from gpt2_train.config import TrainConfig
from gpt2_train.console import Console
from gpt2_train.distributed import World
from gpt2_train.trackers import Tracker, check_trackers, in_one_line, start_tensorboard, start_wandb

# TFLOP/s in dense bf16 with fp32 sums, from the makers' data sheets; the first match counts. We do not guess those
# of other GPUs, of parts of one (MIG) and of slower ones of the same name.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0,
    "H800": 989.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "MI300X": 1307.0,
}  # fmt: skip
GPU_SHARE = 0.40  # of the maker's peak: 124M reaches 38 % of it with llm.c on eight H100s, 56 % on eight A100s
PRODUCT_SHARE = 0.70  # of the rate of a large matrix product: what a step reaches on other devices
EVALUATION_WORDS = (
    ("val_loss", "validation loss {}", ".4f"), ("hellaswag_acc_norm", "HellaSwag {}", ".2%"),
    ("seconds", "in {} s", ".1f"),
)  # fmt: skip
_OTHER_THAN_NAMED = re.compile(r"\b(MIG|Laptop|Max-Q|4090 D)\b")


class RunLog:
    """Everything that a run reports. Each rank has one; only rank 0, which must `open` it, writes anything."""

    def __init__(self, steps: int, world: World) -> None:
        self.world, self.enabled = world, world.is_main
        self.console = Console(steps, self.enabled)
        self.say, self.progress = self.console.say, self.console.doing
        self.lowest = math.inf  # loss so far
        self.files: list[_Lines] = []
        self.trackers: list[Tracker] = []
        self.resting = set[str]()  # trackers that failed, until the next flush
        self.warned = set[str]()

    def open(self, config: TrainConfig, first_step: int) -> int | None:
        """Repair the files of a run that was killed, open them, and start the trackers.

        Returns the step of the newest evaluation in the files. Raises OSError for files that cannot be read or
        written, ValueError for a tracker that is not installed or does not start. Whoever starts a run wants to
        know; a run that resumes, perhaps at night, trains without a tracker that does not start.

        Args:
            first_step: where training resumes; later rows are dropped. -1: the run is new, and drops all.
        """
        self.config, folder = config, Path(config.out)
        check_trackers(config)
        evaluated, broken = _repair(folder, first_step)
        self.files = [_Lines(folder / f"{name}.jsonl", self.warn) for name in ("metrics", "samples")]
        self.metrics, self.samples = self.files
        sync_folder(folder)
        if broken:
            self.say(f"metrics.jsonl, samples.jsonl: {broken} broken line{'s' * (broken > 1)} dropped")
        # MFU: the operations of a step, by llm.c's count, over those that all devices could do in that time.
        peak = peak_tflops(config, self.world.device)
        self.peak = peak[1] * 1e12 * self.world.size if peak else None
        self.flops_per_token = flops_per_token(config.model_config, config.seq_len)
        self.guessing = math.log(config.model_config.vocab_size)
        for wanted, name, begin, advice in (
            (config.tensorboard, "TensorBoard", partial(start_tensorboard, folder), "leave --tensorboard out"),
            (config.wandb, "W&B", partial(start_wandb, config, folder),
             "leave --wandb out, or set WANDB_MODE=offline"),
        ):  # fmt: skip
            try:
                self.trackers += [begin(first_step)] if wanted else []
            except Exception as error:
                failure = f"{name} does not start ({in_one_line(error)})"
                if first_step < 0:
                    raise ValueError(f"{failure}; {advice}") from None
                self.warn(f"{failure}; the run continues without it")
        return max(evaluated, default=None)

    def train(self, row: dict[str, Any]) -> None:
        """Record a step; where it applies, `skipped` says why its update was left out."""
        if not self.enabled:
            return
        speed = self.config.batch_tokens / row["seconds"] if row["seconds"] > 0 else None
        used = None if speed is None or self.peak is None else speed * self.flops_per_token / self.peak
        row = finite({**row, "tokens_per_second": speed, "mfu": used})
        self.metrics.append(row)
        names = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds", "data_seconds", "peak_memory")
        self._log(row["step"], {f"train/{name}": row[name] for name in names})
        self.console.step(row)
        self._warn_if_diverged(row)

    def _warn_if_diverged(self, row: dict[str, Any]) -> None:
        """Warn once of a loss that has risen far above that of guessing, or of a gradient beyond all measure."""
        loss, norm = row["loss"], row["grad_norm"]
        if "skipped" in row or loss is None or norm is None:
            return
        self.lowest = min(self.lowest, loss)
        if loss > max(self.guessing, self.lowest) + 2:
            fact = f"the loss is {loss:,.2f}, above that of guessing ({self.guessing:.2f})"
        elif norm > 1e4:
            fact = f"the gradient's norm is {norm:,.0f}"
        else:
            return
        advice = "the run has probably diverged: lower --lr or lengthen --warmup, with another --out"
        self.warn(f"step {row['step']}: {fact}: {advice}", "divergence")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record an evaluation, after its samples: without this row, they are dropped when the run is resumed."""
        if not self.enabled:
            return
        row = finite(row)
        self.metrics.append(row)
        names = ("val_loss", "hellaswag_acc_norm")
        self._log(row["step"], {f"val/{name.removeprefix('val_')}": row.get(name) for name in names})
        parts = [
            words.format("not finite" if row[name] is None else format(row[name], form))
            for name, words, form in EVALUATION_WORDS
            if name in row
        ]
        self.say(f"step {row['step']:,}: {'   '.join(parts)}")

    def sample(self, row: dict[str, Any]) -> None:
        """Record a text (step, row, prompt, text), and show the first of an evaluation on one line."""
        if not self.enabled:
            return
        self.samples.append(row)
        if row["row"] == 0:
            # A model may write anything, including characters that move the cursor or rename the window.
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{row['prompt']}|{row['text']}")
            self.say(f"  {text}"[:160])

    def warn(self, text: str, about: str = "") -> None:
        """Say a warning, once in a run about the same thing. Never fails; any thread may call it."""
        if (about or text) not in self.warned:
            self.warned.add(about or text)
            self.say(f"warning: {text}")

    def flush(self) -> None:
        """Force all rows to the disk: a checkpoint must not be newer than they are. Try failed trackers again."""
        for file in self.files:
            file.write(durably=True)
        self.resting.clear()
        self._track(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close the files and the trackers; `say` still works."""
        self.console.close()
        self.resting.clear()
        self._track(lambda tracker: tracker.close())
        for file in self.files:
            file.close()
        self.trackers, self.files = [], []

    def _log(self, step: int, values: dict[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._track(lambda tracker: tracker.log(step, known))

    def _track(self, tell: Callable[[Tracker], None]) -> None:
        """Tell the trackers; one that fails, and may have cost a minute, rests until the next flush."""
        for tracker in self.trackers:
            try:
                if tracker.name not in self.resting:
                    tell(tracker)
            except Exception as error:
                self.resting.add(tracker.name)
                failure = f"{tracker.name} failed ({in_one_line(error)}): the run continues without it"
                self.warn(f"{failure}; metrics.jsonl has all rows", tracker.name)


def peak_tflops(config: TrainConfig, device: torch.device) -> tuple[str, float] | None:
    """Return the device's name and peak in TFLOP/s, from --peak-tflops or, in bf16, the table; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if config.peak_tflops:
        return name, config.peak_tflops
    if device.type != "cuda" or config.precision != "bf16" or _OTHER_THAN_NAMED.search(name):
        return None
    return next((item for item in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(item[0])}\b", name)), None)


def assumed_speed(config: TrainConfig, device: torch.device, here: bool) -> tuple[float | None, str]:
    """Return the operations per second to expect of one process (None if unknown), and where this comes from.

    A device that is `here`, on this machine, is measured for a second if its peak is not known.
    """
    share = GPU_SHARE if device.type == "cuda" else PRODUCT_SHARE
    if config.peak_tflops:
        return config.peak_tflops * 1e12 * share, f"{share:.0%} (assumed) of --peak-tflops {config.peak_tflops:g}"
    if not here:
        return None, "not known, since this machine has no such device: give --peak-tflops"
    if known := peak_tflops(config, device):
        return known[1] * 1e12 * share, f"{share:.0%} (assumed) of the {known[1]:,.0f} TFLOP/s of {known[0]}"
    # A step's most typical product: activations times the MLP's first matrix. `item` waits for the device.
    shape, dtype = config.model_config, torch.bfloat16 if config.precision == "bf16" else torch.float32
    x = torch.randn(2048, shape.n_embd, device=device, dtype=dtype)
    weight = torch.randn(shape.n_embd, shape.mlp_dim, device=device, dtype=dtype)
    operands = {"x": x, "weight": weight}
    timer = Timer("(x @ weight).sum().item()", globals=operands, num_threads=torch.get_num_threads())
    rate = 2 * x.numel() * shape.mlp_dim / timer.blocked_autorange(min_run_time=1.0).median
    product = f"the {rate / 1e9:,.0f} GFLOP/s of a matrix product, measured here"
    return rate * PRODUCT_SHARE, f"{PRODUCT_SHARE:.0%} (assumed) of {product}"


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with null for a number that is not finite; `skipped` or `not_finite` says what it was."""
    odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if not odd:
        return row
    values = ", ".join(f"{name} {row[name]}" for name in odd)
    word = {"skipped": f"{row['skipped']} ({values})"} if "skipped" in row else {"not_finite": values}
    return {**row, **dict.fromkeys(odd), **word}


class _Lines:
    """A file that rows are appended to. It stays open, so a process that runs out of descriptors loses no rows.

    Rows that cannot be written wait in memory, the last 100,000 of them (25 MB), and come before the next one.
    A file that was removed or replaced is opened anew, or the open one would take rows that nobody can read.
    """

    def __init__(self, path: Path, warn: Callable[[str, str], None]) -> None:
        self.path, self.warn = path, warn
        self.waiting = deque[bytes](maxlen=100_000)
        self.failed = False
        self._close: Callable[[], object] = lambda: None
        self._open()
        self.end = self.file.tell()  # of the last whole row

    def _open(self) -> None:
        file = self.path.open("a+b", buffering=0)
        with suppress(OSError):
            self._close()
        self._close = weakref.finalize(self, file.close)  # also if the run fails during set-up
        self.file, self.identity = file, os.fstat(file.fileno())

    def _follow(self) -> None:
        """Open the file again after a failure, or if its path leads to another file or to none."""
        same = False
        with suppress(FileNotFoundError):
            same = os.path.samestat(self.path.stat(), self.identity)
        if same and not self.failed:
            return
        self._open()  # a network disk that was away wants it, too
        self.end = min(self.end, self.file.tell()) if same else self.file.tell()
        self.file.truncate(self.end)
        if self.end and os.pread(self.file.fileno(), 1, self.end - 1) != b"\n":
            self.end += os.write(self.file.fileno(), b"\n")
        if not same:
            self.warn(f"{self.path} was removed or replaced: rows from here on are in the file there now", "")
            sync_folder(self.path.parent)

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self.waiting.append(line.encode(errors="backslashreplace"))
        self.write()

    def write(self, durably: bool = False) -> None:
        """Write the rows that wait. Half a row is never left in front of a whole one."""
        try:
            self._follow()
            while self.waiting:
                line = self.waiting[0]
                while line:  # a disk that fills up first takes a part, then fails
                    line = line[os.write(self.file.fileno(), line) :]
                self.end += len(self.waiting.popleft())
            if durably:
                sync(self.file.fileno())
            self.failed = False
        except OSError as error:
            self.failed = True
            with suppress(OSError):
                self.file.truncate(min(self.end, os.fstat(self.file.fileno()).st_size))
            trouble = f"{self.path} cannot be written ({error.strerror})"
            self.warn(f"{trouble}: the run continues, and each step tries again with all its rows", str(self.path))

    def close(self) -> None:
        if self.waiting or self.failed:
            self.write()
        if self.waiting:
            self.warn(f"{self.path} lacks {len(self.waiting):,} rows, which could not be written", "")
        with suppress(OSError):
            self._close()


def _repair(folder: Path, first_step: int) -> tuple[set[int], int]:
    """Drop rows after first_step, samples without an evaluation, and lines that a kill cut short.

    Returns the steps whose evaluation is still there, and the number of lines that were broken.
    """
    evaluated, broken = set[int](), 0
    for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
        content, lines = path.read_bytes() if path.exists() else b"", []
        for line in filter(None, content.split(b"\n")):  # by bytes: str.splitlines cuts inside a text
            row = None
            with suppress(ValueError):
                row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                broken += 1
                continue
            if path.name == "metrics.jsonl" and "loss" not in row and row["step"] <= first_step:
                evaluated.add(row["step"])
            if row["step"] in evaluated or (path.name == "metrics.jsonl" and row["step"] <= first_step):
                lines.append(line + b"\n")
        remaining = b"".join(lines)
        ours = not path.exists() or os.access(path, os.W_OK, effective_ids=True)
        if remaining != content or not ours:  # our copy takes the place of another user's file
            with write_whole(path) as file:
                file.write(remaining)
    return evaluated, broken
