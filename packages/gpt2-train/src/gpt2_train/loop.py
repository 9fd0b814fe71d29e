"""train(config): the main path of pretraining, top to bottom."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gpt2_data import Dataset, Prefetch, TokenLoader, open_dataset
from gpt2_eval import evaluate_hellaswag, evaluate_loss
from gpt2_model import GPT, flops_per_token, generate

from . import checkpoint, distributed
from .config import TrainConfig, changed_fields, micro_batches, to_toml
from .distributed import StopSignal, World
from .metrics import RunLog, mfu
from .optimizer import lr_at, make_optimizer

T = TypeVar("T")


def train(config: TrainConfig) -> int:
    """Train, or go on training, the run in `config.out`.

    A step is one update of the weights, and step n is the state after n of them. The same call resumes a run
    that was killed: it ends with the same weights, bit for bit, as one that was not.

    Returns:
        0 when all steps are done; 128 + the signal's number when SIGTERM or SIGINT asked for an end: then the
        step just finished has a checkpoint.

    Raises:
        ValueError: a config, dataset, model and number of processes that do not go together; a loss that is no
            longer finite.
        OSError: files that cannot be read or written.
    """
    world = distributed.start(config.device)
    try:
        # Rank 0 holds the folder, until its block ends; it fails on all ranks if it fails there.
        with checkpoint.locked(Path(config.out)) if world.is_main else nullcontext():
            return _train(config, world)
    finally:
        distributed.stop(world)


def _train(config: TrainConfig, world: World) -> int:
    run = _set_up(config, world)
    with run.stop.listening(), run.batches:
        if run.step == 0 and config.eval_every:
            _evaluate(run)
        while run.step < config.steps and not run.stop_signal:
            row = _update(run)
            run.log.train(row)
            last = run.step == config.steps
            if config.eval_every and (run.step % config.eval_every == 0 or last):
                _evaluate(run)
            due = config.checkpoint_every and run.step % config.checkpoint_every == 0
            if due or last or run.stop_signal:
                _save(run)
    run.log.close()
    if run.step < config.steps:
        run.log.say(f"stopped by signal {run.stop_signal} at step {run.step}; the same command goes on from there")
        return 128 + run.stop_signal
    run.log.say(f"done: step {run.step}, {run.folder / 'checkpoints' / f'step-{run.step:08d}'}")
    return 0


@dataclass
class _Run:
    """What a step works on."""

    config: TrainConfig
    world: World
    folder: Path
    dataset: Dataset
    model: GPT
    parallel: torch.nn.Module  # the model as a step calls it: compiled, and wrapped by DDP
    optimizer: torch.optim.Optimizer
    loader: TokenLoader
    batches: Prefetch  # of the loader, which moves with it
    accumulation: int  # micro-batches of a step on each process
    log: RunLog
    step: int  # updates done
    stop: StopSignal = field(default_factory=StopSignal)
    stop_signal: int = 0  # that any process got, known to all of them


def _set_up(config: TrainConfig, world: World) -> _Run:
    folder, dataset = Path(config.out), open_dataset(config.data)
    config = replace(config, precision=_precision(config, world))
    start = _on_main(world, lambda: _starting_point(config, dataset))
    state = None if start is None else checkpoint.read_trainer_state(start)
    step = 0 if state is None else state["step"]

    torch.manual_seed(config.seed)
    model = _initial_model(config, start)
    config = replace(config, model=asdict(model.config))
    _check_vocabulary(model, dataset)
    model.to(world.device)
    largest = distributed.largest_micro_batch(model.config, config.seq_len, world.device)
    micro_batch, accumulation = micro_batches(config, world.size, largest)
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    loader = TokenLoader(
        config.data, "train", micro_batch, config.seq_len, seed=config.seed, rank=world.rank, world_size=world.size
    )
    if start is not None and state is not None:
        checkpoint.load_optimizer(start, model, optimizer)
        loader.restore(state["loader"])

    parallel: torch.nn.Module = model
    if config.compile == "on" or (config.compile == "auto" and world.device.type == "cuda"):
        parallel = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if world.size > 1:
        parallel = DistributedDataParallel(parallel, gradient_as_bucket_view=True, broadcast_buffers=False)

    log = RunLog(folder, -1 if start is None else step, config.steps, world.is_main)
    if world.is_main:
        _write_config(folder, config)
    epochs = config.steps * config.batch_tokens / dataset.tokens("train")
    log.say(
        f"{model.config.num_parameters:,} parameters, {config.precision} on {world.size} x {world.device.type}; "
        f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {epochs:.2f} epochs; "
        f"{accumulation} x {micro_batch} x {config.seq_len} tokens a step on each process"
    )
    if state is not None:
        log.say(f"resuming from {start}")
        before = state["config"]["steps"]
        if before != config.steps:
            log.say(f"steps: {before} -> {config.steps}; the learning rate follows the new schedule from here on")
    # Copies to a GPU run on after the call that began them. A step ends when all of its have, and a buffer is not
    # filled again before as many batches later as a step has.
    batches = loader.prefetch(max(accumulation, 2), _pinned if world.device.type == "cuda" else None)
    return _Run(
        config, world, folder, dataset, model, parallel, optimizer, loader, batches, accumulation, log, step
    )


def _pinned(shape: tuple[int, ...], dtype: np.dtype[np.int64]) -> np.ndarray:
    """An array in page-locked memory: a copy from it to a GPU does not hold up the CPU."""
    array: np.ndarray = torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()
    assert array.dtype == dtype
    return array


def _update(run: _Run) -> dict[str, Any]:
    """One step: gradients of the whole batch, clipped, applied. Returns its row of metrics."""
    config, world = run.config, run.world
    started = time.perf_counter()
    lr = lr_at(run.step, lr=config.lr, min_lr=config.min_lr, warmup=config.warmup, steps=config.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    loss_sum = torch.zeros((), device=world.device)
    for micro_step in range(run.accumulation):
        x, y = (torch.from_numpy(part).to(world.device, non_blocking=True) for part in next(run.batches))
        # Gradients cross the processes once a step, with the last micro-batch. The forward must be inside too:
        # it is where DDP decides whether the backward will send.
        waits = world.size > 1 and micro_step < run.accumulation - 1
        with run.parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                _, loss = run.parallel(x, y, return_logits=False)
            (loss / run.accumulation).backward()
        loss_sum += loss.detach() / run.accumulation
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or float("inf"))

    # One exchange a step: the mean loss, and which signal came to any process.
    shared = world.sum(torch.stack([loss_sum / world.size, loss_sum.new_tensor(float(run.stop.number))]))
    loss_value, signals, norm_value = *shared.tolist(), norm.item()
    if not np.isfinite([loss_value, norm_value]).all():
        raise ValueError(
            f"step {run.step + 1}: loss {loss_value}, gradient norm {norm_value}: stopped before the update, so "
            "that the last checkpoint is good. Try a lower --lr or a longer --warmup"
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if signals:
        run.stop_signal = run.stop.number or 15

    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    speed = config.batch_tokens / seconds
    return {
        "step": run.step,
        "tokens": run.step * config.batch_tokens,
        "loss": loss_value,
        "grad_norm": norm_value,
        "lr": lr,
        "tokens_per_second": speed,
        "mfu": mfu(speed, flops_per_token(run.model.config, config.seq_len), world.size, world.device),
        "seconds": seconds,
    }


def _evaluate(run: _Run) -> None:
    """Validation loss, HellaSwag where a file is given, and samples; on the plain module, since shapes vary."""
    config = run.config
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    row: dict[str, Any] = {"step": run.step}
    if run.dataset.tokens("val") > 1:
        result = evaluate_loss(
            run.model, run.dataset, tokens=config.eval_tokens, seq_len=config.seq_len, autocast_dtype=dtype
        )
        row["val_loss"] = result.loss
    if config.hellaswag:
        scores = evaluate_hellaswag(run.model, config.hellaswag, protocol="karpathy", autocast_dtype=dtype)
        row["hellaswag_acc_norm"] = scores.metrics["karpathy"]["acc_norm"].value
    if len(row) > 1:
        run.log.evaluation(row)
    if run.world.is_main and config.num_samples:
        for text in generate(
            run.model, [config.sample_prompt], num_samples=config.num_samples, max_new_tokens=32, seed=config.seed
        ):
            run.log.sample({"step": run.step, "row": text.row, "prompt": text.prompt, "text": text.text})


def _save(run: _Run) -> None:
    trainer = {
        "tokens": run.step * run.config.batch_tokens,
        "loader": run.loader.state(),
        "dataset": run.dataset.manifest.hash,
        "config": asdict(run.config),
    }

    def write() -> None:
        checkpoint.save_checkpoint(run.folder, run.step, run.model, run.optimizer, trainer)
        checkpoint.prune(run.folder, run.config.keep)

    _on_main(run.world, write)


def _on_main(world: World, work: Callable[[], T]) -> T:
    """Do it on rank 0, and have its result, or its error, on every rank: none is left waiting for the others."""
    result: Any = None
    if world.is_main:
        try:
            result = work()
        except (ValueError, OSError) as error:
            result = error
    result = world.from_main(result)
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[no-any-return]


def _starting_point(config: TrainConfig, dataset: Dataset) -> Path | None:
    """The verified checkpoint to go on from, if it is of this run: same data, same maths."""
    start = checkpoint.choose_checkpoint(Path(config.out), config.resume)
    if start is None:
        return None
    trainer = checkpoint.read_trainer_state(start)
    if trainer["dataset"] != dataset.manifest.hash:
        raise ValueError(f"{config.data} is not the dataset that {start} was trained on: choose another --out")
    changed, _ = changed_fields(trainer["config"], config)
    if changed:
        raise ValueError(f"{start} was trained with other settings ({'; '.join(changed)}): choose another --out")
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


def _write_config(folder: Path, config: TrainConfig) -> None:
    temporary = folder / ".config.toml.tmp"
    temporary.write_text(to_toml(config), encoding="utf-8")
    temporary.replace(folder / "config.toml")
