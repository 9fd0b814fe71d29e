"""What a run tells: metrics.jsonl and samples.jsonl in its folder, a progress bar or lines on stderr."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .config import TrainConfig

# Dense bf16 peak in FLOP/s, as the makers' data sheets have it. MFU on anything else is not reported.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class RunLog:
    """The JSON-lines files of a run, and its line on the terminal.

    Args:
        run: the run's folder.
        first_step: rows of later steps are dropped: the run that wrote them was killed before its next
            checkpoint, and they are about to be written again.
        steps: of the whole run, for the time left.
        enabled: False on every rank but 0; all methods do nothing then.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        first_step: int,
        world_size: int,
        device: torch.device,
        flops_per_token: int,
        enabled: bool,
    ) -> None:
        self.run, self.steps, self.enabled = run, config.steps, enabled
        steps = config.steps
        self.config, self.world_size, self.device, self.flops = config, world_size, device, flops_per_token
        self.last_evaluation: int | None = None
        self.step_seconds = 0.0
        self.last_line = 0.0
        if not enabled:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_rows_up_to(run / name, first_step)
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                if "val_loss" in line:
                    self.last_evaluation = json.loads(line)["step"]
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=max(0, first_step),
            disable=not self.on_terminal,
            dynamic_ncols=True,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total}{postfix}",
        )

    def train(self, row: dict[str, Any]) -> None:
        """Record a step."""
        if not self.enabled:
            return
        speed = self.config.batch_tokens / row["seconds"]
        row["tokens_per_second"], row["mfu"] = speed, mfu(speed, self.flops, self.world_size, self.device)
        # Over the last twenty steps or so; validation, samples and checkpoints are not in it.
        weight = 0.05 if self.step_seconds else 1.0
        self.step_seconds += weight * (row["seconds"] - self.step_seconds)
        _append(self.run / "metrics.jsonl", row)
        step = row["step"]
        left = _clock((self.steps - step) * self.step_seconds)
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  {left} left"
        self.bar.set_description_str("training", refresh=False)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(1)
        if not self.on_terminal and (time.monotonic() - self.last_line > 10 or step == self.steps):
            self.last_line = time.monotonic()
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record a validation."""
        if not self.enabled:
            return
        _append(self.run / "metrics.jsonl", row)
        parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items() if name != "step"]
        self.say(f"step {row['step']}: {', '.join(parts)}")

    def sample(self, row: dict[str, Any]) -> None:
        """Record a generated text, and show the first of them on one line."""
        if not self.enabled:
            return
        _append(self.run / "samples.jsonl", row)
        if row["row"] == 0:
            self.say(f"  {row['prompt']}|{row['text']}".replace("\n", "\\n")[:160])

    def say(self, text: str) -> None:
        """One line on stderr, above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Take the bar away."""
        if self.enabled:
            self.bar.close()


def mfu(tokens_per_second: float, flops_per_token: int, world_size: int, device: torch.device) -> float | None:
    """Model FLOPs utilisation, 0 to 1, by llm.c's count of operations; None where the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return tokens_per_second * flops_per_token / (peak * world_size) if peak else None


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_rows_up_to(path: Path, step: int) -> None:
    """Drop rows after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
