"""A run and --dry-run share these checks: they find what a run begins with, and whatever would stop it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from operator import call
from pathlib import Path
from typing import Any

import torch

from gpt2_data import Dataset, TokenLoader, open_dataset
from gpt2_eval import HellaSwag, load_hellaswag
from gpt2_model import GPT, GPTConfig, Tokenizer, flops_per_token, load_tokenizer
from gpt2_model.command import check_compiler
from gpt2_train import checkpoint, memory
from gpt2_train.config import (
    CannotResume,
    TrainConfig,
    batch_unit,
    changed_fields,
    default_warmup,
    micro_batches,
    whole_batch,
)  # fmt: skip
from gpt2_train.console import duration
from gpt2_train.distributed import choose_precision
from gpt2_train.memory import Memory
from gpt2_train.metrics import assumed_speed
from gpt2_train.trackers import check_trackers

MANY_EPOCHS = 40  # beyond about four, repeated data helps less and less (Muennighoff et al. 2023)
LONG_HOURS = 72.0
# A run that is cut short gets smaller batches until it has so many steps: a handful of updates teaches nothing.
FEWEST_STEPS = 500
SLOWEST = 1e10  # operations per second of one old core: a run that is short at this rate need not be timed

Check = Callable[..., Any]  # check(work, *arguments) does the work


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checks found this for a run to begin with; after one that failed and was noted, a field may be None."""

    config: TrainConfig  # resolved: precision, warmup and the model's shape are known
    dataset: Dataset
    checkpoint: Path | None  # verified, to resume from
    state: dict[str, Any]  # its trainer.json
    hellaswag: HellaSwag | None
    tokenizer: Tokenizer  # that the model and its samples use; GPT-2's if the dataset has none of its own
    split: tuple[int, int] | None  # micro-batch and accumulation, by the estimate of memory
    memory: Memory | None  # what they need
    free: tuple[int | None, int]  # bytes of the GPU, if there is one, and of the host


def check_start(
    config: TrainConfig, world_size: int, device: torch.device, here: bool = True, check: Check = call,
    on_main: Check = call,
) -> Start:  # fmt: skip
    """Return what a run begins with, after all checks that can be made before it. Writes nothing.

    Args:
        here: whether this machine has the device.
        check: makes one check. By default its error ends all; --dry-run's notes it, returns None and continues.
        on_main: does work on rank 0 alone, and returns its result, or raises its error, on every rank.
    """
    config = replace(config, precision=choose_precision(config.precision, device if here else None))
    dataset = check(open_dataset, config.data)
    if dataset and dataset.tokenizer and not config.init:
        config = replace(config, model={"vocab_size": dataset.vocab_size, **config.model})
    start = check(on_main, lambda: starting_point(config, dataset)) if dataset else None
    state = {} if start is None else checkpoint.read_trainer_state(start)
    config = _with_own_warmup(config, state)
    source = start or config.init
    found = check(GPT.inspect_with_tokenizer, source) if source else None
    shape, of_model = found or (config.model_config, None)
    tokenizer = check(find_tokenizer, config, dataset, source, of_model) if dataset else None
    tokenizer = tokenizer or Tokenizer()
    if dataset:
        check(check_shape, config, shape, dataset, start, world_size)
        check(make_loader, config, 1, 0, world_size)
        if config.eval_every and validation_tokens(config, dataset):
            check(dataset.split, "val")
    config = replace(config, model=asdict(shape))
    hellaswag = check(_load_hellaswag, config, tokenizer) if config.hellaswag else None
    if config.eval_every and config.num_samples:
        check(prompt_ids, config, tokenizer)
    check(check_trackers, config)
    if here and config.compiles(device.type):
        check(on_main, lambda: check_compiler(device, "gpt2-train --compile off"))
    check(on_main, lambda: memory.check_space(config))
    free = on_main(lambda: memory.free_memory(device, here))
    split, peak = check(_split, config, state, world_size, device.type, free), None
    if split is not None:
        peak = memory.peak_memory(config, split[0], world_size, device.type)
        check(memory.check_memory, config, split[0], world_size, device.type, free)
    return Start(
        config=config, dataset=dataset, checkpoint=start, state=state, hellaswag=hellaswag, tokenizer=tokenizer,
        split=split, memory=peak, free=free,
    )  # fmt: skip


