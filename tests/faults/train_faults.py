"""What the fault tests of gpt2-train share: a run that is disturbed, resumed, and compared."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fork_server import environment, start_ranks

from gpt2_data import convert
from gpt2_train import find_checkpoint, verify_checkpoint

# 11,000 parameters and 64 tokens a step: 60 steps with 20 checkpoints take a second of one core.
SETTINGS = {
    "steps": 60, "batch_tokens": 64, "seq_len": 16, "lr": 1e-2, "min_lr": 1e-3, "warmup": 3,
    "device": "cpu", "precision": "fp32", "checkpoint_every": 3, "eval_every": 12, "eval_tokens": 64,
    "num_samples": 2, "sample_prompt": "a",
}  # fmt: skip
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 256}
STEPS = SETTINGS["steps"]

# python -c PLANTED '[["fault", {...}], ...]' ARGUMENTS: gpt2-train with faults, where a fork will not do.
PLANTED = """
import json, sys, inside
inside.plant(json.loads(sys.argv.pop(1)))
from gpt2_model.command import run_command
from gpt2_train.cli import main
run_command(main, "gpt2-train")
"""


def planted(faults, data, out, *launcher: str, **env: str) -> subprocess.CompletedProcess:
    """Run gpt2-train with faults in processes of their own, by a launcher that takes a program and arguments."""
    return subprocess.run(
        [sys.executable, *launcher, json.dumps(faults), *command_line(data, out)],
        env={**environment(), **env}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def make_dataset(folder: Path) -> Path:
    """A dataset of 6,000 tokens below 256: with so small a vocabulary a checkpoint takes 140 kB."""
    draw = random.Random(0)
    words = ["the", "a", "of", "and", "in", "is", "it", "cat", "dog", "sun", "sea", "runs", "sleeps", "under"]
    text = " ".join(draw.choices(words, k=2000)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype("<u2")
    (folder / "raw").mkdir(parents=True)
    tokens[:6000].tofile(folder / "raw" / "train.bin")
    tokens[6000:6600].tofile(folder / "raw" / "val.bin")
    convert(folder / "raw", folder / "data", "llmc")
    return folder / "data"


def command_line(data: Path, out: Path, **changes) -> list[str]:
    """Return arguments of the run, with changes to SETTINGS; True is --flag, `model` is a dict."""
    settings = {**SETTINGS, **changes, "data": data, "out": out}
    shape = settings.pop("model", SHAPE)
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words + [word for name, value in shape.items() for word in ("--model", f"{name}={value}")]


def read_rows(path: Path) -> list[dict]:
    """The lines of a JSON-lines file that are whole."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def loss_log(run: Path) -> dict[str, list]:
    """Return what a run has logged that must not depend on when and how often it was killed."""
    rows = read_rows(run / "metrics.jsonl")
    fields = ("step", "loss", "grad_norm", "lr", "tokens", "skipped")
    return {
        "train": [[row.get(name) for name in fields] for row in rows if "loss" in row],
        "evaluation": [[row["step"], row["val_loss"]] for row in rows if "val_loss" in row],
        "samples": [[row["step"], row["row"], row["text"]] for row in read_rows(run / "samples.jsonl")],
    }


