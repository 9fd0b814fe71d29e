"""Everything a run needs before its first step: its starting point, model, optimizer and batches."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_data import Dataset, Prefetch, TokenLoader, open_dataset
from gpt2_eval import HellaSwag, load_hellaswag
from gpt2_model import EOT, GPT, GPTConfig
from gpt2_model.command import write_whole
from gpt2_train import checkpoint, distributed
from gpt2_train.checkpoint import Saver
from gpt2_train.config import CannotResume, TrainConfig, changed_fields, sequences, to_toml
from gpt2_train.distributed import World
from gpt2_train.faults import Guard, StopSignal, Watchdog
from gpt2_train.memory import check_space, choose_micro_batch
from gpt2_train.metrics import RunLog
from gpt2_train.optimizer import Optimizers, load_state, make_optimizers

MANY_EPOCHS = 40  # beyond about four, repeated data helps less and less (Muennighoff et al. 2023)

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
    step: int  # batches trained on
    updates: int  # those that changed the weights: some may have been skipped
    saved: int  # the newest step that has a checkpoint, or whose checkpoint is being written
    evaluated: int | None  # the newest step that has been evaluated


def set_up(config: TrainConfig, world: World, stop: StopSignal, loss_of: LossOf) -> Run:
    """Build a new run, or one from its newest good checkpoint. Raises the errors of `loop.train`."""
    folder, dataset = Path(config.out), open_dataset(config.data)
    config = replace(config, precision=distributed.choose_precision(config.precision, world.device))
    world.on_main(lambda: checkpoint.remove_abandoned(folder))
    start = world.on_main(lambda: starting_point(config, dataset))
    state = {} if start is None else checkpoint.read_trainer_state(start)

    torch.manual_seed(config.seed)
    source = start or config.init
    model = GPT.from_pretrained(source).train() if source else GPT(config.model_config)
    check_shape(config, model.config, dataset, start)
    config = replace(config, model=asdict(model.config))
    world.on_main(lambda: check_space(config))
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
    if start is not None:
        load_state(model, optimizers, state["updates"], partial(checkpoint.optimizer_tensor, start))
        loader.restore(state["loader"])
    hellaswag = load_hellaswag(config.hellaswag) if config.hellaswag else None
    log, step = RunLog(config, state.get("step", -1), world), state.get("step", 0)
    run = Run(
        config=config, world=world, folder=folder, dataset=dataset, model=model, parallel=stepped,
        optimizers=optimizers, loader=loader, micro_batch=micro_batch, log=log,
        accumulation=sequences(config, world.size) // micro_batch, evaluated=world.on_main(log.open),
        saver=Saver(folder, config.keep, world), guard=Guard(**state.get("guard", {"sigma": config.spike_sigma})),
        watchdog=Watchdog(world.rank, config.hang_seconds), stop=stop, hellaswag=hellaswag,
        step=step, updates=state.get("updates", 0), saved=step,
    )  # fmt: skip
    world.on_main(lambda: _write_config(folder, config))
    _say(run, start, state)
    _warm_up(run, one_pass)
    # Copies to a GPU continue after the call that begins them. A step ends only after all of its copies, and a
    # buffer is filled again only after at least as many batches as a step has.
    run.batches = loader.prefetch(max(run.accumulation, 2), _pinned if on_gpu else None)
    return run


def starting_point(config: TrainConfig, dataset: Dataset) -> Path | None:
    """Return the verified checkpoint to resume from, or None; raise CannotResume if it does not fit the run."""
    start = checkpoint.choose_checkpoint(Path(config.out), config.resume)
    if start is None:
        return None
    trainer = checkpoint.read_trainer_state(start)
    if trainer["dataset"] != dataset.manifest.hash:
        raise CannotResume(f"{config.data} is not the dataset that {start} was trained on: choose another --out")
    if changed := changed_fields(trainer["config"], config)[0]:
        advice = "choose another --out; --init with this checkpoint starts from its weights"
        raise CannotResume(f"{start} was trained with other settings ({'; '.join(changed)}): {advice}")
    if trainer["step"] > config.steps:
        raise CannotResume(f"{start} is beyond --steps {config.steps}: choose another --out")
    return start


def check_shape(config: TrainConfig, shape: GPTConfig, dataset: Dataset, start: Path | None) -> None:
    """Raise ValueError if the model that a run begins with does not match its settings or its data."""
    if config.model and shape != config.model_config:
        source = f"{start}" if start else f"--init {config.init}"
        raise ValueError(f"{source} has another shape than --model, --recipe or --config asks for")
    if config.seq_len > (longest := shape.block_size):
        context = f"the context of {config.init or start}, {longest}"
        raise ValueError(f"seq_len {config.seq_len} is longer than {context}: use --seq-len {longest}")
    last = shape.vocab_size - 1
    # Other projects' files are read for it, so only if an id that GPT-2 has may be too large.
    if last < EOT and (largest := max(shard.max_token for shard in dataset.manifest.shards)) > last:
        raise ValueError(f"{config.data} holds token id {largest:,}, and the model's vocabulary ends at {last:,}")


def make_loader(config: TrainConfig, micro_batch: int, rank: int, world_size: int) -> TokenLoader:
    """Return the training batches of a process. Raises ValueError if the data is too short for one sample."""
    return TokenLoader(
        config.data, "train", micro_batch, config.seq_len, seed=config.seed, rank=rank, world_size=world_size,
        order=config.order,  # type: ignore[arg-type]
    )  # fmt: skip


def warnings_of(config: TrainConfig, dataset: Dataset) -> list[str]:
    """Return warnings about settings that work but are unwise, one line each."""
    lines = []
    if 0 < config.warmup >= config.steps:
        advice = f"--warmup {config.warmup} is as long as the run; try --warmup {config.steps // 10}"
        lines.append(f"the learning rate never reaches its peak: {advice}")
    if config.eval_every and not validation_tokens(config, dataset):
        lines.append("the dataset has no tokens for validation: gpt2-data build --val-tokens sets some apart")
    train_tokens = dataset.tokens("train")
    epochs = config.steps * config.batch_tokens / max(1, train_tokens)
    if epochs > MANY_EPOCHS:
        steps = max(1, 10 * train_tokens // config.batch_tokens)
        lines.append(f"each text is seen {epochs:,.0f} times: --steps {steps} gives about ten epochs")
    return lines


def validation_tokens(config: TrainConfig, dataset: Dataset) -> int:
    """Return how many tokens each validation predicts: as many as asked for, or all but the split's first."""
    return min(config.eval_tokens, max(0, dataset.tokens("val") - 1))


