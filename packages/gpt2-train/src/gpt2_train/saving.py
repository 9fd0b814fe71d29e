"""Checkpoints written while training goes on: a copy in host memory, then a thread that writes and verifies."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt2_model import GPT
from gpt2_train import checkpoint
from gpt2_train.distributed import World
from gpt2_train.optimizer import Optimizers, own_state, state_shapes


class Saver:
    """Saves a run, one checkpoint at a time. Every rank has one; rank 0's copies and writes.

    The copy takes 12 bytes a parameter of rank 0's host memory, from the first save on: page-locked, for a GPU.
    """

    def __init__(self, run: Path, keep: int, world: World) -> None:
        self.run, self.keep, self.world = run, keep, world
        self.error: Exception | None = None  # of the thread, until somebody takes it
        self._thread: threading.Thread | None = None
        self._model: GPT | None = None
        self._optimizer: dict[str, torch.Tensor] = {}
        self._verified: set[str] = set()  # names of good checkpoints, by this process's own reading

    def save(self, step: int, model: GPT, optimizers: Optimizers, trainer: Mapping[str, Any]) -> None:
        """Copy the state as it is now, and begin to write it. Every rank must call it, after `wait`.

        What goes wrong with the writing is in `error` some time later.
        """
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
        """Until what is being written is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> Exception | None:
        """What went wrong since the last call."""
        error, self.error = self.error, None
        return error

    def _allocate(self, model: GPT, optimizers: Optimizers) -> None:
        def empty(shape: torch.Size) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, pin_memory=self.world.device.type == "cuda")

        with torch.device("meta"):
            self._model = GPT(model.config)
        weights = {name: empty(tensor.shape) for name, tensor in model.state_dict().items()}
        self._model.load_state_dict(weights, assign=True)
        self._optimizer = {name: empty(shape) for name, shape in state_shapes(model, optimizers).items()}

    def _write(self, step: int, model: GPT, trainer: Mapping[str, Any]) -> None:
        try:
            for name, tensor in (*model.named_parameters(), *self._optimizer.items()):
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{name} is not finite at step {step}: the checkpoints before it are the last good ones"
                    )
            self._verified.add(checkpoint.write_checkpoint(self.run, step, model, self._optimizer, trainer).name)
            checkpoint.prune(self.run, self.keep, self._verified)
        except Exception as error:  # whatever it is, the loop must learn of it
            self.error = error