def outcome(run: Path, step: int = SETTINGS["steps"]) -> dict[str, str]:
    """SHA-256 of the weights, the optimizer's state and the loss log after the last step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    files["loss log"] = json.dumps(loss_log(run)).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def newest_after_a_kill(run: Path, whole: dict[str, list], least_step: int) -> int:
    """Return the newest good checkpoint's step of a run that was killed, once it has been found sound up to there.

    Args:
        whole: the loss log of the undisturbed run.
        least_step: the newest good checkpoint's step when it was killed before.
    """
    newest, _ = find_checkpoint(run)
    step = 0 if newest is None else int(newest.name[-8:])
    assert step >= least_step, f"no good checkpoint from step {least_step} on, where there was one"
    for name, rows in loss_log(run).items():
        # What is written at the newest step may come after its checkpoint.
        last = step if name == "train" else step - 1
        before = [[row for row in side if row[0] <= last] for side in (rows, whole[name])]
        assert before[0] == before[1], f"the {name} rows up to step {step} are not the undisturbed run's"
    return step


class Runs:
    """Begins runs of the small model as forks, with a dataset and the undisturbed run R to compare.

    Attributes:
        data: the dataset.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_dataset(folder)
        self._whole = {}

    def whole(self, ranks=1) -> Path:
        """Return the folder of the undisturbed run."""
        if ranks not in self._whole:
            out = self.folder / f"whole-{ranks}"
            assert self.run(out, ranks=ranks) == 0, self.said(out)
            self._whole[ranks] = out
        return self._whole[ranks]

    def begin(self, out: Path, *faults, ranks=1, env=None, log=None, **changes):
        """Start; return a Child a rank."""
        words = command_line(self.data, out, **changes)
        return start_ranks(words, log or self.log(out), ranks, faults, **(env or {}))

    def run(self, out: Path, *faults, ranks=1, seconds=60, env=None, **changes) -> int:
        """Start and wait; return rank 0's exit code."""
        return self.codes(self.begin(out, *faults, ranks=ranks, env=env, **changes), seconds)[0]

    def fail(self, out: Path, *faults, says=(), good=None, code=1, ranks=1, leaves=False, **changes) -> str:
        """A run that a fault ends on all ranks, in words and without a traceback; return what rank 0 said.

        Args:
            says: what rank 0 must say.
            good: the steps whose checkpoints must be good.
            leaves: the fault keeps what the run would delete.
        """
        children = self.begin(out, *faults, ranks=ranks, **changes)
        assert self.codes(children, 30) == [code] * ranks, self.said(out)
        said = children[0].output()
        assert [text for text in says if text not in said] == [], said
        assert not any("Traceback" in child.output() for child in children)
        # That of a bug stays.
        assert not list((out / "checkpoints").glob(".tmp*")) or leaves or "saving failed" in said
        assert good is None or good_steps(out) == good
        return said

    def fail_and_resume(self, out: Path, *faults, ranks=1, **expected) -> str:
        """The same, and then the same command without the fault ends as the undisturbed run."""
        said = self.fail(out, *faults, ranks=ranks, **expected)
        self.must_finish_as_whole(out, ranks=ranks)
        return said

    @staticmethod
    def codes(children, seconds=60) -> list[int]:
        """Return the exit code of each rank."""
        until = time.monotonic() + seconds
        return [child.wait(max(0.1, until - time.monotonic())) for child in children]

    @staticmethod
    def log(out: Path) -> Path:
        return out.with_name(f"{out.name}.log")

    def said(self, out: Path, rank=0) -> str:
        """Return all that the runs in a folder wrote to stdout and stderr."""
        log = self.log(out)
        log = log.with_name(f"{log.name}.{rank}") if rank else log
        return log.read_text(errors="replace") if log.exists() else ""

    def must_finish_as_whole(self, out: Path, *faults, ranks=1, **changes) -> str:
        """The same command resumes, and ends as the undisturbed run; return all that was said."""
        assert self.run(out, *faults, ranks=ranks, **changes) == 0, self.said(out)
        whole = self.whole(ranks)
        assert loss_log(out) == loss_log(whole)
        assert outcome(out) == outcome(whole)
        assert not list((out / "checkpoints").glob(".tmp*"))
        return self.said(out)

    def wind_back(self, out: Path, step: int = STEPS) -> Path:
        """Return a copy of R's folder as it was at a step: its rows go on, its checkpoints do not."""
        shutil.copytree(self.whole(), out)
        assert checkpoint(out, step).exists(), "R keeps its last three checkpoints"
        for folder in steps_of(out):
            if folder > step:
                shutil.rmtree(checkpoint(out, folder))
        return out


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def steps_of(out: Path) -> list[int]:
    """Steps that have a checkpoint folder."""
    return sorted(int(path.name[-8:]) for path in (out / "checkpoints").glob("step-*"))


def good_steps(out: Path) -> list[int]:
    """Steps whose checkpoint verifies."""
    return [step for step in steps_of(out) if not verify_checkpoint(checkpoint(out, step))]


def rows(out: Path, kind="loss") -> list[dict]:
    """Rows of metrics.jsonl that have a field."""
    return [row for row in read_rows(out / "metrics.jsonl") if kind in row]


def wait_for_step(out: Path, step: int, seconds=60.0) -> None:
    """Until the run has logged a step."""
    wait_until(lambda: any(row["step"] >= step for row in rows(out)), seconds)


def wait_until(condition, seconds=60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