def starting_point(config: TrainConfig, dataset: Dataset) -> Path | None:
    """Return the verified checkpoint to resume from, or None; raise CannotResume if it does not fit the run."""
    start = checkpoint.choose_checkpoint(Path(config.out), config.resume)
    if start is None:
        return None
    trainer = checkpoint.read_trainer_state(start)
    config = _with_own_warmup(config, trainer)
    if trainer["dataset"] != dataset.manifest.hash:
        raise CannotResume(f"{config.data} is not the dataset that {start} was trained on: choose another --out")
    if changed := changed_fields(trainer["config"], config)[0]:
        advice = "choose another --out"
        if not config.model or asdict(config.model_config) == trainer["config"]["model"]:
            advice += "; --init with this checkpoint starts from its weights"
        raise CannotResume(f"{start} was trained with other settings ({'; '.join(changed)}): {advice}")
    if trainer["step"] > config.steps:
        advice = f"use --steps {trainer['step']} or more, or choose another --out"
        raise CannotResume(f"{start} is beyond --steps {config.steps}: {advice}")
    return start


def _with_own_warmup(config: TrainConfig, state: dict[str, Any]) -> TrainConfig:
    """Return the config with the warmup of the run that it resumes, unless the user gave another."""
    given = config.warmup != default_warmup(config.steps)
    return config if given or not state else replace(config, warmup=state["config"]["warmup"])


def check_shape(
    config: TrainConfig, shape: GPTConfig, dataset: Dataset, start: Path | None, world_size: int
) -> None:
    """Raise ValueError if the model that a run begins with does not match its settings or its data."""
    source = f"{start}" if start else f"--init {config.init}"
    asked, own = asdict(config.model_config), asdict(shape)
    given = asked if start else config.model  # what --init's model has is its own, unless it was named
    if config.model and (wrong := [name for name in given if own[name] != asked[name]]):
        differences = ", ".join(f"{name} {own[name]}, not {asked[name]}" for name in wrong)
        raise ValueError(f"{source} has another shape than --model, --recipe or --config asks for: {differences}")
    if config.seq_len > (longest := shape.block_size):
        advice = f"use --seq-len {longest}"
        if (batch := whole_batch(replace(config, seq_len=longest), world_size)) != config.batch_tokens:
            advice += f" --batch-tokens {batch}"
        context = f"the context of {config.init or start}, {longest}"
        raise ValueError(f"seq_len {config.seq_len} is longer than {context}: {advice}")
    # GPT-2's vocabulary may be cut, as that of letters is; another's is what its tokenizer says.
    largest, last = dataset.vocab_size - 1, shape.vocab_size - 1
    if largest > last and not dataset.tokenizer:  # other projects' files are read from end to end for it
        largest = max(shard.max_token for shard in dataset.manifest.shards)
    if largest > last:
        advice = "" if start or config.init else f": use --model vocab_size={largest + 1}"
        problem = f"{config.data} holds token id {largest:,}, and the model's vocabulary ends at {last:,}"
        raise ValueError(problem + advice)


def make_loader(config: TrainConfig, micro_batch: int, rank: int, world_size: int) -> TokenLoader:
    """Return the training batches of a process. Raises ValueError if the data is too short for one sample."""
    return TokenLoader(
        config.data, "train", micro_batch, config.seq_len, seed=config.seed, rank=rank, world_size=world_size,
        order=config.order,  # type: ignore[arg-type]
    )  # fmt: skip


def warnings_of(start: Start, world_size: int, hours: float | None) -> list[str]:
    """Return warnings about settings that work but are unwise, one line each; `hours` is what the run takes."""
    config, dataset, lines = start.config, start.dataset, list[str]()
    if config.warmup >= config.steps and config.warmup > 1:
        advice = "" if start.state else f"; try --warmup {config.steps // 10}"
        problem = f"--warmup {config.warmup} is as long as the run{advice}"
        lines.append(f"the learning rate never reaches its peak: {problem}")
    if config.eval_every and not validation_tokens(config, dataset):
        lines.append("the dataset has no tokens for validation: gpt2-data build --val-tokens sets some apart")
    total, train_tokens = config.steps * config.batch_tokens, max(1, dataset.tokens("train"))
    tokens, unwise = total, list[str]()
    if hours is not None and hours > LONG_HOURS:
        unwise.append(f"the run takes about {duration(hours)} here")
        tokens = int(total * 12 / hours)
    if total / train_tokens > MANY_EPOCHS:
        unwise.append(f"each text is seen {total / train_tokens:,.0f} times")
        tokens = min(tokens, 10 * train_tokens)
    if unwise:
        flags, tokens = _shortened(config, tokens, world_size)
        # A run that is resumed has its batches, and steps that cannot be taken back.
        advice = "" if start.state else f": {flags} makes it {tokens / train_tokens:.2g} epochs"
        lines.append(" and ".join(unwise) + advice)
    return lines


