"""What a run is: TrainConfig, the recipes it can start from, and the TOML it is written as. No torch here."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpt2_model.config import GPTConfig

RECIPES = ("124M", "350M", "774M", "1558M", "GPT-3-125M")
# What may differ when a run is resumed: it changes neither the samples nor the maths of a step, but for rounding.
# `steps` may too, and is neither: it moves the end of the learning-rate schedule, and the run says so.
FREE_TO_CHANGE = {
    *("data", "out", "resume", "micro_batch", "keep", "checkpoint_every", "on_save_error"),
    *("compile", "device", "activation_checkpointing", "shard_optimizer", "deterministic"),
    *("eval_every", "eval_tokens", "hellaswag", "sample_prompt", "num_samples"),
    *("max_skips", "hang_seconds", "tensorboard", "wandb", "profile", "peak_tflops"),
}

CHOICES = {
    "precision": ("auto", "fp32", "bf16"),
    "compile": ("auto", "on", "off"),
    "grad_compression": ("none", "bf16"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd"),
    "order": ("shuffled", "sequential", "build-nanogpt"),
    "on_save_error": ("abort", "continue"),
}


class CannotResume(ValueError):
    """What is in the run's folder cannot be gone on with as asked, and must not be written over."""


def _option(default: Any, help: str, *, rare: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "rare": rare})


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. Each field is a key of the TOML file and, with dashes, a flag of the command.

    `model` holds GPTConfig fields that differ from the 124M defaults. A step is one update of the weights.
    """

    data: str = _option("", "Dataset folder, as gpt2-data build makes it.")
    out: str = _option("", "Run folder; a run that is in it already is resumed.")
    steps: int = _option(19073, "Updates of the weights in all.")
    batch_tokens: int = _option(524288, "Tokens an update sees, over all processes and micro-batches.")
    micro_batch: str = _option("auto", "Sequences a process computes at once; auto: the most that fit.")
    seq_len: int = _option(1024, "Tokens of a training sequence.")
    order: str = _option("shuffled", "Order of the training sequences.", rare=True)

    optimizer: str = _option("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest.")
    lr: float = _option(6e-4, "Peak learning rate.")
    min_lr: float = _option(6e-5, "Learning rate at the end.")
    warmup: int = _option(715, "Steps of linear warmup.")
    schedule: str = _option("cosine", "From the peak to --min-lr; wsd: warmup, stable, decay.")
    decay_steps: int = _option(0, "Last steps, in which wsd falls; 0 for a fifth of all.", rare=True)
    weight_decay: float = _option(0.1, "On matrices; biases and norms have none.", rare=True)
    beta1: float = _option(0.9, "AdamW's, of the mean of gradients.", rare=True)
    beta2: float = _option(0.95, "AdamW's, of the mean of their squares.", rare=True)
    eps: float = _option(1e-8, "AdamW's.", rare=True)
    grad_clip: float = _option(1.0, "Largest norm of the gradient; 0 for no clipping.", rare=True)
    seed: int = _option(0, "Of the initial weights, the order of the data and the samples.")
    init: str = _option("", "Start from these weights (hub name or model folder) instead of random ones.")

    precision: str = _option("auto", "auto: bf16 where the processor has it, else fp32.")
    compile: str = _option("auto", "torch.compile; auto: on CUDA.")
    device: str = _option("auto", "cuda, mps, cpu, or auto.")
    activation_checkpointing: bool = _option(False, "Compute activations twice instead of keeping them.")
    shard_optimizer: bool = _option(False, "Share the optimizer's state out over the processes (ZeRO stage 1).")
    grad_compression: str = _option("none", "bf16: gradients cross the processes in bf16.", rare=True)
    deterministic: bool = _option(False, "On CUDA: only kernels that give the same bits each time.", rare=True)

    eval_every: int = _option(250, "Steps between validations and samples; 0 for never.")
    eval_tokens: int = _option(10_485_760, "Validation tokens, the same ones every time.")
    hellaswag: str = _option("", "HellaSwag-format JSONL file to score at every validation.")
    sample_prompt: str = _option("Hello, I'm a language model,", "Prompt that the samples continue.", rare=True)
    num_samples: int = _option(4, "Samples at every validation.", rare=True)

    checkpoint_every: int = _option(1000, "Steps between checkpoints; the last step always has one.")
    keep: int = _option(3, "Checkpoints to keep, the newest.")
    resume: str = _option("auto", "auto (newest good checkpoint in --out), never, or a checkpoint folder.")
    on_save_error: str = _option("abort", "continue: go on training if a checkpoint cannot be written.", rare=True)

    max_skips: int = _option(
        10,
        "Updates in a row that are left out, for a loss or gradient that is not finite, before giving up.",
        rare=True,
    )
    spike_sigma: float = _option(
        0.0, "Leave out updates whose loss or gradient norm is this many deviations above the last 128; 0: none.",
        rare=True,
    )  # fmt: skip
    hang_seconds: float = _option(
        300.0,
        "A step that takes this long, and ten times the usual, ends the run with all stacks; 0: never.",
        rare=True,
    )

    tensorboard: bool = _option(False, "Write TensorBoard's files into --out, too.")
    wandb: str = _option("", "Weights & Biases project to report to.")
    profile: int = _option(0, "Steps to write a profiler's trace of, after the first ten; 0 for none.")
    peak_tflops: float = _option(0.0, "The device's peak, for MFU; 0: from a table of GPUs.", rare=True)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "seq_len", "keep", "eval_tokens", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        names = ("warmup", "eval_every", "checkpoint_every", "num_samples", "seed", "decay_steps", "profile")
        rates = ("lr", "min_lr", "weight_decay", "eps", "grad_clip", "spike_sigma", "hang_seconds", "peak_tflops")
        for name in (*names, *rates):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative or infinite, and is {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}: add --min-lr {self.lr / 10:g}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, and is {getattr(self, name)}")
        if self.micro_batch != "auto" and not (self.micro_batch.isdecimal() and int(self.micro_batch) > 0):
            raise ValueError(f"micro_batch must be auto or a positive whole number, not {self.micro_batch!r}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.seq_len > self.model_config.block_size:
            raise ValueError(
                f"seq_len {self.seq_len} is longer than the model's context of {self.model_config.block_size}: "
                f"add --model block_size={self.seq_len}"
            )

    @property
    def model_config(self) -> GPTConfig:
        """The model's shape. Raises ValueError for an unknown field or a value that is not of its type."""
        known = {field.name for field in fields(GPTConfig)}
        for name in self.model:
            if name not in known:
                raise ValueError(f"unknown model field {name!r}: choose from {', '.join(sorted(known))}")
        return GPTConfig(**self.model)


