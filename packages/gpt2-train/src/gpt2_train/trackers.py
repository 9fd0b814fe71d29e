"""TensorBoard, Weights & Biases and a profiler's trace, each by choice; none may stop a run."""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpt2_model.command import write_whole
from gpt2_train.config import TrainConfig

# Never written anywhere, though another's error message may quote one.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# W&B uploads at the end; a run that was asked to stop has seconds for it. What is not sent, `wandb sync` sends.
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
    """Write event files in `folder`/tensorboard; those of steps after `first_step` count no more."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("TensorBoard", log, writer.flush, writer.close)


def start_wandb(config: TrainConfig, folder: Path, first_step: int) -> Tracker:
    """Report to project `config.wandb`; a resumed run resumes there. Raises RuntimeError if it does not start."""
    wandb: Any = import_module("wandb")
    id_file = folder / "wandb-run-id"
    if first_step < 0 or not id_file.exists():
        with write_whole(id_file) as file:
            file.write(secrets.token_hex(4).encode())
    try:
        # Its console would put its own streams before stdout and stderr, and copy what they carry.
        settings = wandb.Settings(console="off", finish_timeout=FINISH_SECONDS)
        run = wandb.init(
            project=config.wandb, id=id_file.read_text(encoding="utf-8").strip(), resume="allow", dir=str(folder),
            config=asdict(config), settings=settings,
        )  # fmt: skip
    except Exception as error:
        raise RuntimeError(f"W&B does not start ({in_one_line(error)})") from None

    def log(step: int, values: dict[str, float]) -> None:
        # W&B takes no step twice. Steps that it knows already are from before a kill, and repeated bit for bit.
        if step >= run.step:
            run.log(values, step=step)

    return Tracker("W&B", log, lambda: None, run.finish)  # another process sends what W&B was given


def check_trackers(config: TrainConfig) -> None:
    """Import the trackers that the run asks for. Raises ValueError if a package is missing."""
    for package in ("tensorboard", "wandb"):
        if not getattr(config, package):
            continue
        module = None
        with suppress(ImportError):
            module = import_module(package)
        # A folder of that name, as W&B leaves one where it runs, can be imported too, and is empty.
        if getattr(module, "__version__", None) is None:
            raise ValueError(f"--{package} needs a package that is not installed: pip install {package}")


def in_one_line(error: BaseException) -> str:
    """Return an error of another's code on one short line, without any secret of the environment."""
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

    The first ten are passed over, or, if that leaves too few, the first one. A run that stops in between has its
    trace too; one that cannot be written is no reason to stop a run. Yields what must be called after each step.
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
        except OSError as error:
            say(f"warning: no profile: {error}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    warmup = min(1, skipped)
    with warnings.catch_warnings():  # torch warns of no warmup, which a run's only step cannot have
        warnings.simplefilter("ignore", UserWarning)
        plan = schedule(wait=skipped - warmup, warmup=warmup, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as tracer:
        yield step_done
