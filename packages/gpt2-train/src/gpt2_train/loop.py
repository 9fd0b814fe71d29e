"""train(config): the main path of pretraining, top to bottom."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2_eval import Interrupted, evaluate_hellaswag, evaluate_loss
from gpt2_model import stream
from gpt2_model.command import one_line
from gpt2_train import checkpoint, distributed
from gpt2_train.config import TrainConfig
from gpt2_train.distributed import World
from gpt2_train.faults import StopSignal
from gpt2_train.metrics import RunLog
from gpt2_train.optimizer import lr_at
from gpt2_train.setup import Run, set_up
from gpt2_train.start import prompt_ids
from gpt2_train.trackers import in_one_line, profiling


def train(config: TrainConfig) -> int:
    """Train the run in `config.out`, or resume it.

    A step is one batch: an update of the weights, unless its loss or gradient was not finite. A run that was
    killed and resumed ends with the same weights, bit for bit, as one that was not.

    Returns:
        0 when all steps are done; 128 + the signal's number when one of `faults.SIGNALS` ended the run, after a
        checkpoint of the step just finished.

    Raises:
        ValueError: settings that do not go together; too many steps in a row that are not finite.
        OSError: files that cannot be read or written.
    """
    with StopSignal().listening() as stop, ExitStack() as stack:
        world = distributed.start(config.device, deterministic=config.deterministic, stop=stop)
        if world is None:
            return 128 + stop.number
        log = stack.enter_context(closing(RunLog(config.steps, world)))
        # Rank 0 locks the folder; if it cannot, all ranks raise its error.
        world.on_main(lambda: stack.enter_context(checkpoint.hold_folder(Path(config.out))))
        status = _train(config, world, stop, log)
    distributed.stop(world)  # not after an error: it would wait for an exchange with ranks that hang
    return status


def _train(config: TrainConfig, world: World, stop: StopSignal, log: RunLog) -> int:
    run = set_up(config, world, stop, loss_of, log)
    try:
        profiled = config.profile if world.is_main else 0
        with run.batches, profiling(run.folder, profiled, run.step + 1, config.steps, run.log.say) as step_done:
            _agree_to_stop(run)  # a signal may have come before the first step
            while True:
                if _evaluation_is_due(run):
                    _evaluate(run)
                if _checkpoint_is_due(run):
                    _save(run)
                if run.step == config.steps or run.stopped_by:
                    break
                _update(run)
                step_done()
        with run.watching("checkpoint", run.step):
            run.saver.wait()
            # Without its last checkpoint a run is not done, whatever on_save_error says.
            _check_saving(run, may_go_on=False)
    finally:
        run.saver.wait()
        run.watchdog.close()
    if run.step < config.steps:
        onward = "resumes from there" if run.step else "begins anew"
        run.log.say(f"stopped by signal {run.stopped_by} at step {run.step}; the same command {onward}")
        return 128 + run.stopped_by
    run.log.say(f"done: step {run.step}, {checkpoint.checkpoint_folder(run.folder, run.step)}")
    return 0


def _update(run: Run) -> None:
    """Do one step: compute the gradients of the whole batch, clip them, and apply them if the guard agrees."""
    run.stop.training = True
    with run.watching("update", run.step + 1):
        started = time.perf_counter()
        config, world = run.config, run.world
        lr = lr_at(
            run.step, lr=config.lr, min_lr=config.min_lr, warmup=config.warmup, steps=config.steps,
            schedule=config.schedule, decay_steps=config.decay_steps,
        )  # fmt: skip
        loss_sum, data_seconds = _backward(run)
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])

        # One exchange a step: the mean loss and norm, whether any process got a signal, or a save failed. From
        # here on all processes have the same numbers, and so decide alike.
        own = [loss_sum, norm, float(run.stop.number > 0), float(run.saver.error is not None)]
        shared = torch.stack([torch.as_tensor(value, device=world.device).float() for value in own])
        loss, grad_norm, signals, failures = world.sum(shared / world.size).tolist()
        reason = run.guard.judge(loss, grad_norm)
        if reason is None:
            # Clipping by a factor of 1 would pass over all gradients for nothing: 1 % of a CPU's step.
            if 0 < config.grad_clip < grad_norm:
                torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.grad_clip, norm)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            run.updates += 1
        # DDP's gradients are views of its buckets. Set to None, they would be allocated again, 6 GB for 1558M.
        run.model.zero_grad(set_to_none=world.size == 1)
        run.step += 1
        if signals:
            run.stopped_by = run.stop.number or 15
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    row: dict[str, Any] = {
        "step": run.step, "tokens": run.step * config.batch_tokens, "loss": loss, "grad_norm": grad_norm, "lr": lr,
        "seconds": seconds, "data_seconds": data_seconds, "peak_memory": _peak_memory(world.device),
    }  # fmt: skip
    run.log.train(row if reason is None else {**row, "skipped": reason})
    if failures:
        _check_saving(run, may_go_on=config.on_save_error == "continue")
    if run.guard.skips >= config.max_skips:
        advice = "try a lower --lr or a longer --warmup with another --out"
        advice += "; the last checkpoint is good" * (run.saved > 0)
        raise ValueError(f"step {run.step}: {run.guard.skips} updates in a row were skipped ({reason}): {advice}")


def _backward(run: Run) -> tuple[torch.Tensor, float]:
    """Add up a whole batch's gradients; return this process's mean loss (), and the seconds spent on data."""
    world = run.world
    loss_sum, data_seconds = torch.zeros((), device=world.device), 0.0
    for micro_step in range(run.accumulation):
        run.log.progress(f"step {run.step + 1}: micro-batch", micro_step + 1, run.accumulation)
        asked = time.perf_counter()
        batch = next(run.batches)
        data_seconds += time.perf_counter() - asked
        x, y = (torch.from_numpy(part).to(world.device, non_blocking=True) for part in batch)
        # Gradients are exchanged once a step, with the last micro-batch. The forward pass must be inside, too: it
        # is where DDP decides whether the backward pass will send them.
        waits = world.size > 1 and micro_step < run.accumulation - 1
        with run.parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
            loss = loss_of(run.config, run.parallel, x, y)
            (loss / run.accumulation).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach() / run.accumulation
    return loss_sum, data_seconds


def loss_of(config: TrainConfig, parallel: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean loss () of a micro-batch of tokens x and targets y, each (B, T), in the run's precision."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        _, loss = parallel(x, y, return_logits=False)
    return loss  # type: ignore[no-any-return]


def _evaluation_is_due(run: Run) -> bool:
    """True at step 0, every `eval_every` steps and at the end; also after a resume if a kill prevented it."""
    every = run.config.eval_every
    if not every or run.stopped_by or run.evaluated == run.step:
        return False
    return run.step % every == 0 or run.step == run.config.steps


def _evaluate(run: Run) -> None:
    """Measure validation loss and, with a file, HellaSwag, and write samples. The processes share the work.

    If a step is compiled, so are the measurements; samples come from the uncompiled module, whose weights are the
    same. A signal interrupts the evaluation; the resumed run repeats it.
    """
    config, started = run.config, time.perf_counter()
    options: dict[str, Any] = {
        "autocast_dtype": torch.bfloat16 if config.precision == "bf16" else None,
        "compile": config.compiles(run.world.device.type),
        "stop": lambda: run.stop.number > 0,
    }
    row: dict[str, Any] = {"step": run.step, "tokens": run.step * config.batch_tokens}
    with run.watching("evaluation", run.step, first_seconds=float("inf")):
        try:
            if run.dataset.tokens("val") > 1:
                with _measuring(run, "validation loss") as progress:
                    row["val_loss"] = evaluate_loss(
                        run.model, run.dataset, tokens=config.eval_tokens, seq_len=config.seq_len,
                        progress=progress, **options,
                    ).loss  # fmt: skip
            if run.hellaswag is not None:
                with _measuring(run, "HellaSwag") as progress:
                    scores = evaluate_hellaswag(
                        run.model, run.hellaswag, protocol="karpathy", progress=progress, **options
                    )
                    row["hellaswag_acc_norm"] = scores.metrics["karpathy"]["acc_norm"].value
            with _measuring(run, "samples"):
                for sample in _samples(run):
                    run.log.sample(sample)
        except Interrupted:
            pass
        else:
            run.log.evaluation({**row, "seconds": time.perf_counter() - started})
            run.evaluated = run.step
        _agree_to_stop(run)


@contextmanager
def _measuring(run: Run, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows the progress. If all ranks fail, as where a shard is gone, warn and train on."""
    show = partial(run.log.progress, f"step {run.step}: {what}")
    show()
    try:
        yield show
    except (OSError, ValueError) as error:
        run.log.warn(f"step {run.step}: no {what} ({one_line(error)}); training continues", what)


