"""The plan of a run before it starts, and what would stop it: `gpt2-train --dry-run`."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from gpt2_data import open_dataset
from gpt2_eval import load_hellaswag
from gpt2_model import GPT, flops_per_token
from gpt2_model.command import find_device, one_line
from gpt2_train import checkpoint, memory
from gpt2_train.config import TrainConfig, check_out, existing, micro_batches
from gpt2_train.console import short
from gpt2_train.distributed import gradient_bytes_sent, has_bf16
from gpt2_train.memory import Memory, available_memory, in_gb, most_that_fit, peak_memory
from gpt2_train.metrics import assumed_speed
from gpt2_train.setup import check_shape, compiled, make_loader, starting_point, validation_tokens, warnings_of
from gpt2_train.trackers import check_trackers

FORMULA = "6 N + 6 L C T a token (llm.c)"
ASSUMED_GPU_BYTES = 80_000_000_000  # for a plan made where there is no GPU
LONG_HOURS = 72.0


def make_plan(config: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Work out a run's plan, as --json prints it, by the very checks that a start makes. Writes nothing.

    `problems` and `warnings` hold a line each; a figure that a failed check leaves open is None. Sizes are bytes.
    It takes a second where the speed must be measured.
    """
    problems: list[str] = []

    def check(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ValueError, OSError) as error:
            problems.append(one_line(error))
            return None

    out = Path(config.out)
    here = check(lambda: find_device(config.device))
    device = here or torch.device(config.device if config.device in ("cuda", "mps") else "cpu")
    if config.precision == "auto":
        config = replace(config, precision="bf16" if here is None or has_bf16(here) else "fp32")
    dataset = check(lambda: open_dataset(config.data))
    start = check(lambda: starting_point(config, dataset)) if dataset else None
    source = start or config.init
    shape = (check(lambda: GPT.inspect(source)) if source else None) or config.model_config
    free_host, free_device = available_memory(), None
    if device.type == "cuda":
        free_device = torch.cuda.mem_get_info(here)[0] if here else ASSUMED_GPU_BYTES
    case = (world_size, device.type, compiled(config, device), config.precision)
    # 5 % of a GPU's memory is lost between the allocator's blocks.
    free = free_host if free_device is None else 0.95 * free_device
    split = check(lambda: micro_batches(config, world_size, most_that_fit(config, shape, *case, free)))
    micro_batch, accumulation = split or (None, None)
    if dataset is not None:
        check(lambda: check_shape(config, shape, dataset, start))
        check(lambda: make_loader(config, micro_batch or 1, 0, world_size))
    check(lambda: check_out(out))
    check(lambda: memory.check_space(out, config, shape))
    check(lambda: check_trackers(config))
    if config.hellaswag:
        check(lambda: load_hellaswag(config.hellaswag))
    peak = again = None
    if micro_batch is not None:
        plain, again = (
            peak_memory(replace(config, activation_checkpointing=chosen), shape, micro_batch, *case)
            for chosen in (False, True)
        )
        peak = again if config.activation_checkpointing else plain
        check(lambda: _check_memory(peak, free_device, free_host))
    flops, tokens = flops_per_token(shape, config.seq_len), config.steps * config.batch_tokens
    speed, speed_source = assumed_speed(config, shape, device, here is not None)
    token_hours = flops / (speed * world_size) / 3600 if speed else None
    hours = tokens * token_hours if token_hours else None
    train_tokens = dataset.tokens("train") if dataset else None
    # One before the first step, one after the last; a forward pass is a third of a step.
    validations = 1 + -(-config.steps // config.eval_every) if config.eval_every else 0
    to_validate = validation_tokens(config, dataset) if dataset else None
    plan = {
        "parameters": shape.num_parameters,
        "steps": config.steps,
        "batch_tokens": config.batch_tokens,
        "tokens": tokens,
        "train_tokens": train_tokens,
        "val_tokens": dataset.tokens("val") if dataset else None,
        "epochs": tokens / train_tokens if train_tokens else None,
        "flops_per_token": flops,
        "flops": float(flops * tokens),
        "hours": hours,
        "validations": validations,
        "validation_tokens": to_validate,
        "validation_hours": token_hours and to_validate and validations * to_validate * token_hours / 3,
        "processes": world_size,
        "device": device.type,
        "precision": config.precision,
        "compiled": compiled(config, device),
        "seq_len": config.seq_len,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "gradient_bytes_sent": gradient_bytes_sent(shape.num_parameters, world_size, config.grad_compression),
        "memory": peak and asdict(peak),
        "activation_bytes": peak and plain.activations,
        "activation_bytes_checkpointed": again and again.activations,
        "free_device_bytes": free_device,
        "free_host_bytes": free_host,
        "flops_formula": FORMULA,
        "flops_per_second": speed,
        "speed_source": speed_source,
        "checkpoint_bytes": memory.checkpoint_bytes(config, shape),
        "checkpoints_at_once": memory.checkpoints_at_once(config),
        "free_disk_bytes": shutil.disk_usage(existing(out)).free,
        "out": config.out,
        "resumes_from": str(start) if start else None,
        "resumes_at_step": checkpoint.read_trainer_state(start)["step"] if start else None,
    }
    warnings = warnings_of(config, dataset) if dataset else []
    if hours and hours > LONG_HOURS:
        warnings.append(f"the run takes about {_duration(hours)} here: lower --steps or --batch-tokens")
    return {**plan, "warnings": warnings, "problems": problems}


def _check_memory(peak: Memory, free_device: int | None, free_host: int) -> None:
    for needed, free, whose in (
        (peak.device_bytes, free_device, "a process needs about {} of the GPU's memory"),
        (peak.needed_on_host(), free_host, "the run needs about {} of this machine's memory"),
    ):
        if free is not None and needed > free:
            advice = "use --activation-checkpointing, a smaller --micro-batch or --seq-len, or a smaller model"
            raise ValueError(f"{whose.format(in_gb(needed))}, and {in_gb(free)} are free: {advice}")


def to_lines(plan: dict[str, Any]) -> list[str]:
    """Return the plan to read, a fact a line of at most 100 columns; what a failed check left open is missing."""
    facts = {
        "parameters": f"{plan['parameters']:,}",
        "steps": f"{plan['steps']:,} of {plan['batch_tokens']:,} tokens, {short(plan['tokens'])} in all",
    }
    if plan["epochs"] is not None:
        facts["data"] = f"{short(plan['train_tokens'])} training tokens: {plan['epochs']:,.2f} epochs"
    facts["processes"] = f"{plan['processes']} on {plan['device']}, {plan['precision']}"
    facts["processes"] += ", compiled" if plan["compiled"] else ""
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
    if plan["resumes_at_step"] is not None:
        is_done = plan["resumes_at_step"] == plan["steps"]
        state = "is done already" if is_done else f"resumes at step {plan['resumes_at_step']:,}"
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
    if not peak["on_host"]:
        free = in_gb(plan["free_device_bytes"] or 0)
        facts["device memory"] = f"{in_gb(peak['device_bytes'])} of {free}: {', '.join(parts[:-2])}"
        parts = parts[-2:]
    free = in_gb(plan["free_host_bytes"])
    facts["host memory"] = f"{in_gb(peak['host_bytes'])} of {free} free, on rank 0: {', '.join(parts)}"
    plain, again = in_gb(plan["activation_bytes"]), in_gb(plan["activation_bytes_checkpointed"])
    facts["activations"] = f"{plain}; with --activation-checkpointing {again}"
    return facts


def _duration(hours: float) -> str:
    """Hours as "3.2 days", "1.5 hours" or "12 minutes"."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{ceil(60 * hours)} minutes"
