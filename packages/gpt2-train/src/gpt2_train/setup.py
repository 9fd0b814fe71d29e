"""Everything a run needs before its first step: where it stands, its model, optimizer and batches."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_data import Dataset, Prefetch, TokenLoader, open_dataset
from gpt2_eval import load_hellaswag
from gpt2_eval.hellaswag import HellaSwag
from gpt2_model import GPT, GPTConfig, flops_per_token
from gpt2_train import checkpoint, distributed
from gpt2_train.config import CannotResume, TrainConfig, changed_fields, micro_batches, to_toml
from gpt2_train.distributed import World
from gpt2_train.guard import Guard
from gpt2_train.memory import choose_micro_batch
from gpt2_train.metrics import RunLog
from gpt2_train.optimizer import Optimizers, load_state, make_optimizers
from gpt2_train.saving import Saver
from gpt2_train.space import check_space, optimizer_bytes
from gpt2_train.stopping import StopSignal
from gpt2_train.watchdog import Watchdog


@dataclass
class Run:
    """What a step works on."""

    config: TrainConfig
    world: World
    folder: Path
    dataset: Dataset
    model: GPT
    parallel: torch.nn.Module  # the model as a step calls it: compiled, and wrapped by DDP
    optimizers: Optimizers
    loader: TokenLoader
    micro_batch: int  # sequences at once
    accumulation: int  # micro-batches of a step on each process
    log: RunLog
    saver: Saver
    guard: Guard
    watchdog: Watchdog
    stop: StopSignal  # what came to this process
    hellaswag: HellaSwag | None  # the items of config.hellaswag
    batches: Prefetch = field(init=False)  # of the loader, which moves with it
    step: int = 0  # batches trained on: updates, and those left out
    updates: int = 0
    stopped_by: int = 0  # a signal's number, once all processes know
    saved: int = 0  # the newest step that has a checkpoint, or is about to
    evaluated: int | None = None  # the newest step that has been evaluated


def set_up(config: TrainConfig, world: World, stop: StopSignal) -> Run:
    """Build a run, or read it from its newest good checkpoint.

    Raises:
        ValueError: a config, dataset, model and number of processes that do not go together.
        CannotResume: a run is in the folder that cannot be gone on with.
        OSError: files that cannot be read or written.
    """
    folder, dataset = Path(config.out), open_dataset(config.data)
    config = replace(config, precision=_precision(config, world))
    start = world.on_main(lambda: _starting_point(config, dataset))
    state = {} if start is None else checkpoint.read_trainer_state(start)

    torch.manual_seed(config.seed)
    model = _initial_model(config, start)
    config = replace(config, model=asdict(model.config))
    _check_vocabulary(model, dataset)
    world.on_main(lambda: check_space(folder, config, model.config))
    model.to(world.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config, sharded=config.shard_optimizer and world.size > 1)
    stepped: Any = torch.compile(model, dynamic=False) if compiled(config, world.device) else model
    micro_batch = _micro_batch(config, state, model, stepped, world)
    if start is not None:
        load_state(model, optimizers, state["updates"], checkpoint.OptimizerFile(start))
    _, accumulation = micro_batches(replace(config, micro_batch=str(micro_batch)), world.size, micro_batch)
    parallel = stepped
    if world.size > 1:
        if compiled(config, world.device):
            # Trying micro-batches has compiled the backward whole, and all gradients would be sent at its end.
            # Compiled anew, within DDP, it is cut where a bucket is full.
            torch.compiler.reset()
        parallel = distributed.data_parallel(stepped, config.grad_compression)
    loader = TokenLoader(
        config.data, "train", micro_batch, config.seq_len, seed=config.seed, rank=world.rank,
        world_size=world.size, order=config.order,  # type: ignore[arg-type]
    )  # fmt: skip
    hellaswag = load_hellaswag(config.hellaswag) if config.hellaswag else None
    step = state.get("step", 0)
    log = _open_log(config, world, model.config, step if state else -1)
    run = Run(
        config, world, folder, dataset, model, parallel, optimizers, loader, micro_batch, accumulation, log,
        Saver(folder, config.keep, world), Guard(**state.get("guard", {"sigma": config.spike_sigma})),
        Watchdog(world.rank, config.hang_seconds), stop, hellaswag,
        step=step, updates=state.get("updates", 0), saved=step,
        evaluated=world.on_main(lambda: log.last_evaluation),
    )  # fmt: skip
    if state:
        loader.restore(state["loader"])
    world.on_main(lambda: _write_config(folder, config))
    _say(run, start, state)
    _warm_up(run)
    # Copies to a GPU run on after the call that began them. A step ends when all of its have, and a buffer is not
    # filled again before as many batches later as a step has.
    run.batches = loader.prefetch(max(accumulation, 2), _pinned if world.device.type == "cuda" else None)
    return run


def _open_log(config: TrainConfig, world: World, shape: GPTConfig, first_step: int) -> RunLog:
    """Rank 0's; if it cannot be had, all ranks learn why. Those of the others do nothing."""

    def make(enabled: bool) -> RunLog:
        flops = flops_per_token(shape, config.seq_len)
        return RunLog(config, Path(config.out), first_step, world.size, world.device, flops, enabled)

    log = make(enabled=False)

    def open_it() -> None:
        nonlocal log
        log = make(enabled=True)

    world.on_main(open_it)
    return log


