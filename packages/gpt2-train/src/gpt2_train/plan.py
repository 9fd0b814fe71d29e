"""The plan of a run before it starts, and what would stop it: `gpt2-train --dry-run`."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from gpt2_data import Dataset
from gpt2_model import flops_per_token
from gpt2_model.command import check_unlocked, find_device, one_line
from gpt2_train import memory
from gpt2_train.config import CannotResume, TrainConfig, check_out, existing
from gpt2_train.console import duration, short
from gpt2_train.distributed import gradient_bytes_sent
from gpt2_train.memory import in_gb
from gpt2_train.metrics import assumed_speed
from gpt2_train.start import check_start, hours_at, validation_tokens, warnings_of


def make_plan(config: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Return a run's plan, as --json prints it, after the same checks that a start makes. Writes nothing.

    `problems` and `warnings` are lists of lines; a figure unknown after a failed check is None. Sizes are bytes.
    """
    problems: list[Exception] = []

    def check(work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            problems.append(error)
            return None

    here = check(find_device, config.device)
    device = here or torch.device(config.device if config.device in ("cuda", "mps") else "cpu")
    check(check_out, config.out)
    check(check_unlocked, Path(config.out))
    start = check_start(config, world_size, device, here is not None, check)
    config, state = start.config, start.state
    work = _work(config, start.dataset, world_size, *assumed_speed(config, device, here is not None))
    micro_batch, accumulation = start.split or (None, None)
    return work | {
        "device": device.type,
        "compiled": config.compiles(device.type),
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "memory": start.memory and asdict(start.memory),
        "free_device_bytes": start.free[0],
        "free_host_bytes": start.free[1],
        "resumes_from": str(start.checkpoint) if start.checkpoint else None,
        "resumes_at_step": state.get("step"),
        "warnings": warnings_of(start, world_size, work["hours"]) if start.dataset else [],
        "problems": [one_line(problem) for problem in problems],
        # That of a run, which ends at the first of them.
        "exit_status": (2 if isinstance(problems[0], CannotResume) else 1) if problems else 0,
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
        "hours": hours_at(speed, config, world_size) if speed else None,
        "validations": validations,
        "validation_tokens": to_validate,
        "validation_hours": token_hours and to_validate and validations * to_validate * token_hours / 3,
        "gradient_bytes_sent": gradient_bytes_sent(shape.num_parameters, world_size, config.grad_compression),
        "checkpoint_bytes": memory.checkpoint_bytes(config),
        "checkpoints_at_once": memory.checkpoints_at_once(config),
        "free_disk_bytes": shutil.disk_usage(existing(Path(config.out))).free,
    }


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
        facts["time"] = f"{duration(plan['hours'])} at {short(speed)} tokens/s: {plan['speed_source']}"
    if plan["validations"] and plan["validation_tokens"]:
        more = "" if plan["validation_hours"] is None else f", {duration(plan['validation_hours'])} more"
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