def load_config(path: str | Path | None = None, recipe: str | None = None) -> dict[str, Any]:
    """The keys that a recipe and, over it, a TOML file set; TrainConfig(**keys) is the run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such recipe, no valid TOML, an unknown key or a value of another type.
    """
    merged: dict[str, Any] = {}
    if recipe is not None:
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
        merged = tomllib.loads(files(__package__).joinpath(f"recipes/{recipe}.toml").read_text(encoding="utf-8"))
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            own = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError both are
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        merged = {**merged, **own, "model": {**merged.get("model", {}), **own.get("model", {})}}
    for name, value in merged.items():
        merged[name] = _checked(name, value, str(path or recipe))
    return merged


def _checked(name: str, value: Any, source: str) -> Any:
    defaults = asdict(TrainConfig())
    if name not in defaults:
        raise ValueError(f"{source}: unknown key {name!r}; known are {', '.join(defaults)}")
    wanted = type(defaults[name])
    if name == "micro_batch" and type(value) is int:
        return str(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{source}: {name} must be a {wanted.__name__}, not {value!r}")
    return value


def to_toml(config: TrainConfig) -> str:
    """The config as TOML, as `--config` reads it. Every key is written: tomorrow's defaults do not matter."""
    lines = [f"{name} = {_toml(value)}" for name, value in asdict(config).items() if name != "model"]
    model = {name: value for name, value in asdict(config.model_config).items() if value is not None}
    return "\n".join([*lines, "", "[model]", *(f"{name} = {_toml(value)}" for name, value in model.items()), ""])


def _toml(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in value)
        return f'"{escaped}"'
    return repr(value)


def changed_fields(before: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """Fields of a resumed run that would change its maths, and those that do not, as "lr: 0.0006 -> 0.001".

    `steps` is in neither: a run may go on for longer.
    """
    after = asdict(replace(config, model=asdict(config.model_config)))
    defaults = asdict(TrainConfig())
    maths: list[str] = []
    harmless: list[str] = []
    for name in sorted(after.keys() - {"data", "out", "resume", "steps"}):
        old = before.get(name, defaults[name])  # a field that the run's version did not have yet
        if old == after[name]:
            continue
        # Weights that a run began from bring their shape, unless one is asked for.
        if name == "model" and config.init and not config.model:
            continue
        if name == "model":
            shape = after["model"]
            change = ", ".join(
                f"{key}: {old.get(key)} -> {shape[key]}" for key in shape if old.get(key) != shape[key]
            )
        else:
            change = f"{name}: {old} -> {after[name]}"
        (harmless if name in FREE_TO_CHANGE else maths).append(change)
    return maths, harmless


def micro_batches(config: TrainConfig, world_size: int, largest: int) -> tuple[int, int]:
    """(sequences a process computes at once, how many times it does so before an update).

    Args:
        largest: sequences that fit at once, for `micro_batch = "auto"`, which takes the largest divisor up to it.

    Raises:
        ValueError: the batch cannot be shared out in whole sequences; says what would do.
    """
    if config.batch_tokens % (config.seq_len * world_size):
        unit = config.seq_len * world_size
        nearest = max(1, round(config.batch_tokens / unit)) * unit
        raise ValueError(
            f"a batch of {config.batch_tokens:,} tokens does not divide into sequences of {config.seq_len:,} "
            f"on {world_size} process{'es' if world_size > 1 else ''}: use --batch-tokens {nearest}"
        )
    rows = config.batch_tokens // (config.seq_len * world_size)
    if config.micro_batch == "auto":
        micro = max(n for n in range(1, min(rows, max(1, largest)) + 1) if rows % n == 0)
    else:
        micro = int(config.micro_batch)
        if rows % micro:
            fits = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                f"the {rows} sequences of each process do not divide into micro-batches of {micro}: "
                f"use --micro-batch {max((n for n in fits if n <= micro), default=1)}"
            )
    return micro, rows // micro
