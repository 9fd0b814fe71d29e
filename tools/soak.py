"""Kill a small training run again and again; it must end as one that nobody touched: python tools/soak.py

The runs are forks of one process that has imported torch: a start takes a tenth of a second instead of five.
"""

import faulthandler
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

# 11,000 parameters and 64 tokens a step: 60 steps with 20 checkpoints take a second of one core.
SETTINGS: dict[str, Any] = {
    "steps": 60, "batch_tokens": 64, "seq_len": 16, "lr": 1e-2, "min_lr": 1e-3, "warmup": 3,
    "device": "cpu", "precision": "fp32", "checkpoint_every": 3, "eval_every": 12, "eval_tokens": 64,
    "num_samples": 2, "sample_prompt": "a",
}  # fmt: skip
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 256}
# Seconds in which the other ranks must notice that one is gone.
PATIENCE = 30.0


class ForkServer:
    """A process that has imported everything, and forks a run of gpt2-train when it is asked to.

    torch reads the number of its threads once, so they are set to one, for this machine has as many runs as cores.
    """

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self._connection = ours
        self._codes: dict[int, int] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"import soak; soak.serve({theirs.fileno()})"]
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()

    def start(
        self, arguments: Sequence[str], log: Path, faults: Sequence[tuple[str, dict[str, Any]]] = (), **env: str
    ) -> "Child":
        """Begin `gpt2-train ARGUMENTS`, with stdout and stderr appended to `log`.

        Args:
            faults: (function of the module `inside`, its arguments), called in the new process before the command.
            env: variables of its environment.
        """
        before = log.stat().st_size if log.exists() else 0
        self._connection.send((list(arguments), str(log), list(faults), env))
        return Child(self, self._receive("pid", 60), log, before)

    def code(self, pid: int, seconds: float) -> int | None:
        """Exit code of a child, -n for a signal; None if it still runs after so many seconds."""
        until = time.monotonic() + seconds
        while pid not in self._codes and self._connection.poll(max(0.0, until - time.monotonic())):
            self._receive("code", 0)
        return self._codes.get(pid)

    def _receive(self, wanted: str, seconds: float) -> int:
        while True:
            if wanted == "pid" and not self._connection.poll(seconds):
                raise TimeoutError("the fork server does not answer")
            kind, pid, code = self._connection.recv()
            if kind == "code":
                self._codes[pid] = code
            if kind == wanted:
                return int(pid)

    def close(self) -> None:
        """End the server, and what it has started."""
        self._connection.close()
        self._process.wait()


