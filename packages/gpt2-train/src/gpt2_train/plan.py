"""The plan of a run before it starts, and what would stop it: `gpt2-train --dry-run`."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from gpt2_data import Dataset, open_dataset
from gpt2_eval import load_hellaswag
from gpt2_model import GPT, flops_per_token
from gpt2_model.command import find_device, one_line
from gpt2_train import checkpoint, memory
from gpt2_train.config import TrainConfig, check_out, existing, micro_batches
from gpt2_train.console import short
from gpt2_train.distributed import choose_precision, gradient_bytes_sent
from gpt2_train.memory import Memory, available_memory, in_gb, most_that_fit, peak_memory
from gpt2_train.metrics import assumed_speed
from gpt2_train.setup import check_shape, make_loader, starting_point, validation_tokens, warnings_of
from gpt2_train.trackers import check_trackers

ASSUMED_GPU_BYTES = 80_000_000_000  # for a plan made where there is no GPU
LONG_HOURS = 72.0


def make_plan(config: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Return a run's plan, as --json prints it, after the same checks that a start makes. Writes nothing.

    `problems` and `warnings` are lists of lines; a figure unknown after a failed check is None. Sizes are bytes.
    """
    problems: list[str] = []

    def check(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
            return None

    here = check(find_device, config.device)
    device = here or torch.device(config.device if config.device in ("cuda", "mps") else "cpu")
    config = replace(config, precision=choose_precision(config.precision, here))
    dataset = check(open_dataset, config.data)
    start = check(starting_point, config, dataset) if dataset else None
    source = start or config.init
    shape = (check(GPT.inspect, source) if source else None) or config.model_config
    if dataset:
        check(check_shape, config, shape, dataset, start)
        check(make_loader, config, 1, 0, world_size)
    config = replace(config, model=asdict(shape))
    free_host, free_device = available_memory(), None
    if device.type == "cuda":
        free_device = torch.cuda.mem_get_info(here)[0] if here else ASSUMED_GPU_BYTES
    # 5 % of a GPU's memory is lost between the allocator's blocks.
    free = free_host if free_device is None else 0.95 * free_device
    split = check(lambda: micro_batches(config, world_size, most_that_fit(config, world_size, device.type, free)))
    micro_batch, accumulation = split or (None, None)
    peak = None
    if micro_batch is not None:
        peak = peak_memory(config, micro_batch, world_size, device.type)
        check(_check_memory, peak, free_device, free_host)
    check(check_out, config.out)
    check(memory.check_space, config)
    check(check_trackers, config)
    if config.hellaswag:
        check(load_hellaswag, config.hellaswag)
    work = _work(config, dataset, world_size, *assumed_speed(config, device, here is not None))
    warnings = warnings_of(config, dataset) if dataset else []
    if work["hours"] and work["hours"] > LONG_HOURS:
        warnings.append(f"the run takes about {_duration(work['hours'])} here: lower --steps or --batch-tokens")
    return work | {
        "device": device.type,
        "compiled": config.compiles(device.type),
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "memory": peak and asdict(peak),
        "free_device_bytes": free_device,
        "free_host_bytes": free_host,
        "resumes_from": str(start) if start else None,
        "resumes_at_step": checkpoint.read_trainer_state(start)["step"] if start else None,
        "warnings": warnings,
        "problems": problems,
    }


def _work(
    config: TrainConfig, dataset: Dataset | None, world_size: int, speed: float | None, speed_source: str
) -> dict[str, Any]:
    """Return what the run computes, sends, writes, and how long that takes at `speed` operations a second."""
    shape, tokens = config.model_config, config.steps * config.batch_tokens
    flops = flops_per_token(shape, config.seq_len)
    token_hours = flops / (speed * world_size) / 3600 if speed else None
    train_tokens = dataset.tokens("train") if dataset else None
    # One before the first step, one after the last; a forward pass is a third of a step.
    validations = 1 + -(-config.steps // config.eval_every) if config.eval_every else 0
    to_validate = validation_tokens(config, dataset) if dataset else None
    return {
        "out": config.out,
        "steps": config.steps,
        "batch_tokens": config.batch_tokens,
        "seq_len": config.seq_len,
        "precision": config.precision,
        "processes": world_size,
        "parameters": shape.num_parameters,
        "tokens": tokens,
        "train_tokens": train_tokens,
        "val_tokens": dataset.tokens("val") if dataset else None,
        "epochs": tokens / train_tokens if train_tokens else None,
        "flops_formula": "6 N + 6 L C T a token (llm.c)",
        "flops_per_token": flops,
        "flops": float(flops * tokens),
        "flops_per_second": speed,
        "speed_source": speed_source,
        "hours": tokens * token_hours if token_hours else None,
        "validations": validations,
        "validation_tokens": to_validate,
        "validation_hours": token_hours and to_validate and validations * to_validate * token_hours / 3,
        "gradient_bytes_sent": gradient_bytes_sent(shape.num_parameters, world_size, config.grad_compression),
        "checkpoint_bytes": memory.checkpoint_bytes(config),
        "checkpoints_at_once": memory.checkpoints_at_once(config),
        "free_disk_bytes": shutil.disk_usage(existing(Path(config.out))).free,
    }


def _check_memory(peak: Memory, free_device: int | None, free_host: int) -> None:
    for needed, free, whose in (
        (peak.device_bytes, free_device, "a process needs about {} of the GPU's memory"),
        (peak.needed_on_host(), free_host, "the run needs about {} of this machine's memory"),
    ):
        if free is not None and needed > free:
            advice = "use --activation-checkpointing, a smaller --micro-batch or --seq-len, or a smaller model"
            raise ValueError(f"{whose.format(in_gb(needed))}, and {in_gb(free)} are free: {advice}")


def to_lines(plan: dict[str, Any]) -> list[str]:
    """Return the plan as lines of at most 100 columns, without facts that a failed check left unknown."""
    facts = {
        "parameters": f"{plan['parameters']:,}",
        "steps": f"{plan['steps']:,} of {plan['batch_tokens']:,} tokens, {short(plan['tokens'])} in all",
    }
    if plan["epochs"] is not None:
        facts["data"] = f"{short(plan['train_tokens'])} training tokens: {plan['epochs']:,.2f} epochs"
    compiled = ", compiled" if plan["compiled"] else ""
    facts["processes"] = f"{plan['processes']} on {plan['device']}, {plan['precision']}{compiled}"
    if plan["micro_batch"] is not None:
        sizes = f"{plan['accumulation']} x {plan['micro_batch']} x {plan['seq_len']:,}"
        facts["a step"] = f"{sizes} tokens on each process (accumulation x micro-batch x sequence)"
    if plan["processes"] > 1:
        sent = in_gb(plan["gradient_bytes_sent"])
        facts["exchange"] = f"{sent} of gradients sent by each process in a step, in a ring"
    if plan["memory"] is not None:
        facts |= _memory_facts(plan)
    each, total = f"{plan['flops_per_token']:,}", f"{plan['flops']:.3g}"
    facts["operations"] = f"{each} a token, {total} in all: {plan['flops_formula']}"
    facts["time"] = plan["speed_source"]
    if plan["hours"] is not None:
        speed = plan["processes"] * plan["flops_per_second"] / plan["flops_per_token"]
        facts["time"] = f"{_duration(plan['hours'])} at {short(speed)} tokens/s: {plan['speed_source']}"
    if plan["validations"] and plan["validation_tokens"]:
        more = "" if plan["validation_hours"] is None else f", {_duration(plan['validation_hours'])} more"
        facts["validation"] = f"{plan['validations']} times {plan['validation_tokens']:,} tokens{more}"
    each, number, free = plan["checkpoint_bytes"], plan["checkpoints_at_once"], in_gb(plan["free_disk_bytes"])
    facts["checkpoints"] = f"{in_gb(each)} each, {number} at once: {in_gb(each * number)} of {free} free"
    facts["run folder"] = plan["out"]
    if (step := plan["resumes_at_step"]) is not None:
        state = "is done already" if step == plan["steps"] else f"resumes at step {step:,}"
        facts["run folder"] += f", which {state}: {plan['resumes_from']}"
    return [
        f"{name if number == 0 else '':14}{line}"
        for name, fact in facts.items()
        for number, line in enumerate(wrap(fact, 86, break_long_words=False, break_on_hyphens=False))
    ]


def _memory_facts(plan: dict[str, Any]) -> dict[str, str]:
    peak, facts = plan["memory"], {}
    names = {
        "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
        "head": "logits and loss", "program": "torch", "checkpoint_copy": "copy for checkpoints",
    }  # fmt: skip
    parts = [f"{name} {in_gb(peak[part])}" for part, name in names.items()]
    if peak["device_bytes"]:
        free = in_gb(plan["free_device_bytes"] or 0)
        facts["device memory"] = f"{in_gb(peak['device_bytes'])} of {free}: {', '.join(parts[:-2])}"
        parts = parts[-2:]
    free = in_gb(plan["free_host_bytes"])
    facts["host memory"] = f"{in_gb(peak['host_bytes'])} of {free} free, on rank 0: {', '.join(parts)}"
    return facts


def _duration(hours: float) -> str:
    """Return hours as "3.2 days", "1.5 hours" or "12 minutes"."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{ceil(60 * hours)} minutes"