def _samples(run: Run) -> list[dict[str, Any]]:
    """Continue the prompt. Each process writes some of the rows; their texts do not depend on which one does.

    Raises ValueError on all ranks if one failed.
    """
    config, world = run.config, run.world
    first, last = (config.num_samples * rank // world.size for rank in (world.rank, world.rank + 1))
    own, failure = [], ""
    try:
        for piece in stream(
            run.model, [prompt_ids(config, run.tokenizer)], num_samples=last - first, first_row=first,
            max_new_tokens=32, seed=config.seed,
        ) if last > first else ():  # fmt: skip
            if run.stop.number:
                break
            if (row := piece.completion) is not None:
                # `stream` gives no text where the model has only a part of GPT-2's vocabulary.
                text = row.text or run.tokenizer.decode(row.tokens)
                own.append({"step": run.step, "row": row.row, "prompt": config.sample_prompt, "text": text})
    except Exception as error:
        failure = in_one_line(error)
    shares = world.gather((run.stop.number > 0, failure, own))
    if any(stopped for stopped, _, _ in shares):
        raise Interrupted
    if failures := [failure for _, failure, _ in shares if failure]:
        raise ValueError(failures[0])
    return sorted((row for _, _, rows in shares for row in rows), key=lambda row: int(row["row"]))


def _agree_to_stop(run: Run) -> None:
    if any(run.world.gather(run.stop.number > 0)):
        run.stopped_by = run.stop.number or 15


def _checkpoint_is_due(run: Run) -> bool:
    if run.step == run.saved:
        return False
    every = run.config.checkpoint_every
    return bool(every and run.step % every == 0) or run.step == run.config.steps or run.stopped_by > 0


def _save(run: Run) -> None:
    """Begin a checkpoint of the state as it is now; training continues while it is written."""
    trainer = {
        "updates": run.updates, "processes": run.world.size, "micro_batch": run.micro_batch,
        "tokens": run.step * run.config.batch_tokens, "loader": run.loader.state(), "guard": asdict(run.guard),
        "dataset": run.dataset.manifest.hash, "config": asdict(run.config),
    }  # fmt: skip
    with run.watching("checkpoint", run.step):
        run.saver.wait()
        _check_saving(run, may_go_on=run.config.on_save_error == "continue")
        run.log.flush()
        run.saver.save(run.step, run.model, run.optimizers, trainer)
        run.world.on_main(lambda: None)  # the others wait here, and not in a step that would seem to hang
    run.saved = run.step


def _check_saving(run: Run, *, may_go_on: bool) -> None:
    """If a checkpoint could not be written, end the run on all ranks or, with `may_go_on`, only say so."""

    def check() -> None:
        error, run.saver.error = run.saver.error, None
        if error and not may_go_on:
            raise error
        if error:
            run.log.warn(f"{error}; training continues because of --on-save-error continue")

    run.world.on_main(check)


def _peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
