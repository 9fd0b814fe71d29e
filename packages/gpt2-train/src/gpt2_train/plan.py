"""What a run will amount to, before it is begun, and what would stop it: `gpt2-train --dry-run`."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpt2_data import TokenLoader, open_dataset
from gpt2_eval import load_hellaswag
from gpt2_model import GPT, PRESETS, GPTConfig, flops_per_token
from gpt2_model.command import OPENAI_NAMES
from gpt2_train import distributed
from gpt2_train.config import RECIPES, TrainConfig, load_config, micro_batches
from gpt2_train.memory import Memory, available_memory, most_that_fit, peak_memory
from gpt2_train.setup import compiled, validation_tokens
from gpt2_train.space import check_out, check_space, checkpoint_bytes, checkpoints_at_once, existing, in_gb
from gpt2_train.speed import assumed_speed

T = TypeVar("T")

FORMULA = "6 N + 6 L C T a token (llm.c)"
ASSUMED_GPU_BYTES = 80e9  # for a plan made where there is no GPU


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. Bytes, hours, operations a second; None where a failed check leaves it open."""

    parameters: int
    steps: int
    batch_tokens: int
    tokens: int
    train_tokens: int | None
    val_tokens: int | None
    epochs: float | None
    processes: int
    device: str
    precision: str
    compiled: bool
    seq_len: int
    micro_batch: int | None
    accumulation: int | None
    gradient_bytes_sent: int
    """By each process in a step."""
    memory: Memory | None
    """Of rank 0, at its peak."""
    activation_bytes: int | None
    activation_bytes_checkpointed: int | None
    free_device_bytes: int | None
    free_host_bytes: int
    flops_per_token: int
    flops: float
    flops_formula: str
    flops_per_second: float | None
    """Of each process."""
    speed_source: str
    hours: float | None
    """Of the steps alone."""
    validations: int
    validation_tokens: int | None
    """Of each."""
    validation_hours: float | None
    checkpoint_bytes: int
    checkpoints_at_once: int
    free_disk_bytes: int
    out: str
    problems: tuple[str, ...]
    """What would stop the run, a line each."""


@dataclass(frozen=True)
class _Place:
    """Where the run would compute, and how."""

    device: str
    here: bool
    precision: str
    compiled: bool
    free_device: int | None
    free_host: int

    def memory(self, config: TrainConfig, shape: GPTConfig, micro_batch: int, world_size: int) -> Memory:
        return peak_memory(
            config, shape, micro_batch, world_size, self.device, self.compiled, self.precision
        )  # fmt: skip


