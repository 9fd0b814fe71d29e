"""gpt2-train, and what `torchrun -m gpt2_train` runs."""

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, cast

import click
from click.core import ParameterSource
from click_option_group import GroupedOption, optgroup

from gpt2_model.command import PATH, SETTINGS, Program, Size, format_size, one_line, out_of_memory, require_posix
from gpt2_train import RECIPES, TrainConfig, load_config
from gpt2_train.config import CHOICES, GROUPS, PATHS, RARE, CannotResume, check_out

_SERVICE = re.compile(r"_(SERVICE|PORT)(_|$)")  # a Kubernetes Service called gpt2-train sets such variables
# Small whole numbers. The others may be as large as 10M or 512Ki, and are written so.
COUNTS = {"seed", "num_samples", "keep", "max_skips", "profile"}


class Command(Program):
    """A command that refuses a second --data. Other options may be given again: the last one counts."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        if [option.name for option in order].count("data") > 1 and not ctx.resilient_parsing:
            raise click.UsageError("--data is given more than once: a run trains on one dataset", ctx)
        return super().parse_args(ctx, args)


def _option(item: "Field[Any]") -> Any:
    """The flag of a field of TrainConfig; --model takes FIELD=VALUE."""
    text, default, flag = item.metadata["help"], cast(Any, item.default), item.name.replace("_", "-")
    if item.name == "model":
        return optgroup.option("--model", "model", multiple=True, metavar="FIELD=VALUE", help=text)
    flags = [f"--{flag}/--no-{flag}"] if isinstance(default, bool) else [f"--{flag}"]
    flags += ["-d"] * (item.name == "device")
    kind: Any = type(default)
    shown: Any = f"{default:g}" if kind is float else default
    if kind is int and item.name not in COUNTS:
        kind, shown = Size(), format_size(default)
    elif item.name in CHOICES:
        kind = click.Choice(CHOICES[item.name])
    elif item.name in PATHS:
        kind = PATH
    elif item.name == "min_lr":
        shown = "6e-05, or a tenth of --lr if --lr is below that"
    if item.name == "warmup":
        default, shown = None, "--steps times 715 / 19073, at least 1"
    if default != "" and default is not False:
        text += f"  [default: {shown}]"
    return optgroup.option(*flags, item.name, type=kind, default=default, help=text, hidden=item.name in RARE)


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a group of flags for each group of fields; rare flags are shown by --help-all."""
    for group in reversed(GROUPS):
        options = [_option(item) for item in fields(TrainConfig) if item.metadata["group"] == group]
        for decorate in reversed([optgroup(group), *options]):
            command = decorate(command)
    return command