def _shortened(config: TrainConfig, tokens: int, world_size: int) -> tuple[str, int]:
    """Return the flags that cut a run to about so many tokens, and how many they make."""
    unit, batch = batch_unit(config, world_size), config.batch_tokens
    while batch % (2 * unit) == 0 and batch * FEWEST_STEPS > tokens:
        batch //= 2
    steps = max(1, tokens // batch)
    flags = f"--steps {steps}" if batch == config.batch_tokens else f"--batch-tokens {batch} --steps {steps}"
    if config.warmup >= steps:
        flags += f" --warmup {default_warmup(steps)}"
    return flags, steps * batch


def validation_tokens(config: TrainConfig, dataset: Dataset) -> int:
    """Return how many tokens each validation predicts: as many as asked for, or all but the split's first."""
    return min(config.eval_tokens, max(0, dataset.tokens("val") - 1))


def find_tokenizer(
    config: TrainConfig, dataset: Dataset, source: str | Path | None, of_model: Tokenizer | None
) -> Tokenizer:
    """Return the model's tokenizer, if it has one, else the dataset's; a ValueError says that they differ."""
    own = Tokenizer()
    if dataset.tokenizer:
        own = load_tokenizer(dataset.tokenizer.parent, dataset.eot) or own
    if of_model is None:
        return own
    if not of_model.same_ids(own):
        flag = "without --tokenizer" if of_model.is_gpt2 else f"with --tokenizer {source}"
        problem = f"{config.data} was built with another tokenizer than that of {source}"
        raise ValueError(f"{problem}: build a dataset {flag} (gpt2-data build)")
    return of_model


def _load_hellaswag(config: TrainConfig, tokenizer: Tokenizer) -> HellaSwag:
    if not Path(config.hellaswag).is_file():
        raise OSError(f"--hellaswag {config.hellaswag} is not a file: name one in HellaSwag's format (JSONL)")
    data = load_hellaswag(config.hellaswag, encoder=tokenizer)
    if (size := config.model_config.vocab_size) < tokenizer.num_tokens:
        raise ValueError(f"--hellaswag: texts may have tokens beyond the vocabulary of {size:,}: leave it out")
    return data


def prompt_ids(config: TrainConfig, tokenizer: Tokenizer) -> list[int]:
    """Return what samples continue. Raises ValueError if the model cannot continue it."""
    ids, shape = tokenizer.encode(config.sample_prompt), config.model_config
    if not ids and tokenizer.eot is not None:
        ids = [tokenizer.eot]
    if max(ids, default=shape.vocab_size) >= shape.vocab_size:
        problem = f"has a token beyond the vocabulary of {shape.vocab_size:,}"
    elif len(ids) >= shape.block_size:
        problem = f"has {len(ids):,} tokens, and the context is {shape.block_size:,}"
    else:
        return ids
    raise ValueError(f"--sample-prompt {config.sample_prompt[:40]!r} {problem}: change it, or use --num-samples 0")


def _split(
    config: TrainConfig, state: dict[str, Any], world_size: int, device_type: str, free: tuple[int | None, int]
) -> tuple[int, int]:
    """Return micro-batch and accumulation: those of the run to resume, those asked for, or what should fit."""
    room = free[1] if free[0] is None else 0.95 * free[0]  # 5 % is lost between the blocks of a GPU's allocator
    if config.micro_batch == "auto" and state.get("processes") == world_size:
        config = replace(config, micro_batch=str(state["micro_batch"]))
    return micro_batches(config, world_size, memory.most_that_fit(config, world_size, device_type, room))


def expected_hours(config: TrainConfig, world_size: int, device: torch.device) -> float | None:
    """Return the hours that the run takes here; None if it is not known, or surely short."""
    if hours_at(SLOWEST, config, world_size) < LONG_HOURS:
        return None
    speed, _ = assumed_speed(config, device, here=True)
    return hours_at(speed, config, world_size) if speed else None


def hours_at(speed: float, config: TrainConfig, world_size: int) -> float:
    """Return the hours of all steps if each process does `speed` operations a second."""
    flops = flops_per_token(config.model_config, config.seq_len) * config.steps * config.batch_tokens
    return flops / (speed * world_size) / 3600
