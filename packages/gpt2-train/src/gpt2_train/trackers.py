"""TensorBoard, Weights & Biases and a profiler's trace. Each is optional, and none may stop a run."""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpt2_model.command import write_whole
from gpt2_train.config import TrainConfig

# Never written anywhere, even if another program's error message quotes one.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# W&B uploads at the end; a run that was asked to stop has seconds for it. `wandb sync` sends the rest.
FINISH_SECONDS = 20.0
UNPROFILED = 10  # steps: the first ones of a process compile, choose kernels and fill caches


@dataclass(frozen=True)
class Tracker:
    """Another place for a run's figures: `log` takes a step and its values by name."""

    name: str
    log: Callable[[int, dict[str, float]], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def start_tensorboard(folder: Path, first_step: int) -> Tracker:
    """Write event files in `folder`/tensorboard; TensorBoard then hides older events after `first_step`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("TensorBoard", log, writer.flush, writer.close)


def start_wandb(config: TrainConfig, folder: Path, first_step: int) -> Tracker:
    """Report to project `config.wandb`; a resumed run continues there. Raises what W&B raises."""
    wandb: Any = import_module("wandb")
    id_file = folder / "wandb-run-id"
    if first_step < 0 or not id_file.exists():
        with write_whole(id_file) as file:
            file.write(secrets.token_hex(4).encode())
    # Its console would wrap stdout and stderr in streams of its own, and copy their output.
    settings = wandb.Settings(console="off", finish_timeout=FINISH_SECONDS)
    run = wandb.init(
        project=config.wandb, id=id_file.read_text(encoding="utf-8").strip(), resume="allow", dir=str(folder),
        config=asdict(config), settings=settings,
    )  # fmt: skip

    def log(step: int, values: dict[str, float]) -> None:
        # W&B accepts no step twice. Steps that it has already are from before a kill, and equal bit for bit.
        if step >= run.step:
            run.log(values, step=step)

    return Tracker("W&B", log, lambda: None, run.finish)  # no flush: another process sends the values


def check_trackers(config: TrainConfig) -> None:
    """Import the trackers that the run asks for. Raises ValueError if a package is missing."""
    for package in [name for name in ("tensorboard", "wandb") if getattr(config, name)]:
        try:
            # A mere folder of that name, such as W&B leaves where it runs, can be imported too, and is empty.
            _ = import_module(package).__version__
        except (ImportError, AttributeError):
            text = f"--{package} needs a package that is not installed: pip install {package}"
            raise ValueError(text) from None


def in_one_line(error: BaseException) -> str:
    """Return an error of another package on one short line, without the environment's secrets."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"<{name}>")
    return text[:300]


@contextmanager
def profiling(
    folder: Path, steps: int, first: int, last: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Trace some of the steps `first` to `last` into `folder`/profile/steps-A-B.json.gz, in Chrome's format.

    The first ten steps are skipped or, if that leaves too few, only the first. A run that stops early writes its
    trace too; a trace that cannot be written does not stop the run. Yields a function to call after each step.
    """
    remaining = last - first + 1
    if steps == 0 or remaining < 1:
        yield lambda: None
        return
    skipped = UNPROFILED if remaining >= UNPROFILED + steps else min(1, remaining - 1)
    steps, done = min(steps, remaining - skipped), 0

    def step_done() -> None:
        nonlocal done
        if done < skipped + steps:
            done += 1
            tracer.step()

    def write(tracer: profile) -> None:
        if done <= skipped:
            return
        path = folder / "profile" / f"steps-{first + skipped}-{first + done - 1}.json.gz"
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tracer.export_chrome_trace(str(temporary))
            temporary.replace(path)
            say(f"profile: {path}, for chrome://tracing and ui.perfetto.dev")
        except Exception as error:  # torch raises RuntimeError where the disk is full
            say(f"warning: the profile cannot be written: {in_one_line(error)}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    warmup = min(1, skipped)
    with warnings.catch_warnings():  # torch warns of a missing warmup, which a single step cannot have
        warnings.simplefilter("ignore", UserWarning)
        plan = schedule(wait=skipped - warmup, warmup=warmup, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as tracer:
        yield step_done
