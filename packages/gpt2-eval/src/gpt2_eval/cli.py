"""gpt2-eval hellaswag | loss."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from . import __version__

if TYPE_CHECKING:  # torch takes two seconds to import: no module that needs it is, before work starts
    import torch

    from gpt2_model import GPT

    from .report import HellaSwagResult, LossResult

P = ParamSpec("P")
R = TypeVar("R")

METRIC_TEXT = {
    ("karpathy", "acc"): "highest sum of log-probabilities; raw text (build-nanogpt, llm.c)",
    ("karpathy", "acc_norm"): "highest mean per token; raw text",
    ("lm-eval", "acc"): "highest sum; cleaned text (lm-evaluation-harness)",
    ("lm-eval", "acc_norm"): "highest sum per character; cleaned text",
    ("lm-eval", "acc_bytes"): "highest sum per UTF-8 byte; cleaned text",
}


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what the user can mend (ValueError, OSError) into one line and exit 1; `--debug` shows all of it."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            if click.get_current_context().find_root().params["debug"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from None

    return wrapped


def parse_size(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """A count, as in 10485760, 64k, 10M, 1.5B: text -> a positive int; usage error for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text, re.IGNORECASE)
    count = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if count < 1 or count != int(count):
        raise click.BadParameter(f"{text!r} is not a size like 10485760, 64k or 1.5B")
    return int(count)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_EVAL"})
