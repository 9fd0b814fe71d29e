"""gpt2-train, and what `torchrun -m gpt2_train` runs."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from gpt2_model import GPTConfig
from gpt2_model.command import PATH, out_of_memory
from gpt2_train import __version__
from gpt2_train.config import CHOICES, RECIPES, CannotResume, TrainConfig, load_config
from gpt2_train.space import check_out

P = ParamSpec("P")
R = TypeVar("R")

# Completed as paths; whether they are good is checked later, in one place for flags and config files.
PATHS = {"data", "out", "init", "hellaswag", "resume"}
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}


class Count(click.ParamType[int]):
    """A whole number, also written 64k, 10M or 1.5B."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, scale = value.replace("_", "").replace(",", ""), 1
        if number[-1:].lower() in _SUFFIXES:
            number, scale = number[:-1], _SUFFIXES[number[-1].lower()]
        try:
            count = float(number) * scale
        except ValueError:
            count = 0.5
        if count != int(count):
            self.fail(f"{value!r} is no whole number (like 1000, 64k, 10M or 1.5B)", param, ctx)
        return int(count)


def config_options(command: Callable[P, R]) -> Callable[P, R]:
    """A flag for each field of TrainConfig, in its order; --model takes FIELD=VALUE. Rare ones: see --help-all."""
    for item in reversed(fields(TrainConfig)):
        if item.name == "model":
            option = click.option(
                "--model", "model", multiple=True, metavar="FIELD=VALUE", help="Of the model's shape; repeatable."
            )  # fmt: skip
        else:
            name = item.name.replace("_", "-")
            flags = [f"--{name}/--no-{name}"] if isinstance(item.default, bool) else [f"--{name}"]
            flags = ["-d", *flags] if item.name == "device" else flags
            kind: Any = {int: Count(), float: float, str: str, bool: bool}[type(item.default)]
            kind = click.Choice(CHOICES[item.name]) if item.name in CHOICES else kind
            kind = PATH if item.name in PATHS else kind
            option = click.option(
                *flags, item.name, type=kind, default=item.default, help=item.metadata["help"],
                show_default=item.default not in ("", False), hidden=item.metadata["rare"],
            )  # fmt: skip
        command = option(command)
    return command


def _help_all(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    for option in ctx.command.params:
        if isinstance(option, click.Option) and option.name in {item.name for item in fields(TrainConfig)}:
            option.hidden = False
    click.echo(ctx.get_help())
    ctx.exit()


def _use_file(ctx: click.Context, _param: click.Parameter, _value: Any) -> Any:
    """Make the recipe and the config file the defaults that flags and environment override."""
    try:
        keys = load_config(ctx.params.get("config"), ctx.params.get("recipe"))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    model = keys.pop("model", {})
    ctx.default_map = keys
    ctx.obj = model
    return None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_TRAIN"})
@click.version_option(__version__, prog_name="gpt2-train")
@click.option("--recipe", type=click.Choice(RECIPES), is_eager=True, help="Start from a published run's settings.")
@click.option("--config", type=click.Path(), is_eager=True, help="TOML file; a run's config.toml reruns it.")
@click.option("--read-files", is_eager=True, expose_value=False, hidden=True, callback=_use_file)
@config_options
@click.option("--dry-run", is_flag=True, help="Print the plan and check what can be checked; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as one JSON document.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_help_all,
    help="Show the flags that few need, too.",
)
@click.pass_context
def main(
    ctx: click.Context, /, recipe: str | None, config: str | None, model: tuple[str, ...], dry_run: bool,
    as_json: bool, debug: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train GPT-2 on a dataset folder; a run that was killed goes on by the same command.

    \b
    gpt2-train --data data/pydocs --out runs/small --model n_layer=4 --model n_head=4 --model n_embd=128
    torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data data/fineweb-edu --out runs/a

    A flag goes before its environment variable (GPT2_TRAIN_LR), that before --config, that before --recipe.
    """
    _fill_standard_streams()
    _check_environment(ctx.command)
    try:
        run = _config(model, ctx.obj, settings)
        if as_json and not dry_run:
            raise click.UsageError("--json goes with --dry-run: a run writes its figures to metrics.jsonl")
        if dry_run:
            ctx.exit(_print_plan(run, as_json))
        from gpt2_data import open_dataset

        check_out(Path(run.out))
        open_dataset(run.data)
        from gpt2_train.loop import train  # two seconds of torch, after everything that can be refused without it

        ctx.exit(train(run))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full = out_of_memory(error)
        if debug or not (full or isinstance(error, ValueError | OSError) or _lost_contact(error)):
            raise
        code, rank = 2 if isinstance(error, CannotResume) else 1, os.environ.get("RANK", "0")
        if rank != "0" and not full:
            sys.exit(code)  # rank 0 says it
        message = " ".join(str(error).split())
        if full:
            message = (
                f"out of memory on rank {rank} ({message[:200]}): use a smaller --micro-batch or "
                "--activation-checkpointing, with which a run goes on that has a checkpoint"
            )
        elif isinstance(error, RuntimeError):
            message = f"another process of this run is gone ({message[:200]}); the same command goes on"
        click.echo(f"Error: {message}", err=True)
        sys.exit(code)


def _lost_contact(error: Exception) -> bool:
    """Whether an exchange failed since another process is gone: gloo has no type of error of its own."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or any(word in str(error) for word in ("gloo", "Connection closed by peer"))


def _fill_standard_streams() -> None:
    """Give a stream that the shell closed (2>&-) a place to go: else the next file that is opened, perhaps a
    checkpoint, gets its number, and what C++ code prints is written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


def _check_environment(command: click.Command) -> None:
    known = {f"GPT2_TRAIN_{option.name}".upper() for option in command.params}
    for name in sorted(os.environ):
        if name.startswith("GPT2_TRAIN_") and name not in known:
            raise click.UsageError(
                f"unknown environment variable {name}: it must be GPT2_TRAIN_ and a flag's name"
            )


def _config(assignments: tuple[str, ...], base: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    for name in ("data", "out"):
        if not settings[name]:
            raise click.UsageError(f"--{name} is missing")
    pairs = [assignment.partition("=") for assignment in assignments]
    for name, equals, _ in pairs:
        if not equals:
            raise click.UsageError(f"--model {name!r} must be FIELD=VALUE")
    try:
        asked = GPTConfig().with_fields({**_as_text(base), **{name: value for name, _, value in pairs}})
        model = {name: getattr(asked, name) for name in {*base, *(name for name, _, _ in pairs)}}
        return TrainConfig(**settings, model=model)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _as_text(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _print_plan(config: TrainConfig, as_json: bool) -> int:
    """Exit status: 1 if a check failed. Under torchrun, or with WORLD_SIZE set, for that many processes."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # rank 0 prints it
    from gpt2_train.plan import make_plan, to_json, to_lines

    plan = make_plan(config, int(os.environ.get("WORLD_SIZE", 1)))
    click.echo(json.dumps(to_json(plan), indent=2) if as_json else "\n".join(to_lines(plan)))
    for problem in plan.problems:
        click.echo(f"Error: {problem}", err=True)
    return 1 if plan.problems else 0
