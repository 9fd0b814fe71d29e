"""A run's settings: TrainConfig, the recipes to start from, and the TOML to read and write. No torch here."""

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpt2_model import GPTConfig

RECIPES = ("124M", "350M", "774M", "1558M", "GPT-3-125M")
# Fields that may change when a run is resumed: they change neither the samples nor, but for rounding, the maths.
# `steps` may change as well: it moves the end of the learning-rate schedule, and the run says so.
FREE_TO_CHANGE = {
    *("data", "out", "resume", "micro_batch", "keep", "checkpoint_every", "on_save_error"),
    *("compile", "device", "activation_checkpointing", "shard_optimizer", "deterministic"),
    *("eval_every", "eval_tokens", "hellaswag", "sample_prompt", "num_samples"),
    *("max_skips", "hang_seconds", "tensorboard", "wandb", "profile", "peak_tflops"),
}

# Completed as paths; whether they are good is checked later, in one place for flags and config files.
PATHS = {"data", "out", "init", "hellaswag", "resume"}
LARGEST = 2**53  # whole numbers below it are exact in JSON and in every float
KINDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false", dict: "a table"}
AT_LEAST_1 = {"steps", "batch_tokens", "seq_len", "keep", "eval_tokens", "max_skips"}
CHOICES = {
    "precision": ("auto", "fp32", "bf16"),
    "compile": ("auto", "on", "off"),
    "grad_compression": ("none", "bf16"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "wsd"),
    "order": ("shuffled", "sequential", "build-nanogpt"),
    "on_save_error": ("abort", "continue"),
}

# Groups of options in --help, and the fields that few need, which only --help-all shows.
DATA, MODEL, BATCH, OPTIM = "Data and run folder", "Model", "Length and batch", "Optimisation"
EVALUATION, CHECKPOINTS, HARDWARE, FAULTS, LOGGING = "Evaluation", "Checkpoints", "Hardware", "Faults", "Logging"
GROUPS = (DATA, MODEL, BATCH, OPTIM, EVALUATION, CHECKPOINTS, HARDWARE, FAULTS, LOGGING)
RARE = {
    *("order", "decay_steps", "weight_decay", "beta1", "beta2", "eps", "grad_clip"),
    *("grad_compression", "deterministic", "sample_prompt", "num_samples", "on_save_error", "max_skips"),
    *("spike_sigma", "hang_seconds", "peak_tflops"),
}


class CannotResume(ValueError):
    """The run in the folder cannot be resumed as asked, and must not be overwritten."""