class _Checks:
    """Runs checks, and keeps what they find in `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except (ValueError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))
            return None


def make_plan(config: TrainConfig, world_size: int = 1) -> Plan:
    """Work a run's plan out and check what can be checked without starting it. Writes nothing.

    Takes a second where the speed has to be measured.
    """
    check, out = _Checks(), Path(config.out)
    place = _place(config, check)
    shape = check(lambda: _shape(config)) or config.model_config
    split = check(lambda: _split(config, shape, world_size, place))
    micro_batch, accumulation = split or (None, None)
    data = check(lambda: _data(config, shape, micro_batch or 1, world_size))
    train_tokens, val_tokens, to_validate = data or (None, None, None)
    check(lambda: check_out(out))
    check(lambda: check_space(out, config, shape))
    if config.hellaswag:
        check(lambda: load_hellaswag(config.hellaswag))
    plain = checkpointed = None
    if micro_batch is not None:
        plain, checkpointed = (
            place.memory(replace(config, activation_checkpointing=chosen), shape, micro_batch, world_size)
            for chosen in (False, True)
        )
    memory = checkpointed if config.activation_checkpointing else plain
    if memory is not None:
        check(lambda: _check_memory(memory, place))
    tokens, flops = config.steps * config.batch_tokens, flops_per_token(shape, config.seq_len)
    every = config.eval_every
    validations = 1 + -(-config.steps // every) if every else 0  # one before the first step
    speed, source = assumed_speed(config, shape, place.device, place.precision, place.here)
    return Plan(
        parameters=shape.num_parameters,
        steps=config.steps,
        batch_tokens=config.batch_tokens,
        tokens=tokens,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        epochs=tokens / train_tokens if train_tokens else None,
        processes=world_size,
        device=place.device,
        precision=place.precision,
        compiled=place.compiled,
        seq_len=config.seq_len,
        micro_batch=micro_batch,
        accumulation=accumulation,
        gradient_bytes_sent=distributed.gradient_bytes_sent(
            shape.num_parameters, world_size, config.grad_compression
        ),
        memory=memory,
        activation_bytes=plain.activations if plain else None,
        activation_bytes_checkpointed=checkpointed.activations if checkpointed else None,
        free_device_bytes=place.free_device,
        free_host_bytes=place.free_host,
        flops_per_token=flops,
        flops=float(flops * tokens),
        flops_formula=FORMULA,
        flops_per_second=speed,
        speed_source=source,
        hours=flops * tokens / (speed * world_size) / 3600 if speed else None,
        validations=validations,
        validation_tokens=to_validate,
        # The forward pass is a third of a step's operations.
        validation_hours=None
        if to_validate is None or not speed
        else flops / 3 * validations * to_validate / (speed * world_size) / 3600,
        checkpoint_bytes=checkpoint_bytes(config, shape),
        checkpoints_at_once=checkpoints_at_once(config),
        free_disk_bytes=shutil.disk_usage(existing(out)).free,
        out=config.out,
        problems=tuple(check.problems),
    )


def _place(config: TrainConfig, check: _Checks) -> _Place:
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = found if config.device == "auto" else config.device
    here = device in ("cpu", found)
    if not here:
        check.problems.append(f"device {device!r} is not to be had here: use --device cpu, or auto")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if not here or distributed.has_bf16(torch.device(device)) else "fp32"
    free_device = None
    if device == "cuda":
        free_device = torch.cuda.mem_get_info()[0] if here else int(ASSUMED_GPU_BYTES)
    is_compiled = compiled(config, torch.device(device))
    return _Place(device, here, precision, is_compiled, free_device, available_memory())


def _split(config: TrainConfig, shape: GPTConfig, world_size: int, place: _Place) -> tuple[int, int]:
    # 5 % of a GPU's memory is lost between the allocator's blocks.
    free = place.free_host if place.free_device is None else 0.95 * place.free_device
    most = most_that_fit(config, shape, world_size, place.device, place.compiled, place.precision, free)
    return micro_batches(config, world_size, most)


def _check_memory(memory: Memory, place: _Place) -> None:
    advice = "use --activation-checkpointing, a smaller --micro-batch or --seq-len, or a smaller model"
    if place.free_device is not None and memory.device_bytes > place.free_device:
        raise ValueError(
            f"a process needs about {in_gb(memory.device_bytes)} of the GPU's memory, and "
            f"{in_gb(place.free_device)} are free: {advice}"
        )
    if memory.needed_on_host() > place.free_host:
        raise ValueError(
            f"the run needs about {in_gb(memory.needed_on_host())} of this machine's memory, and "
            f"{in_gb(place.free_host)} are free: {advice}"
        )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; of the memory also `device_bytes` and `host_bytes`."""
    document = asdict(plan)
    if plan.memory is not None:
        document["memory"] |= {"device_bytes": plan.memory.device_bytes, "host_bytes": plan.memory.host_bytes}
    return document


def to_lines(plan: Plan) -> list[str]:
    """The plan to read, a fact a line; what was not found out for a failed check is left out."""
    facts = {
        "parameters": f"{plan.parameters:,}",
        "steps": f"{plan.steps:,} of {plan.batch_tokens:,} tokens, {plan.tokens:,} in all",
    }
    if plan.epochs is not None:
        facts["data"] = f"{plan.train_tokens:,} training tokens: {plan.epochs:.2f} epochs"
    compiled = ", compiled" if plan.compiled else ""
    facts["processes"] = f"{plan.processes} on {plan.device}, {plan.precision}{compiled}"
    if plan.micro_batch is not None:
        facts["a step"] = (
            f"{plan.accumulation} x {plan.micro_batch} x {plan.seq_len:,} tokens on each process "
            f"(accumulation x micro-batch x sequence)"
        )
    if plan.processes > 1:
        facts["exchange"] = (
            f"{in_gb(plan.gradient_bytes_sent)} of gradients that each process sends a step, in a ring"
        )
    facts |= _memory_facts(plan)
    facts["operations"] = f"{plan.flops_per_token:,} a token, {plan.flops:.3g} in all: {plan.flops_formula}"
    facts["time"] = plan.speed_source
    if plan.hours is not None and plan.flops_per_second is not None:
        speed = plan.processes * plan.flops_per_second / plan.flops_per_token
        facts["time"] = f"{plan.hours:,.1f} hours at {speed:,.0f} tokens/s: {plan.speed_source}"
    if plan.validations and plan.validation_tokens:
        hours = "" if plan.validation_hours is None else f", {plan.validation_hours:,.1f} hours more"
        facts["validation"] = f"{plan.validations} times {plan.validation_tokens:,} tokens{hours}"
    facts["checkpoints"] = (
        f"{in_gb(plan.checkpoint_bytes)} each, {plan.checkpoints_at_once} at once: "
        f"{in_gb(plan.checkpoint_bytes * plan.checkpoints_at_once)} of {in_gb(plan.free_disk_bytes)} free"
    )
    facts["run folder"] = plan.out
    return [f"{name:14}{value}" for name, value in facts.items()]