def _warm_up(run: Run, one_pass: Callable[[torch.nn.Module, int], None]) -> None:
    """Do a pass that trains nothing, if the first pass differs from the others.

    The first pass compiles, which should not count as a step's time. And after it DDP lays its buckets out again,
    which changes the order of sums over three or more ranks.
    """
    compiles = run.config.compiles(run.world.device.type)
    if compiles:
        run.log.say("compiling")
    if compiles or run.world.size > 1:
        with run.watchdog.watching("warm-up", run.step):
            one_pass(run.parallel, run.micro_batch)
            run.model.zero_grad(set_to_none=True)


def _say(run: Run, start: Path | None, state: dict[str, Any]) -> None:
    """Say what the run is, in short lines, and what differs from the run that it resumes."""
    config, say = run.config, run.log.say
    epochs = config.steps * config.batch_tokens / run.dataset.tokens("train")
    parameters, device = run.model.config.num_parameters, run.world.device.type
    say(f"{parameters:,} parameters, {config.precision} on {run.world.size} x {device}")
    say(f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {epochs:,.2f} epochs")
    say(f"{run.accumulation} x {run.micro_batch} x {config.seq_len} tokens a step on each process")
    if config.eval_every:
        val_tokens = validation_tokens(config, run.dataset)
        say(f"validation every {config.eval_every} steps, on {val_tokens:,} tokens (--eval-tokens)")
    for warning in warnings_of(config, run.dataset):
        say(f"warning: {warning}")
    if (restarts := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        say(f"restart {restarts} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')} by torchrun")
    if start is None:
        return
    say(f"resuming from {start}")
    for change in changed_fields(state["config"], config)[1]:
        say(f"{change}, which changes at most the rounding")
    if (before := state["config"]["steps"]) != config.steps:
        say(f"steps: {before} -> {config.steps}; the learning rate follows the new schedule from here on")
    for name, value in checkpoint.versions().items():
        if (old := state["versions"].get(name)) != value:
            say(f"warning: the checkpoint was made with {name} {old}, this is {value}: rounding may differ")


def _pinned(shape: tuple[int, ...], dtype: np.dtype[np.int64]) -> np.ndarray:
    """Return an array in page-locked memory: the CPU need not wait for copies from it to a GPU."""
    return torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()


def _write_config(folder: Path, config: TrainConfig) -> None:
    with write_whole(folder / "config.toml") as file:
        file.write(to_toml(config).encode())