class Child:
    """A run that the server has forked."""

    def __init__(self, server: ForkServer, pid: int, log: Path, log_start: int) -> None:
        self.server, self.pid, self.log, self.log_start = server, pid, log, log_start

    def poll(self, seconds: float = 0.0) -> int | None:
        """Exit code, -n for a signal; None if it still runs after so many seconds."""
        return self.server.code(self.pid, seconds)

    def wait(self, seconds: float = 60.0) -> int:
        """Exit code; raises TimeoutError, after killing it."""
        code = self.poll(seconds)
        if code is None:
            self.send(signal.SIGUSR2)  # faulthandler: where is it?
            self.poll(1)
            self.send(signal.SIGKILL)
            self.poll(10)
            raise TimeoutError(f"still running after {seconds} s; its output:\n{self.output()}")
        return code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)  # no other process gets its number: the server reaps it only to say so

    def output(self) -> str:
        """What it wrote, without what the runs before it wrote to the same log."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace") if self.log.exists() else ""


def serve(descriptor: int) -> None:
    """The server's life; in a forked child, the command's."""
    for name in ("torch._dynamo", "gpt2_train.loop", "gpt2_train.cli"):  # the first optimizer imports _dynamo
        import_module(name)
    from gpt2_eval.loss import bytes_per_token

    bytes_per_token()  # kept, as the tokenizer is: reading the vocabulary takes longer than thirty steps
    gc.freeze()
    connection, children = Connection(descriptor), set[int]()
    while True:
        try:
            asked = connection.recv() if connection.poll(0.005 if children else None) else None
        except EOFError:
            break
        if asked is not None:
            pid = os.fork()
            if not pid:
                connection.close()
                _become(*asked)
            children.add(pid)
            connection.send(("pid", pid, 0))
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.remove(pid)
            connection.send(("code", pid, os.waitstatus_to_exitcode(status)))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _become(
    arguments: list[str], log: str, faults: list[tuple[str, dict[str, Any]]], env: Mapping[str, str]
) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    os.environ.update(env)
    faulthandler.register(signal.SIGUSR2, file=2)
    for name, options in faults:
        getattr(import_module("inside"), name)(**options)
    from gpt2_model.command import run_command as run
    from gpt2_train.cli import main

    sys.argv = ["gpt2-train", *arguments]
    code: Any = 0
    try:
        run(main, "gpt2-train")
    except SystemExit as done:
        code = done.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():  # as Python does, which then takes half a second to tidy up all of torch
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def start_ranks(
    server: ForkServer, arguments: Sequence[str], log: Path, ranks: int,
    faults: Sequence[tuple[str, dict[str, Any]]] = (), **env: str,
) -> list[Child]:  # fmt: skip
    """A run on one process or more, as torchrun would start them; the log of rank r > 0 is LOG.r."""
    if ranks == 1:
        return [server.start(arguments, log, faults, **env)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env}
    logs = [log, *(log.with_name(f"{log.name}.{rank}") for rank in range(1, ranks))]
    return [
        server.start(arguments, logs[rank], faults, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(ranks)
    ]


def make_dataset(folder: Path) -> Path:
    """A dataset of 6,000 tokens below 256: with so small a vocabulary a checkpoint takes 140 kB."""
    import numpy as np

    from gpt2_data import convert

    draw = random.Random(0)
    words = ["the", "a", "of", "and", "in", "is", "it", "cat", "dog", "sun", "sea", "runs", "sleeps", "under"]
    text = " ".join(draw.choices(words, k=2000)).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype("<u2")
    (folder / "raw").mkdir(parents=True)
    tokens[:6000].tofile(folder / "raw" / "train.bin")
    tokens[6000:6600].tofile(folder / "raw" / "val.bin")
    convert(folder / "raw", folder / "data", "llmc")
    return folder / "data"


def command_line(data: Path, out: Path, **changes: Any) -> list[str]:
    """Arguments of the run, with changes to SETTINGS; True is --flag, a dict is --model's."""
    settings = {**SETTINGS, **changes, "data": data, "out": out}
    shape = {**SHAPE, **settings.pop("model", {})}
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words + [word for name, value in shape.items() for word in ("--model", f"{name}={value}")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that are whole."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def loss_log(run: Path) -> dict[str, list[Any]]:
    """What a run has logged that must not depend on when and how often it was killed."""
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


def interrupted_problems(run: Path, whole: Mapping[str, list[Any]], least_step: int) -> tuple[int, list[str]]:
    """(newest good checkpoint's step, what is wrong) of a run that was killed.

    Args:
        whole: the loss log of the undisturbed run.
        least_step: the newest good checkpoint's step when it was killed before.
    """
    from gpt2_train import find_checkpoint

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


def soak(
    folder: Path, kills: int, ranks: int, seed: int, steps: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Kill runs in `folder` until `kills` were, each at a random instant, and start them again.

    Returns:
        kills, finished runs, seconds, seconds a start, the seed and the problems found.
    """
    draw, began = random.Random(seed), time.monotonic()
    server, problems = ForkServer(), list[str]()
    data = make_dataset(folder)
    reference, starts, killed, finished = folder / "reference", 0, 0, 0
    needed = 0.0
    for out in (folder / "first", reference):  # the first one finds cold caches
        started = time.monotonic()
        words = command_line(data, out, steps=steps)
        for child in start_ranks(server, words, folder / f"{out.name}.log", ranks):
            if child.wait(600):
                raise ValueError(f"the undisturbed run failed: {child.output()}")
        needed = time.monotonic() - started
    if outcome(folder / "first", steps) != outcome(reference, steps):
        problems.append("two undisturbed runs differ")
    whole, expected = loss_log(reference), outcome(reference, steps)
    run, newest, number = folder / "run-0", 0, 0
    while not problems:
        children = start_ranks(server, command_line(data, run, steps=steps), folder / f"{run.name}.log", ranks)
        starts += 1
        # A third of the time that a run needs: every fourth start or so is the one that finishes.
        until = time.monotonic() + draw.uniform(0, needed / 3)
        if _end_by(children, until if killed < kills else until + 600):  # the last run is left to finish
            codes = [child.wait() for child in children]
            finished += 1
            if any(codes):
                problems.append(f"{run} ended with {codes}: {children[0].output()[-2000:]}")
            elif outcome(run, steps) != expected:
                problems.append(f"{run} is not as the undisturbed run: {outcome(run, steps)}, not {expected}")
            else:
                shutil.rmtree(run)
                number += 1
                run, newest = folder / f"run-{number}", 0
            if killed == kills:
                break
            continue
        victims = draw.choice([[child] for child in children] + ([children] if ranks > 1 else []))
        problems += _kill(children, victims)
        killed += 1
        newest, found = interrupted_problems(run, whole, newest)
        problems += [f"{run}, killed {killed} times: {problem}" for problem in found]
        if killed % 20 == 0:
            say(f"{killed} of {kills} kills, {finished} runs finished, {time.monotonic() - began:.0f} s")
    server.close()
    seconds = time.monotonic() - began
    return {"kills": killed, "finished": finished, "ranks": ranks, "seed": seed, "problems": problems,
            "seconds": round(seconds, 1), "seconds_a_start": round(seconds / max(1, starts), 3)}  # fmt: skip


def _end_by(children: Sequence[Child], until: float) -> bool:
    return all(child.poll(max(0.0, until - time.monotonic())) is not None for child in children)


def _kill(children: Sequence[Child], victims: Sequence[Child]) -> list[str]:
    """Kill some ranks; the others must end by themselves, once they had met. torchrun would kill them before."""
    met = "parameters," in children[0].output()
    for child in victims if met else children:
        child.send(signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    if _end_by(children, until):
        return []
    for child in children:
        child.send(signal.SIGUSR2)  # faulthandler: where is it?
        child.poll(1)
        child.send(signal.SIGKILL)
    said = "\n".join(child.output()[-2000:] for child in children)
    return [f"a rank went on for {PATIENCE:.0f} s after another was killed: {said}"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", type=click.IntRange(1), default=200, show_default=True, help="SIGKILLs to survive.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes of a run.")
@click.option("--seed", default=0, show_default=True, help="Of the instants.")
@click.option("--steps", type=click.IntRange(6), default=60, show_default=True, help="Steps of a run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line instead of a sentence.")
def main(kills: int, ranks: int, seed: int, steps: int, as_json: bool) -> None:
    """Kill a small run at random instants, with SIGKILL, and start it again by the same command.

    Every finished run must equal an undisturbed one: weights, optimizer and loss log, by SHA-256. After every kill
    the loss log must be whole up to the newest checkpoint, and no checkpoint may be lost. Exit 1 if not; the
    folder is kept then.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpt2-soak-"))
    click.echo(f"seed {seed}, in {folder}", err=True)
    told = soak(folder, kills, ranks, seed, steps, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(
            f"{told['kills']} kills on {ranks} rank(s), {told['finished']} runs finished, {told['seconds']} s: "
            f"{'; '.join(told['problems']) or 'all as undisturbed'}"
        )
    if told["problems"]:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
