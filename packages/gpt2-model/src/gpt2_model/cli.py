"""gpt2-model generate | info | convert."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from . import __version__

if TYPE_CHECKING:  # torch takes two seconds to import: no module that needs it is, before work starts
    import torch

    from .model import GPT

P = ParamSpec("P")
R = TypeVar("R")


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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_MODEL"})
@click.version_option(__version__, prog_name="gpt2-model")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """GPT-2: text from a prompt, what a model is, and copies in the Hugging Face format.

    MODEL is a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2's), a Hugging Face model folder
    (a training checkpoint is one), or a .safetensors file beside its config.json.
    """


@main.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("-m", "--model", required=True, help="Hub name, model folder or .safetensors file.")
@click.option("-n", "--num-samples", default=1, show_default=True, help="Samples of each prompt.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens to add at most.")
@click.option("--temperature", default=1.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", default=50, show_default=True, help="Sample from so many likeliest tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest with this probability.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the likeliest.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same text.")
@click.option("-d", "--device", default="auto", show_default=True, help="cuda, mps, cpu, or auto.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: bf16 on CUDA, fp32 elsewhere.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
@user_errors
def generate(
    prompts: Sequence[str], model: str, num_samples: int, max_new_tokens: int, temperature: float, top_k: int,
    top_p: float, min_p: float, seed: int, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Continue each PROMPT; with none, write from nothing.

    \b
    gpt2-model generate -m gpt2 "Hello, I'm a language model,"
    gpt2-model generate -m runs/a/checkpoints/step-00005000 -n 3 --seed 1 "The"
    """
    from .generation import generate as complete
    from .sampling import check_options
    from .tokenizer import EOT

    check_options(temperature, top_k or None, top_p, min_p, seed)  # before a minute of loading
    gpt = _load(model, device, dtype)
    rows = complete(
        gpt,
        prompts or [[EOT]],
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    if as_json:
        _print_json([vars(row) for row in rows])
        return
    for row in rows:
        if len(rows) > 1:
            click.secho(f"--- row {row.row}", dim=True)
        click.echo((row.prompt if prompts else "") + row.text)
    speed = rows[0].tokens_per_second
    click.secho(f"({speed:.0f} tokens/s a row on {gpt.device})", dim=True, err=True)


@main.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@user_errors
def info(model: str, as_json: bool) -> None:
    """Show the shape and the cost of MODEL, a model or a preset (124M, 350M, 774M, 1558M)."""
    from dataclasses import asdict

    from .config import PRESETS, flops_per_token

    config = PRESETS[model] if model in PRESETS else _load(model, "cpu", "fp32").config
    facts: dict[str, Any] = {
        **asdict(config),
        "parameters": config.num_parameters,
        "bytes_fp32": 4 * config.num_parameters,
        "training_flops_per_token": flops_per_token(config, config.block_size),
    }
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name:34}{value:,}" if type(value) is int else f"{name:34}{value}")


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False))
@user_errors
def convert(model: str, out: str) -> None:
    """Write MODEL as a Hugging Face model folder OUT, in fp32."""
    gpt = _load(model, "cpu", "fp32")
    gpt.save_pretrained(out)
    click.echo(f"{gpt.config.num_parameters:,} parameters in {out}")


def _load(model: str, device: str, dtype: str) -> "GPT":
    import torch

    from .model import GPT

    where = _device(device)
    precise = dtype == "fp32" or (dtype == "auto" and where.type != "cuda")
    return GPT.from_pretrained(model, dtype=torch.float32 if precise else torch.bfloat16).to(where)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not to be had here: use cpu, or auto") from None
    return device


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
