"""Everything a run needs before its first step: its starting point, model, optimizer and batches."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_data import Dataset, Prefetch, TokenLoader, open_dataset
from gpt2_eval import HellaSwag
from gpt2_model import GPT, Tokenizer
from gpt2_model.command import write_whole
from gpt2_train import checkpoint, distributed
from gpt2_train.checkpoint import Saver
from gpt2_train.config import TrainConfig, changed_fields, sequences, to_toml
from gpt2_train.distributed import World
from gpt2_train.faults import Guard, StopSignal, Watchdog
from gpt2_train.memory import choose_micro_batch
from gpt2_train.metrics import RunLog
from gpt2_train.optimizer import Optimizers, load_state, make_optimizers
from gpt2_train.start import Start, check_start, expected_hours, make_loader, validation_tokens, warnings_of

# loop.loss_of, passed in so that trials of micro-batches and the warm-up do the forward pass of a step.
LossOf = Callable[[TrainConfig, torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class Run:
    """What a step works on."""

    config: TrainConfig  # resolved: precision and the model's shape are known
    world: World
    folder: Path
    dataset: Dataset
    model: GPT
    parallel: torch.nn.Module  # the model as a step calls it: compiled, and wrapped by DDP
    optimizers: Optimizers
    loader: TokenLoader  # the position in the data
    batches: Prefetch = field(init=False)  # the thread that moves it on
    micro_batch: int  # sequences that this process computes at once
    accumulation: int  # how many times it does so in a step
    log: RunLog
    saver: Saver
    guard: Guard
    watchdog: Watchdog
    stop: StopSignal  # the signal that came to this process
    stopped_by: int = 0  # its number, once all processes know of it
    hellaswag: HellaSwag | None
    tokenizer: Tokenizer
    step: int  # batches trained on
    updates: int  # those that changed the weights: some may have been skipped
    saved: int  # the newest step that has a checkpoint, or whose checkpoint is being written
    evaluated: int | None  # the newest step that has been evaluated

    @contextmanager
    def watching(self, what: str, step: int, **options: float) -> Iterator[None]:
        """Show what is done in the block, where it takes long, and end the process if it hangs."""
        self.log.progress(f"step {step}: {what}")
        with self.watchdog.watching(what, step, **options):
            yield


def set_up(config: TrainConfig, world: World, stop: StopSignal, loss_of: LossOf, log: RunLog) -> Run:
    """Build a new run, or one from its newest good checkpoint. Raises the errors of `loop.train`."""
    folder = Path(config.out)
    if world.size > 1:
        check_alike(config, open_dataset(config.data), world)
    log.progress("checking the start")
    world.on_main(lambda: checkpoint.remove_abandoned(folder, log.warn))
    start = check_start(config, world.size, world.device, on_main=world.on_main)
    config, dataset, state = start.config, start.dataset, start.state

    torch.manual_seed(config.seed)
    source = start.checkpoint or config.init
    log.progress("loading the model")
    model = GPT.from_pretrained(source).train() if source else GPT(config.model_config)
    if dataset.tokenizer and not start.checkpoint:
        model.tokenizer = start.tokenizer
    model.to(world.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config, sharded=config.shard_optimizer and world.size > 1)
    compiles, on_gpu = config.compiles(world.device.type), world.device.type == "cuda"
    stepped: Any = torch.compile(model, dynamic=False) if compiles else model

    def one_pass(module: torch.nn.Module, rows: int) -> None:
        """Do a forward and backward pass over tokens that mean nothing."""
        tokens = torch.zeros(rows, config.seq_len, dtype=torch.int64, device=world.device)
        # Two tensors: given the same one twice, torch.compile makes a graph that no step can use, then another.
        loss_of(config, module, tokens, tokens.clone()).backward()  # type: ignore[no-untyped-call]

    if config.micro_batch == "auto" and state.get("processes") == world.size:
        micro_batch = int(state["micro_batch"])  # the same bits need the same order of sums
    else:
        log.progress("looking for the largest micro-batch")
        # On a GPU the largest is found by trying, since it is not known how much memory kernels need besides.
        micro_batch = choose_micro_batch(config, world, partial(one_pass, stepped) if on_gpu else None)
        model.zero_grad(set_to_none=True)
    if world.size > 1:
        if compiles:
            # Trying micro-batches has compiled the backward in one piece: all gradients would be sent at its end.
            # Compiled again, within DDP, it is split where a bucket is full.
            torch.compiler.reset()
        stepped = distributed.data_parallel(stepped, config.grad_compression)
    loader = make_loader(config, micro_batch, world.rank, world.size)
    log.progress("loading the data and the optimizer")
    if start.checkpoint:
        load_state(model, optimizers, state["updates"], partial(checkpoint.optimizer_tensor, start.checkpoint))
        loader.restore(state["loader"])
    step = state.get("step", 0)
    run = Run(
        config=config, world=world, folder=folder, dataset=dataset, model=model, parallel=stepped,
        optimizers=optimizers, loader=loader, micro_batch=micro_batch, log=log,
        accumulation=sequences(config, world.size) // micro_batch,
        evaluated=world.on_main(lambda: log.open(config, state.get("step", -1))),
        saver=Saver(folder, config.keep, world, log.warn),
        guard=Guard(**state.get("guard", {"sigma": config.spike_sigma})),
        watchdog=Watchdog(world.rank, config.hang_seconds, partial(checkpoint.onward, folder)), stop=stop,
        hellaswag=start.hellaswag, tokenizer=start.tokenizer,
        step=step, updates=state.get("updates", 0), saved=step,
    )  # fmt: skip
    world.on_main(lambda: _write_config(folder, config))
    _say(run, start)
    _warm_up(run, one_pass)
    # Copies to a GPU continue after the call that begins them. A step ends only after all of its copies, and a
    # buffer is filled again only after at least as many batches as a step has.
    run.batches = loader.prefetch(max(run.accumulation, 2), _pinned if on_gpu else None)
    return run


def check_alike(config: TrainConfig, dataset: Dataset, world: World) -> None:
    """Raise ValueError, on all ranks, if one was started with other settings or data, as on another machine."""
    first, *others = world.gather({**asdict(config), "dataset": dataset.manifest.hash})
    for rank, settings in enumerate(others, 1):
        unlike = [name for name in first if settings[name] != first[name]]
        if unlike := sorted(set(unlike) - {"data", "out", "resume", "device"}):
            name = unlike[0]
            change = f"{name}: {settings[name]}, rank 0 has {first[name]}"
            raise ValueError(f"rank {rank} was started with other settings ({change}): all need the same command")


def _warm_up(run: Run, one_pass: Callable[[torch.nn.Module, int], None]) -> None:
    """Do a pass that trains nothing, if the first pass differs from the others.

    The first pass compiles, which should not count as a step's time. And after it DDP lays its buckets out again,
    which changes the order of sums over three or more ranks.
    """
    compiles = run.config.compiles(run.world.device.type)
    if compiles:
        run.log.say("compiling")
    if compiles or run.world.size > 1:
        with run.watching("warm-up", run.step):
            one_pass(run.parallel, run.micro_batch)
            run.model.zero_grad(set_to_none=True)


def _say(run: Run, start: Start) -> None:
    """Say what the run is, in short lines, and what differs from the run that it resumes."""
    config, say, state = run.config, run.log.say, start.state
    epochs = config.steps * config.batch_tokens / run.dataset.tokens("train")
    parameters, device = run.model.config.num_parameters, run.world.device.type
    say(f"{parameters:,} parameters, {config.precision} on {run.world.size} x {device}")
    say(f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {epochs:,.2f} epochs")
    say(f"{run.accumulation} x {run.micro_batch} x {config.seq_len} tokens a step on each process")
    if config.eval_every:
        val_tokens = validation_tokens(config, run.dataset)
        say(f"validation every {config.eval_every} steps, on {val_tokens:,} tokens (--eval-tokens)")
    if run.world.is_main:
        for warning in warnings_of(
            start, run.world.size, expected_hours(config, run.world.size, run.world.device)
        ):
            run.log.warn(warning)
    if (restarts := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        say(f"restart {restarts} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')} by torchrun")
    if start.checkpoint is None:
        return
    say(f"resuming from {start.checkpoint}")
    for change in changed_fields(state["config"], config)[1]:
        say(f"{change}, which changes at most the rounding")
    if (before := state["config"]["steps"]) != config.steps:
        say(f"steps: {before} -> {config.steps}; the learning rate follows the new schedule from here on")
    for name, value in checkpoint.versions().items():
        if (old := state["versions"].get(name)) != value:
            run.log.warn(f"the checkpoint was made with {name} {old}, this is {value}: rounding may differ")


def _pinned(shape: tuple[int, ...], dtype: np.dtype[np.int64]) -> np.ndarray:
    """Return an array in page-locked memory: the CPU need not wait for copies from it to a GPU."""
    return torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()


def _write_config(folder: Path, config: TrainConfig) -> None:
    with write_whole(folder / "config.toml") as file:
        file.write(to_toml(config).encode())
