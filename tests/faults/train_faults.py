"""What the fault tests of gpt2-train share: a run that is disturbed, resumed, and compared."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from fork_server import ForkServer, start_ranks

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
PATIENCE = 30.0  # seconds in which the other ranks must notice that one is gone

# python -c PLANTED '[["fault", {...}], ...]' ARGUMENTS: gpt2-train with faults, where a fork will not do.
PLANTED = """
import json, sys, inside
for name, options in json.loads(sys.argv.pop(1)):
    getattr(inside, name)(**options)
from gpt2_model.command import run_command
from gpt2_train.cli import main
run_command(main, "gpt2-train")
"""


def planted_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


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
    """Arguments of the run, with changes to SETTINGS; True is --flag, a dict is --model's."""
    settings = {**SETTINGS, **changes, "data": data, "out": out}
    shape = {**SHAPE, **settings.pop("model", {})}
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


def interrupted_problems(run: Path, whole: dict[str, list], least_step: int) -> tuple[int, list[str]]:
    """(newest good checkpoint's step, what is wrong) of a run that was killed.

    Args:
        whole: the loss log of the undisturbed run.
        least_step: the newest good checkpoint's step when it was killed before.
    """
    newest, _ = find_checkpoint(run)
    step = 0 if newest is None else int(newest.name[-8:])
    problems = [f"no good checkpoint from step {least_step} on, where there was one"] if step < least_step else []
    log = loss_log(run)
    for name, rows in log.items():
        # What is written at the newest step may come after its checkpoint.
        before = [[row for row in side if row[0] < step or (row[0] == step and name == "train")]
                  for side in (rows, whole[name])]  # fmt: skip
        if before[0] != before[1]:
            problems.append(f"the {name} rows up to the checkpoint of step {step} are not the undisturbed run's")
    return step, problems


class Runs:
    """Begins runs of the small model as forks of one server, with a dataset and the undisturbed run R to compare.

    Attributes:
        data: the dataset.
        whole: folder of R on one rank.
    """

    def __init__(self, folder: Path) -> None:
        self.server = ForkServer()
        self.folder = folder
        self.data = make_dataset(folder)
        self._whole = {}

    def whole(self, ranks=1) -> Path:
        """The undisturbed run."""
        if ranks not in self._whole:
            out = self.folder / f"whole-{ranks}"
            assert self.run(out, ranks=ranks) == 0, self.said(out)
            self._whole[ranks] = out
        return self._whole[ranks]

    def begin(self, out: Path, *faults, ranks=1, env=None, **changes):
        """Start; returns a Child a rank."""
        words = command_line(self.data, out, **changes)
        return start_ranks(self.server, words, self.log(out), ranks, faults, **(env or {}))

    def run(self, out: Path, *faults, ranks=1, seconds=60, env=None, **changes) -> int:
        """Start and wait; returns rank 0's exit code."""
        return self.codes(self.begin(out, *faults, ranks=ranks, env=env, **changes), seconds)[0]

    @staticmethod
    def codes(children, seconds=60) -> list[int]:
        """Exit code of each rank."""
        until = time.monotonic() + seconds
        return [child.wait(max(0.1, until - time.monotonic())) for child in children]

    @staticmethod
    def log(out: Path) -> Path:
        return out.with_name(f"{out.name}.log")

    def said(self, out: Path, rank=0) -> str:
        """All that the runs in a folder wrote to stdout and stderr."""
        log = self.log(out)
        log = log.with_name(f"{log.name}.{rank}") if rank else log
        return log.read_text(errors="replace") if log.exists() else ""

    def must_finish_as_whole(self, out: Path, *faults, ranks=1, **changes) -> None:
        """The same command goes on, and ends as the undisturbed run."""
        assert self.run(out, *faults, ranks=ranks, **changes) == 0, self.said(out)
        self.must_equal_whole(out, ranks)

    def must_equal_whole(self, out: Path, ranks=1) -> None:
        whole = self.whole(ranks)
        assert loss_log(out) == loss_log(whole)
        assert outcome(out) == outcome(whole)
        assert not list((out / "checkpoints").glob(".tmp*"))

    def copy(self, out: Path, ranks=1) -> Path:
        """R's folder, to do something to."""
        shutil.copytree(self.whole(ranks), out)
        return out

    def wind_back(self, out: Path, step: int, ranks=1) -> Path:
        """A folder as R's was at a step: its rows go on, its checkpoints do not."""
        self.copy(out, ranks)
        kept = checkpoint(out, step)
        assert kept.exists(), "R keeps its last three checkpoints"
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


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def seal(folder: Path) -> None:
    """Write a checkpoint's manifest anew, after a change that is to look meant."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def kill(children) -> None:
    """SIGKILL, for the tests that leave something running."""
    for child in children:
        child.send(signal.SIGCONT)
        child.send(signal.SIGKILL)


def soak(folder: Path, kills: int, ranks: int, seed: int) -> dict:
    """Kill runs in `folder`, each at a random instant, and start them again by the same command, `kills` times.

    Every finished run must equal an undisturbed one: weights, optimizer and loss log, by SHA-256. After every kill
    the loss log must be whole up to the newest checkpoint, and no checkpoint may be lost.

    Returns:
        Kills, finished runs, and the problems.
    """
    draw, runs, problems = random.Random(seed), Runs(folder), []
    killed = finished = newest = number = 0
    try:
        whole = runs.whole(ranks)  # its caches are cold
        began = time.monotonic()
        assert runs.run(folder / "again", ranks=ranks) == 0
        needed = time.monotonic() - began
        expected, log, out = outcome(whole), loss_log(whole), folder / "run-0"
        if outcome(folder / "again") != expected:
            problems.append("two undisturbed runs differ")
        while not problems:
            children = runs.begin(out, ranks=ranks)
            # A third of the time that a run needs: every fourth start or so is the one that finishes.
            until = time.monotonic() + draw.uniform(0, needed / 3)
            if end_by(children, until if killed < kills else until + 600):  # the last run is left to finish
                finished += 1
                codes = runs.codes(children)
                if any(codes) or outcome(out) != expected:
                    problems.append(
                        f"{out} ended with {codes}, unlike the undisturbed run: {runs.said(out)[-2000:]}"
                    )
                number, newest = number + 1, 0
                out = folder / f"run-{number}"
                if killed == kills:
                    break
                continue
            victims = draw.choice([[child] for child in children] + ([children] if ranks > 1 else []))
            problems += kill_some(children, victims)
            killed += 1
            newest, wrong = interrupted_problems(out, log, newest)
            problems += [f"{out}, killed {killed} times: {problem}" for problem in wrong]
    finally:
        runs.server.close()
    return {"kills": killed, "finished": finished, "problems": problems}


def end_by(children, until: float) -> bool:
    return all(child.poll(max(0.0, until - time.monotonic())) is not None for child in children)


def kill_some(children, victims) -> list[str]:
    """Kill some ranks; the others must end by themselves, once they had met. torchrun would kill them before."""
    met = "parameters," in children[0].output()
    for child in victims if met else children:
        child.send(signal.SIGKILL)
    if end_by(children, time.monotonic() + PATIENCE):
        return []
    for child in children:
        child.send(signal.SIGUSR2)  # faulthandler: where is it?
        child.poll(1)
        child.send(signal.SIGKILL)
    said = "\n".join(child.output()[-2000:] for child in children)
    return [f"a rank went on for {PATIENCE:.0f} s after another was killed: {said}"]