def _option(default: Any, group: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Each field is a key of config.toml, in this order, and (with dashes) a flag.

    `model` holds GPTConfig fields that differ from the 124M defaults, as values or text. A step is one update of
    the weights.

    Raises:
        ValueError: values that are out of range or do not go together; the message says what is allowed.
    """

    data: str = _option("", DATA, "Dataset folder, as gpt2-data build writes it.")
    out: str = _option("", DATA, "Run folder; if it holds a run already, that run is resumed.")
    steps: int = _option(19073, BATCH, "Number of updates of the weights.")
    batch_tokens: int = _option(524288, BATCH, "Tokens of one update, over all processes and micro-batches.")
    micro_batch: str = _option("auto", BATCH, "Sequences a process computes at once; auto: the most that fit.")
    seq_len: int = _option(1024, BATCH, "Tokens of a training sequence.")
    order: str = _option("shuffled", DATA, "Order of the training sequences.")
    optimizer: str = _option("adamw", OPTIM, "muon uses Muon for the blocks' matrices and AdamW for the rest.")
    lr: float = _option(6e-4, OPTIM, "Peak learning rate.")
    min_lr: float = _option(math.nan, OPTIM, "Learning rate at the end.")
    warmup: int = _option(-1, OPTIM, "Steps of linear warmup.")
    schedule: str = _option("cosine", OPTIM, "Decay from --lr to --min-lr; wsd means warmup, stable, decay.")
    decay_steps: int = _option(0, OPTIM, "Number of last steps in which wsd decays; 0 means a fifth of all.")
    weight_decay: float = _option(0.1, OPTIM, "Weight decay of matrices; biases and norms have none.")
    beta1: float = _option(0.9, OPTIM, "Decay of AdamW's mean of gradients.")
    beta2: float = _option(0.95, OPTIM, "Decay of AdamW's mean of squared gradients.")
    eps: float = _option(1e-8, OPTIM, "Epsilon of AdamW.")
    grad_clip: float = _option(1.0, OPTIM, "Largest norm of the gradient; 0 turns clipping off.")
    seed: int = _option(0, OPTIM, "Seed of the initial weights, of the data's order and of the samples.")
    init: str = _option("", MODEL, "Hub name, model folder or run folder whose weights the run starts from.")
    precision: str = _option("auto", HARDWARE, "Number format; auto is bf16 where the processor has it.")
    compile: str = _option("auto", HARDWARE, "Use torch.compile; auto compiles on CUDA only.")
    device: str = _option("auto", HARDWARE, "Device: cuda, mps, cpu or auto.")
    activation_checkpointing: bool = _option(False, HARDWARE, "Save memory by computing activations twice.")
    shard_optimizer: bool = _option(False, HARDWARE, "Spread the optimizer's state over the processes (ZeRO 1).")
    grad_compression: str = _option("none", HARDWARE, "Precision of the gradients sent between processes.")
    deterministic: bool = _option(False, HARDWARE, "Use only CUDA kernels that give the same bits each time.")
    eval_every: int = _option(250, EVALUATION, "Steps between validations, which also write samples; 0 for never.")
    eval_tokens: int = _option(10_485_760, EVALUATION, "Number of validation tokens, the same ones every time.")
    hellaswag: str = _option("", EVALUATION, "HellaSwag-format JSONL file to score at every validation.")
    sample_prompt: str = _option("Hello, I'm a language model,", EVALUATION, "Prompt that the samples continue.")
    num_samples: int = _option(4, EVALUATION, "Samples at every validation.")
    checkpoint_every: int = _option(1000, CHECKPOINTS, "Steps between checkpoints; the last step always has one.")
    keep: int = _option(3, CHECKPOINTS, "Number of newest checkpoints to keep.")
    resume: str = _option("auto", CHECKPOINTS, "A checkpoint, never, or auto: the newest good one in --out.")
    on_save_error: str = _option("abort", CHECKPOINTS, "What to do if a checkpoint cannot be written.")
    max_skips: int = _option(10, FAULTS, "End the run after this many skipped updates in a row.")
    spike_sigma: float = _option(0.0, FAULTS, "Skip updates this many deviations above the last 20-128; 0: never.")
    hang_seconds: float = _option(300.0, FAULTS, "End the run if a step takes this many seconds; 0: never.")
    tensorboard: bool = _option(False, LOGGING, "Also write TensorBoard's files into --out.")
    wandb: str = _option("", LOGGING, "Weights & Biases project to report to.")
    profile: int = _option(0, LOGGING, "Number of steps to profile, after the first ten; 0 for none.")
    peak_tflops: float = _option(0.0, LOGGING, "Device's peak in TFLOP/s, for MFU; 0: from a table of known GPUs.")
    model: Mapping[str, Any] = field(
        default_factory=dict, metadata={"group": MODEL, "help": "Change a field of the model's shape; repeatable."}
    )

    def __post_init__(self) -> None:
        if math.isnan(self.min_lr):  # runs of version 0.1 that did not set it have 6e-5: keep them resumable
            object.__setattr__(self, "min_lr", 6e-5 if self.lr >= 6e-5 else self.lr / 10)
        if self.warmup == -1:
            object.__setattr__(self, "warmup", default_warmup(self.steps))
        for item in fields(self):
            value, least = getattr(self, item.name), int(item.name in AT_LEAST_1)
            if item.name in PATHS:
                object.__setattr__(self, item.name, os.path.expanduser(value))
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                # Such a name's bytes are no UTF-8, and neither TOML nor JSON could hold it.
                raise ValueError(f"{item.name} {value!r} is not UTF-8: rename it")
            most = LARGEST if type(value) is int else math.inf
            if isinstance(value, int | float) and not least <= value < most:
                limit = f" and below {most}" * (value >= most)
                raise ValueError(f"{item.name} must be a finite number of at least {least}{limit}, not {value}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}: add --min-lr {self.lr / 10:g}")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 and beta2 must be from 0 to below 1, not {self.beta1} and {self.beta2}")
        if self.micro_batch != "auto" and not (self.micro_batch.isdecimal() and int(self.micro_batch) > 0):
            raise ValueError(f"micro_batch must be auto or a positive whole number, not {self.micro_batch!r}")
        self._check_context()

    def _check_context(self) -> None:
        context = self.model_config.block_size
        # With --init the weights bring their own context, which set_up and --dry-run check.
        if not self.init and self.seq_len > context:
            advice = f"add --model block_size={self.seq_len}"
            raise ValueError(f"seq_len {self.seq_len} is longer than the model's context of {context}: {advice}")

    @property
    def model_config(self) -> GPTConfig:
        """The model's shape. Raises ValueError for an unknown field or a value that is not of its type."""
        return GPTConfig().with_fields({name: str(value) for name, value in self.model.items()})

    def compiles(self, device_type: str) -> bool:
        """Return whether a step on such a device ("cuda", "cpu", ...) is compiled."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")


def load_config(path: str | Path | None = None, recipe: str | None = None) -> dict[str, Any]:
    """Return the keys that a recipe sets and a TOML file adds or overrides; TrainConfig(**keys) is the run.

    Raises OSError for a missing file, ValueError for invalid TOML, unknown keys and values of the wrong type.
    """
    merged: dict[str, Any] = {}
    path = path and Path(os.path.expanduser(path))
    for source in (recipe and files(__package__).joinpath(f"recipes/{recipe}.toml"), path):
        if not source:
            continue
        try:
            own = tomllib.loads(source.read_text(encoding="utf-8-sig"))  # Windows' editors write a BOM
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{source}, line {line}, is not UTF-8 text: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not valid TOML: {error}") from None
        except OSError as error:
            advice = "name a TOML file, such as a run's config.toml"
            raise OSError(f"--config {source} cannot be read ({error.strerror}): {advice}") from None
        if isinstance(own.get("model"), dict):
            own["model"] = merged.get("model", {}) | own["model"]
        merged |= own
    defaults = asdict(TrainConfig())
    for name, value in merged.items():
        if name not in defaults:
            raise ValueError(f"{path or recipe}: unknown key {name!r}: choose from {', '.join(defaults)}")
        kind = type(defaults[name])
        if type(value) is int and value >= LARGEST:
            raise ValueError(f"{path or recipe}: {name} must be below {LARGEST}, not {value}")
        if type(value) is int and (kind is float or name == "micro_batch"):
            merged[name] = kind(value)
        elif type(value) is not kind:
            raise ValueError(f"{path or recipe}: {name} must be {KINDS[kind]}, not {value!r}")
    return merged


def to_toml(config: TrainConfig) -> str:
    """Return the config as TOML for `--config`. It has every key, so that later defaults do not change the run."""
    settings, shape = asdict(config), asdict(config.model_config)
    del settings["model"]
    return "\n".join([*_toml(settings), "", "[model]", *_toml(shape), ""])


def _toml(values: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table. JSON's numbers, booleans and strings are valid TOML, except for DEL."""
    known = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items() if value is not None}
    return [f"{name} = {text}".replace("\x7f", "\\u007f") for name, text in known.items()]