def _help_all(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        for option in ctx.command.params:
            if isinstance(option, GroupedOption):
                option.hidden = False
        click.echo(ctx.get_help())
        ctx.exit()


@click.command(cls=Command, context_settings={**SETTINGS, "auto_envvar_prefix": "GPT2_TRAIN"})
@click.version_option(package_name="gpt2-train", prog_name="gpt2-train")
@optgroup("Start from")
@optgroup.option("--recipe", type=click.Choice(RECIPES), help="Start from a published run's settings.")
@optgroup.option("--config", type=PATH, help="Read settings from a TOML file, such as a run's config.toml.")
@_config_options
@optgroup("What to do")
@optgroup.option("--dry-run", is_flag=True, help="Print the plan and run all checks of a start; train nothing.")
@optgroup.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as one JSON document.")
@optgroup.option("--debug", is_flag=True, help="Show the traceback of an error.")
@optgroup.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                 help="Show all flags, including the rare ones.")  # fmt: skip
@click.pass_context
def main(
    ctx: click.Context, /, recipe: str | None, config: str | None, model: tuple[str, ...], dry_run: bool,
    as_json: bool, debug: bool, **settings: Any,
) -> None:  # fmt: skip
    """Train GPT-2 on a dataset folder; the same command resumes a run that was killed.

    \b
    gpt2-train --data data/pydocs --out runs/small --model n_layer=4 --model n_embd=192
    torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data data/edu --out runs/a

    Flags override environment variables (GPT2_TRAIN_LR), which override --config, which overrides --recipe.
    """
    require_posix("gpt2-train")
    _fill_standard_streams()
    _check_environment(ctx.command)
    try:
        from gpt2_eval import read_ranks

        read_ranks()
        run = _resolve(ctx, recipe, config, model, settings)
        if as_json and not dry_run:
            raise click.UsageError("--json needs --dry-run: a run writes its figures to metrics.jsonl")
        if dry_run:
            ctx.exit(_print_plan(run, as_json))
        from gpt2_data import open_dataset

        check_out(run.out)
        open_dataset(run.data)
        from gpt2_train.loop import train  # two seconds of torch, after everything that can be refused without it

        ctx.exit(train(run))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full, message, rank = out_of_memory(error), one_line(error), os.environ.get("RANK", "0")
        if debug or not (full or isinstance(error, ValueError | OSError) or _lost_contact(error)):
            raise
        if full:
            advice = "use a smaller --micro-batch or --activation-checkpointing; a run resumes with either"
            message = f"out of memory on rank {rank} ({message[:200]}): {advice}"
        elif isinstance(error, RuntimeError):
            from gpt2_train.checkpoint import onward

            message = f"another process of this run is gone ({message[:200]})"
            message += f"; the same command {onward(Path(run.out))}"
        # What all ranks meet is said once a machine; rank 0 may be the one that is gone.
        local, size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        alone = size == "1" or not (rank + local + size).isdecimal()
        if alone or "0" in (rank, local) or full or isinstance(error, RuntimeError):
            with suppress(OSError, ValueError):  # the terminal may be gone
                who = "" if rank == "0" or f"rank {rank}" in message.lower() else f"rank {rank}: "
                click.echo(f"Error: {who}{message}", err=True)
        sys.exit(2 if isinstance(error, CannotResume) else 1)


def _resolve(
    ctx: click.Context, recipe: str | None, config: str | None, assignments: tuple[str, ...],
    settings: dict[str, Any],
) -> TrainConfig:  # fmt: skip
    """Return the run's settings: flags and environment override the config file, which overrides the recipe."""
    try:
        keys = load_config(config, recipe)
        shape: dict[str, Any] = keys.pop("model", {})
        for name, value in keys.items():
            if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
                settings[name] = value
        if settings["warmup"] is None:
            del settings["warmup"]
        if missing := [name for name in ("data", "out") if not settings[name]]:
            raise click.UsageError(f"--{missing[0]} is missing")
        if wrong := [assignment for assignment in assignments if "=" not in assignment]:
            raise click.UsageError(f"--model {wrong[0]!r} must be FIELD=VALUE")
        return TrainConfig(**settings, model=shape | dict(assignment.split("=", 1) for assignment in assignments))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def _lost_contact(error: Exception) -> bool:
    """True if an exchange failed since another process is gone: gloo has no type of error of its own."""
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
        if name.startswith("GPT2_TRAIN_") and name not in known and not _SERVICE.search(name):
            raise click.UsageError(f"unknown environment variable {name}: no flag has this name; unset it")


def _print_plan(config: TrainConfig, as_json: bool) -> int:
    """Print the plan for WORLD_SIZE processes, as torchrun sets it; return the exit status of such a run."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        if os.environ.get("LOCAL_RANK", "0") == "0":  # as on another machine, or where no torchrun set it
            click.echo(f"rank {rank}: rank 0 prints the plan", err=True)
        return 0
    from gpt2_train.plan import make_plan, to_lines

    size = int(os.environ.get("WORLD_SIZE", 1))
    plan = make_plan(config, size)
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        plan["warnings"].append(f"a run with WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT: use torchrun")
    click.echo(json.dumps(plan, indent=2) if as_json else "\n".join(to_lines(plan)))
    for warning in plan["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    for problem in plan["problems"]:
        click.echo(f"Error: {problem}", err=True)
    return int(plan["exit_status"])