def _micro_batch(
    config: TrainConfig, state: dict[str, Any], model: GPT, stepped: torch.nn.Module, world: World
) -> int:
    """Sequences at once: those of the run before, whose sums the same bits need, if it had as many processes.

    On a GPU the largest is found by trying, since what a kernel needs besides is not known.
    """
    if config.micro_batch == "auto" and state.get("processes") == world.size:
        return int(state["micro_batch"])

    def try_one(rows: int) -> None:
        _pass(config, stepped, world, rows)

    on_gpu = world.device.type == "cuda"
    chosen = choose_micro_batch(
        config, model.config, world, try_one if on_gpu else None, compiled=compiled(config, world.device),
        precision=config.precision, reserve=optimizer_bytes(config, model.config, world.size),
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    return chosen


def _pass(config: TrainConfig, stepped: torch.nn.Module, world: World, rows: int) -> None:
    """A forward and backward pass over nothing in particular."""
    tokens = torch.zeros(rows, config.seq_len, dtype=torch.int64, device=world.device)
    # Two tensors: for one in both places torch.compile makes a graph that no step can use, and then another.
    loss_of(config, stepped, world, tokens, tokens.clone()).backward()  # type: ignore[no-untyped-call]


def compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether a step is compiled."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def _warm_up(run: Run) -> None:
    """A forward and backward pass that trains nothing, where the first is not like the others.

    It compiles, so that no step's time has that in it. And after its first backward pass DDP lays its buckets out
    anew, which changes the order of sums over three or more ranks: with this, the first step after a resume is
    already like any other.
    """
    if run.world.size == 1 and not compiled(run.config, run.world.device):
        return
    if compiled(run.config, run.world.device):
        run.log.say("compiling")
    with run.watchdog.watching("warm-up", run.step):
        _pass(run.config, run.parallel, run.world, run.micro_batch)
        run.model.zero_grad(set_to_none=True)


def loss_of(
    config: TrainConfig, parallel: torch.nn.Module, world: World, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Mean loss of a micro-batch, in the run's precision."""
    with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        _, loss = parallel(x, y, return_logits=False)
    return loss  # type: ignore[no-any-return]


def validation_tokens(config: TrainConfig, dataset: Dataset) -> int:
    """That each validation predicts: as many as asked for, or all after the split's first."""
    return min(config.eval_tokens, max(0, dataset.tokens("val") - 1))


def _say(run: Run, start: Path | None, state: dict[str, Any]) -> None:
    config, model, say = run.config, run.model, run.log.say
    epochs = config.steps * config.batch_tokens / run.dataset.tokens("train")
    say(
        f"{model.config.num_parameters:,} parameters, {config.precision} on {run.world.size} x "
        f"{run.world.device.type}; "
        f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {epochs:.2f} epochs; "
        f"{run.accumulation} x {run.micro_batch} x {config.seq_len} tokens a step on each process"
    )
    if 0 < config.warmup >= config.steps:
        say(f"warning: the learning rate never comes to its peak: --warmup {config.warmup} is as long as the run")
    if config.eval_every:
        tokens = validation_tokens(config, run.dataset)
        say(f"validation every {config.eval_every} steps, on {tokens:,} tokens (--eval-tokens)")
        if not tokens:
            say("warning: the dataset has no tokens for validation: gpt2-data build --val-tokens sets some apart")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0":
        say(f"restart {restarts} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')} by torchrun")
    if start is None:
        return
    say(f"resuming from {start}")
    for change in changed_fields(state["config"], config)[1]:
        say(f"{change}, which changes nothing in what is learnt but rounding, if that")
    before = state["config"]["steps"]
    if before != config.steps:
        say(f"steps: {before} -> {config.steps}; the learning rate follows the new schedule from here on")
    for name, value in checkpoint.versions().items():
        if (old := state["versions"].get(name)) != value:
            say(f"warning: the checkpoint was made with {name} {old}, this is {value}: rounding may differ")


def _starting_point(config: TrainConfig, dataset: Dataset) -> Path | None:
    """The verified checkpoint to go on from, if it is of this run: same data, same maths."""
    checkpoint.remove_abandoned(Path(config.out))
    start = checkpoint.choose_checkpoint(Path(config.out), config.resume)
    if start is None:
        return None
    trainer = checkpoint.read_trainer_state(start)
    if trainer["dataset"] != dataset.manifest.hash:
        raise CannotResume(f"{config.data} is not the dataset that {start} was trained on: choose another --out")
    changed, _ = changed_fields(trainer["config"], config)
    if changed:
        raise CannotResume(
            f"{start} was trained with other settings ({'; '.join(changed)}): choose another --out, where --init "
            "with this checkpoint begins from its weights"
        )
    if trainer["step"] > config.steps:
        raise CannotResume(f"{start} is beyond --steps {config.steps}: choose another --out")
    return start


def _initial_model(config: TrainConfig, start: Path | None) -> GPT:
    source = start or config.init
    if not source:
        return GPT(config.model_config)
    model = GPT.from_pretrained(source).train()
    if config.model and model.config != config.model_config:
        raise ValueError(f"--init {source} has another shape than --model, --recipe or --config asks for")
    return model


def _check_vocabulary(model: GPT, dataset: Dataset) -> None:
    largest = max(shard.max_token for shard in dataset.manifest.shards)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the dataset holds token id {largest:,}, and the model's vocabulary ends at "
            f"{model.config.vocab_size - 1:,}"
        )


def _precision(config: TrainConfig, world: World) -> str:
    if config.precision != "auto":
        return config.precision
    return "bf16" if distributed.has_bf16(world.device) else "fp32"


def _pinned(shape: tuple[int, ...], dtype: np.dtype[np.int64]) -> np.ndarray:
    """An array in page-locked memory: a copy from it to a GPU does not hold up the CPU."""
    array: np.ndarray = torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()
    assert array.dtype == dtype
    return array


def _write_config(folder: Path, config: TrainConfig) -> None:
    temporary = folder / ".config.toml.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(to_toml(config))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "config.toml")