def changed_fields(before: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return the changes to a resumed run that alter its maths, and the others: "lr: 0.0006 -> 0.001"."""
    after = asdict(replace(config, model=asdict(config.model_config)))
    defaults = asdict(TrainConfig())
    maths, harmless = list[str](), list[str]()
    for name in sorted(after.keys() - {"data", "out", "resume", "steps"}):
        old, new = before.get(name, defaults[name]), after[name]  # a run of an older version had fewer fields
        # With --init the weights bring their shape, unless another one is asked for.
        if old == new or (name == "model" and config.init and not config.model):
            continue
        change = f"{name}: {old} -> {new}"
        if name == "model":
            change = ", ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key])
        (harmless if name in FREE_TO_CHANGE else maths).append(change)
    return maths, harmless


def default_warmup(steps: int) -> int:
    """Return the steps of warmup of a run that does not set it: 715 of 19,073, as in GPT-3 and build-nanogpt."""
    return max(1, round(steps * 715 / 19073))


def sequences(config: TrainConfig, world_size: int) -> int:
    """Return the number of sequences per process in a batch. Raises ValueError if the batch does not divide."""
    rows, rest = divmod(config.batch_tokens, config.seq_len * world_size)
    if rest:
        parts = f"sequences of {config.seq_len:,} on {world_size} process{'es' * (world_size > 1)}"
        advice = f"use --batch-tokens {whole_batch(config, world_size)}"
        raise ValueError(f"a batch of {config.batch_tokens:,} tokens does not divide into {parts}: {advice}")
    return rows


def whole_batch(config: TrainConfig, world_size: int) -> int:
    """Return the batch nearest to `batch_tokens` that divides into sequences and micro-batches."""
    unit = batch_unit(config, world_size)
    return max(1, round(config.batch_tokens / unit)) * unit


def batch_unit(config: TrainConfig, world_size: int) -> int:
    """Return the tokens of which a batch must be a multiple: a micro-batch, or a sequence, on each process."""
    return config.seq_len * world_size * (1 if config.micro_batch == "auto" else int(config.micro_batch))


def divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number up to `most`, the largest first."""
    return [n for n in range(min(number, most), 0, -1) if number % n == 0]


def micro_batches(config: TrainConfig, world_size: int, largest: int) -> tuple[int, int]:
    """Return how many sequences a process computes at once, and how many times it does so before an update.

    "auto" is the largest divisor of its sequences up to `largest`. Raises ValueError if they do not divide evenly.
    """
    rows = sequences(config, world_size)
    wanted = max(1, largest) if config.micro_batch == "auto" else int(config.micro_batch)
    micro = divisors(rows, wanted)[0]
    if config.micro_batch != "auto" and micro != wanted:
        parts, advice = f"micro-batches of {wanted}", f"use --micro-batch {micro}"
        raise ValueError(f"the {rows} sequences of each process do not divide into {parts}: {advice}")
    return micro, rows // micro


def check_out(out: str) -> None:
    """Raise OSError if the run's folder does not exist and cannot be made, or cannot be written to."""
    for path in (existing(Path(out)), Path(out), Path(out, "checkpoints")):
        if os.path.lexists(path) and not path.is_dir():
            raise OSError(f"--out {out}: {path} is not a folder: choose another --out")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise OSError(f"--out {out}: {path} cannot be written to: choose another --out")
    for path in (Path(out, name) for name in ("metrics.jsonl", "samples.jsonl", "config.toml", ".lock")):
        if path.is_dir():
            raise OSError(f"--out {out}: {path} is a folder, where the run keeps a file: move it away")


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