def _memory_facts(plan: Plan) -> dict[str, str]:
    memory = plan.memory
    if memory is None or plan.activation_bytes is None or plan.activation_bytes_checkpointed is None:
        return {}
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits and loss": memory.head,
    }
    split = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items())
    facts = {}
    if not memory.on_host:
        facts["device memory"] = f"{in_gb(memory.device_bytes)} of {in_gb(plan.free_device_bytes or 0)}: {split}"
        split = f"torch {in_gb(memory.program)}"
    else:
        split += f", torch {in_gb(memory.program)}"
    facts["host memory"] = (
        f"{in_gb(memory.host_bytes)} of {in_gb(plan.free_host_bytes)} free, on rank 0: {split}, "
        f"copy for checkpoints {in_gb(memory.checkpoint_copy)}"
    )
    facts["activations"] = (
        f"{in_gb(plan.activation_bytes)}; "
        f"with --activation-checkpointing {in_gb(plan.activation_bytes_checkpointed)}"
    )
    return facts


def _shape(config: TrainConfig) -> GPTConfig:
    """The shape of the model, from --init's files where it is here; hub models are fetched when the run starts."""
    init = config.init
    if not init:
        return config.model_config
    published = {name: PRESETS[size] for size, name in OPENAI_NAMES.items()}
    if init in published:
        shape = published[init]
    elif Path(init).exists() or init in PRESETS or init.startswith((".", "/", "~")):
        shape = GPT.inspect(init)
    else:
        return config.model_config
    if config.model and shape != config.model_config:
        raise ValueError(f"--init {init} has another shape than --model, --recipe or --config asks for")
    return shape


def _data(config: TrainConfig, shape: GPTConfig, micro_batch: int, world_size: int) -> tuple[int, int, int]:
    """Tokens to train on, of the validation split, and of each validation."""
    dataset = open_dataset(config.data)
    largest = max(shard.max_token for shard in dataset.manifest.shards)
    if largest >= shape.vocab_size:
        raise ValueError(
            f"{config.data} holds token id {largest:,}, and the model's vocabulary ends at "
            f"{shape.vocab_size - 1:,}"
        )
    order: Any = config.order
    TokenLoader(config.data, "train", micro_batch, config.seq_len, world_size=world_size, order=order)
    return dataset.tokens("train"), dataset.tokens("val"), validation_tokens(config, dataset)


def recipe_table() -> list[str]:
    """Peak memory of each recipe on one process, as the README has it: lines of Markdown."""
    lines = [
        "| recipe | parameters | 80 GB GPU, bf16, compiled | the same, activation checkpointing | CPU, fp32 |",
        "|---|---|---|---|---|",
    ]
    for name in RECIPES:
        config = TrainConfig(**load_config(recipe=name))
        cells = [name, f"{config.model_config.num_parameters / 1e6:,.0f}M"]
        for kind, precision, checkpointing in (
            ("cuda", "bf16", False), ("cuda", "bf16", True), ("cpu", "fp32", False)
        ):  # fmt: skip
            settings = replace(config, activation_checkpointing=checkpointing)
            case = (1, kind, kind == "cuda", precision)
            free = 0.95 * ASSUMED_GPU_BYTES if kind == "cuda" else float("inf")
            micro_batch = most_that_fit(settings, config.model_config, *case, free)
            memory = peak_memory(settings, config.model_config, micro_batch, *case)
            size = memory.device_bytes if kind == "cuda" else memory.host_bytes
            cells.append(f"{micro_batch} x {config.seq_len:,}: {size / 1e9:.1f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
