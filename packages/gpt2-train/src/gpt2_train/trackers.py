"""TensorBoard and Weights & Biases, by choice: what of a run's rows they are told.

Both are missing where they were not asked for, and neither may stop a run (metrics.RunLog sees to that).
"""

import os
import secrets
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from gpt2_train.config import TrainConfig

# Never written anywhere, though another's error message may quote one.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# W&B uploads at the end; a run that was asked to stop has seconds for it. What is not sent, `wandb sync` sends.
FINISH_SECONDS = 20.0


class Tracker(Protocol):
    """What RunLog tells."""

    name: str

    def scalars(self, step: int, values: dict[str, float | None]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`/tensorboard; of steps after `first_step`, only what is written from now on counts.

    Raises:
        ValueError: tensorboard is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        _need("tensorboard", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project `config.wandb`, its files in `folder`/wandb; a run that goes on, goes on there too.

    Raises:
        ValueError: wandb is not installed.
        RuntimeError: it does not start.
    """

    name = "W&B"

    def __init__(self, config: TrainConfig, folder: Path, first_step: int) -> None:
        wandb = _need("wandb", "--wandb")
        id_file = folder / "wandb-run-id"
        if first_step < 0 or not id_file.exists():
            temporary = folder / ".wandb-run-id.tmp"
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
            temporary.replace(id_file)
        try:
            self.run = wandb.init(
                project=config.wandb,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                # It would put its own streams before stdout and stderr, and copy what they carry.
                settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
            )
        except Exception as error:
            raise RuntimeError(f"W&B does not start ({in_one_line(error)})") from None

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        # W&B takes no step twice. Steps that it knows already are from before a kill, and repeated bit for bit.
        if step >= self.run.step:
            self.run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def flush(self) -> None:
        """It has what it was told: another process sends it."""

    def close(self) -> None:
        self.run.finish()


def check_trackers(config: TrainConfig) -> None:
    """Import what the run is going to tell. Every rank can do it, and then all of them fail alike.

    Raises:
        ValueError: a package is missing; says how to install it.
    """
    if config.tensorboard:
        _need("tensorboard", "--tensorboard")
    if config.wandb:
        _need("wandb", "--wandb")


def _need(package: str, flag: str) -> Any:
    module = None
    with suppress(ImportError):
        module = import_module(package)
    # A folder of that name, as W&B leaves one where it runs, can be imported too, and is empty.
    if module is None or getattr(module, "__version__", None) is None:
        raise ValueError(f"{flag} needs a package that is not installed: pip install {package}")
    return module


def in_one_line(error: BaseException) -> str:
    """An error of another's code, short, and without what must not be told."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"<{name}>")
    return text[:300]