@click.version_option(__version__, prog_name="gpt2-eval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """What a GPT-2 scores, with the name of the protocol beside each number.

    MODEL is a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2's), a Hugging Face model folder
    (a training checkpoint is one), or any other checkpoint that gpt2-model reads: see gpt2-model --help.

    On several GPUs: torchrun --nproc_per_node=8 -m gpt2_eval hellaswag ...
    """


@main.command()
@click.option("-m", "--model", required=True, help="Hub name, model folder or checkpoint file.")
@click.option("--data", required=True, metavar="FILE", help="hellaswag_val.jsonl of github.com/rowanz/hellaswag.")
@click.option("--protocol", type=click.Choice(["karpathy", "lm-eval", "both"]), default="both", show_default=True,
              help="karpathy: build-nanogpt's and llm.c's; lm-eval: lm-evaluation-harness'.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="The first N items only: a trial, not comparable.")
@click.option("--out", metavar="ITEMS.jsonl", help="Also write every item's log-likelihoods.")
@click.option("--batch-size", type=click.IntRange(min=1),
              help="Rows in a forward pass: changes speed only.  [default: 64; 16 on a CPU]")  # fmt: skip
@click.option("-d", "--device", default="auto", show_default=True, help="cuda, mps, cpu, or auto.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: fp32. bf16 (autocast) is faster and moves scores a little.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@user_errors
def hellaswag(
    model: str, data: str, protocol: str, limit: int | None, out: str | None, batch_size: int | None, device: str,
    dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """HellaSwag, zero-shot, by both protocols that publish numbers.

    \b
    gpt2-eval hellaswag -m gpt2 --data hellaswag_val.jsonl
    gpt2-eval hellaswag -m runs/a/checkpoints/step-00005000 --data hellaswag_val.jsonl --protocol karpathy
    """
    out_path = None if out is None else _writable(out)
    from .report import json_text, write_records
    from .tasks import evaluate_hellaswag, load_hellaswag

    items = load_hellaswag(data, limit=limit)  # before the model: bad data shows in a second
    with _ranks() as rank:
        gpt = _load(model, device)
        result = evaluate_hellaswag(
            gpt,
            items,
            protocol=protocol,
            batch_size=batch_size,
            autocast_dtype=_autocast_dtype(dtype),
            progress=rank == 0 and sys.stderr.isatty(),
        )
        if rank != 0:
            return
        if out_path is not None:
            write_records(out_path, result.records)
        if as_json:
            facts = {"model": model, "device": str(gpt.device), "dtype": _dtype_name(dtype)}
            click.echo(json_text(result.as_dict() | facts, indent=2))
        else:
            _print_hellaswag(result, items.total, f"{gpt.device}, {_dtype_name(dtype)}")


@main.command()
@click.option("-m", "--model", required=True, help="Hub name, model folder or checkpoint file.")
@click.option("--data", required=True, metavar="DIR", help="Dataset folder, as gpt2-data builds it.")
@click.option("--split", default="val", show_default=True, help="Split of the dataset.")
@click.option("--tokens", callback=parse_size, default="10485760", show_default=True, metavar="N",
              help="Score the split's first N tokens (10M, 64k); all of a smaller split.")  # fmt: skip
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens a window.  [default: the model's context]")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Windows in a forward pass; changes speed, not the loss.")  # fmt: skip
@click.option("-d", "--device", default="auto", show_default=True, help="cuda, mps, cpu, or auto.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: fp32. bf16 (autocast) is faster and moves the loss a little.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@user_errors
def loss(
    model: str, data: str, split: str, tokens: int, seq_len: int | None, batch_size: int, device: str, dtype: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Loss in nats per token, perplexity and bits per byte on the same tokens every time.

    \b
    gpt2-eval loss -m gpt2 --data data/fineweb-edu
    gpt2-eval loss -m runs/a/checkpoints/step-00005000 --data data/pydocs --tokens 64k
    """
    from gpt2_data import open_dataset

    from .loss import count_targets, evaluate_loss
    from .report import json_text

    dataset = open_dataset(data)
    count_targets(dataset, split, tokens)  # before the model: an empty split shows in a second
    with _ranks() as rank:
        gpt = _load(model, device)
        result = evaluate_loss(
            gpt,
            dataset,
            split=split,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            autocast_dtype=_autocast_dtype(dtype),
            progress=rank == 0 and sys.stderr.isatty(),
        )
        if rank != 0:
            return
        if as_json:
            facts = {"split": split, "model": model, "device": str(gpt.device), "dtype": _dtype_name(dtype)}
            click.echo(json_text(result.as_dict() | facts, indent=2))
        else:
            _print_loss(result, split, f"{gpt.device}, {_dtype_name(dtype)}")


def _print_hellaswag(result: "HellaSwagResult", total: int, how: str) -> None:
    from .tasks import PUBLISHED_SHA256

    click.echo(f"{'protocol':10}{'metric':11}{'accuracy':>8}{'stderr':>9}{'ties':>6}")
    for protocol, metrics in result.metrics.items():
        for name, metric in metrics.items():
            stderr = f"± {_number(100 * metric.stderr, '.2f')}"
            click.echo(
                f"{protocol:10}{name:11}{100 * metric.value:6.2f} %{stderr:>9}{metric.ties:6}"
                f"   {METRIC_TEXT[protocol, name]}"
            )
    for protocol, rows in result.truncated.items():
        if rows:
            click.echo(f"{protocol}: {rows:,} rows lost the left of their context, which the model cannot hold")
    click.echo(f"{result.items:,} items of HellaSwag in {result.seconds:.1f} s on {how}")
    if result.partial:
        click.secho(f"PARTIAL: the first {result.items:,} of {total:,} items; not comparable", fg="yellow")
    if result.data_sha256 != PUBLISHED_SHA256:
        click.secho(
            f"Not the published hellaswag_val.jsonl (SHA-256 {result.data_sha256[:12]}…, not "
            f"{PUBLISHED_SHA256[:12]}…): compare with numbers on this same file only",
            fg="yellow",
        )


def _print_loss(result: "LossResult", split: str, how: str) -> None:
    click.echo(f"loss           {result.loss:.4f} ± {_number(result.stderr, '.4f')} nats per token")
    click.echo(f"perplexity     {result.perplexity:.2f}")
    click.echo(f"bits per byte  {_number(result.bits_per_byte, '.4f')}")
    click.echo(
        f"first {result.tokens:,} tokens of {split}, {result.sequences:,} windows of {result.seq_len:,}, "
        f"in {result.seconds:.1f} s on {how}"
    )
    if result.tokens < result.tokens_requested:
        click.secho(f"{split} is smaller than the {result.tokens_requested:,} tokens asked for", fg="yellow")


def _number(value: float, spec: str) -> str:
    return "n/a" if value != value else format(value, spec)


def _writable(name: str) -> Path:
    """`name` as a path that a file can be written to, found out before minutes of scoring."""
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"--out {name} is a folder: name a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {name}: the folder {path.parent} does not exist or cannot be written to")
    return path


@contextmanager
def _ranks() -> Iterator[int]:
    """This process's rank, in torchrun's process group while the block runs; 0 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # only records of a few bytes travel, and they are on the CPU
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _load(model: str, device: str) -> "GPT":
    from gpt2_model import GPT

    where = _device(device)
    return GPT.from_pretrained(model).to(where)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not to be had here: use cpu, or auto") from None
    return device


def _autocast_dtype(name: str) -> "torch.dtype | None":
    import torch

    return torch.bfloat16 if name == "bf16" else None


def _dtype_name(name: str) -> str:
    return "bf16" if name == "bf16" else "fp32"
