"""gpt2-model generate | info | convert."""

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, TypeVar

import click

from gpt2_model import __version__

if TYPE_CHECKING:  # torch takes two seconds to import: no module that needs it is, before work starts
    import torch

    from gpt2_model.model import GPT

P = ParamSpec("P")
R = TypeVar("R")

# A shell completes it; whether it is there, or a hub name, is found out later.
PATH = click.Path(readable=False)


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what the user can mend (ValueError, OSError) into one line and exit 1; `--debug` shows all of it."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:  # `| head` has seen enough: click ends quietly
            raise
        except (ValueError, OSError) as error:
            if click.get_current_context().find_root().params["debug"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or click.get_current_context().find_root().params["debug"]:
                raise
            raise click.ClickException("out of memory: use fewer samples (-n), --dtype int8 or -d cpu") from None

    return wrapped


def out_of_memory(error: Exception) -> bool:
    """Whether memory is used up: a GPU's, a Mac's (MPS), or this machine's, as torch or Python notice it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in ("backend out of memory", "DefaultCPUAllocator"))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_MODEL"})
@click.version_option(__version__, prog_name="gpt2-model")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """GPT-2: text from a prompt, what a model is, and copies in the Hugging Face format.

    \b
    MODEL is one of
      gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2 on the hub: owner/name[@revision]
      a Hugging Face model folder; a training checkpoint is one
      a .safetensors or .bin file beside its config.json
      nanoGPT's ckpt.pt, llm.c's .bin, OpenAI's TensorFlow folder
    """


@main.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("-m", "--model", type=PATH, metavar="MODEL", required=True,
              help="Hub name, folder or file: see gpt2-model --help.")  # fmt: skip
@click.option("-f", "--file", type=click.File("rb"), help="Take the prompt from a file; - is stdin.")
@click.option("-i", "--interactive", is_flag=True, help="Write in turns; what was written is the next prompt.")
@click.option("-n", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True,
              help="Samples of each prompt.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True,
              help="Tokens to add at most.")  # fmt: skip
@click.option("--temperature", default=1.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True,
              help="Sample from so many likeliest tokens; 0: all.")  # fmt: skip
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest with this probability.")
@click.option("--min-p", default=0.0, show_default=True, help="Drop tokens below this share of the likeliest.")
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    help="Above 1, tokens that came before get less likely.",
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End where this text appears; may be given often.")
@click.option("--stop-id", multiple=True, type=int, help="End at this token id, too; at 50256 it ends anyway.")
@click.option("--slide", is_flag=True, help="At the end of the model's context go on from its last half.")
@click.option("--logprobs", is_flag=True, help="Log-probability of each token, in --json.")
@click.option("-d", "--device", default="auto", show_default=True, help="cuda, mps, cpu, or auto.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", show_default=True,
              help="auto: bf16 on CUDA, fp32 elsewhere. int8: weights quantised.")  # fmt: skip
@click.option("--compile/--no-compile", default=None,
              help="Compile the step. CPU: on with a C compiler, 3 s once. CUDA: off, takes 30 s.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of text.")
@user_errors
def generate(
    prompts: tuple[str, ...], model: str, file: BinaryIO | None, interactive: bool, device: str, dtype: str,
    as_json: bool, top_k: int, stop_id: tuple[int, ...], **options: Any,
) -> None:  # fmt: skip
    """Continue each PROMPT. With none, continue standard input if it is a pipe or a file, else write from nothing.

    \b
    gpt2-model generate -m gpt2 "Hello, I'm a language model,"
    gpt2-model generate -m runs/a/checkpoints/step-00005000 -n 3 --seed 1 "The"
    gpt2-model generate -m gpt2-xl --dtype int8 --stop "." < beginning.txt
    """
    texts = _prompts(prompts, file, interactive)
    if interactive and (as_json or len(texts) > 1 or options["num_samples"] > 1):
        raise click.UsageError("--interactive takes at most one prompt, one sample, and no --json")
    if options["logprobs"] and not as_json:
        raise click.UsageError("--logprobs are shown by --json only")
    from gpt2_model.sampling import Sampling
    from gpt2_model.tokenizer import EOT

    options["top_k"] = top_k or None
    Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})  # before a minute of loading
    gpt = _load(model, device, dtype)
    _say_if_slow(gpt, options["compile"])
    options["stop_ids"] = (EOT, *stop_id) if gpt.config.vocab_size > EOT else stop_id
    if interactive:
        _converse(gpt, texts[0] if texts else "", options)
    elif as_json:
        from gpt2_model.generation import generate as complete

        rows = (vars(row) for row in complete(gpt, texts or [[EOT]], **options))
        _print_json([{name: value for name, value in row.items() if value is not None} for row in rows])
    else:
        _print_rows(gpt, texts, options)


def _say_if_slow(gpt: "GPT", compile: bool | None) -> None:
    from gpt2_model.native import Unavailable, library, weight_type

    if compile is None and gpt.device.type == "cpu":
        try:
            library(weight_type(gpt))
        except Unavailable as reason:
            click.echo(f"Slow, on PyTorch's operations: {reason}", err=True)


def _prompts(prompts: tuple[str, ...], file: BinaryIO | None, interactive: bool) -> list[str]:
    """From arguments, a file, or a pipe; a file's last newline is the editor's, not the text's."""
    if file is not None and prompts:
        raise click.UsageError("give prompts as arguments or with --file, not both")
    if file is None and not prompts and not interactive and _is_piped():
        file = sys.stdin.buffer
    if file is None:
        return list(prompts)
    try:
        text = file.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt in {file.name} is not UTF-8 text: byte {error.start} cannot be read"
        ) from None
    return [text] if text else []


def _is_piped() -> bool:
    """Standard input is a pipe or a file: a terminal, or nothing at all, has no prompt for us."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by a program that called us
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _print_rows(gpt: "GPT", texts: Sequence[str], options: dict[str, Any]) -> None:
    """One row as it comes, a word at a time; several one after another, each when it and those before are done."""
    from gpt2_model.generation import Completion, stream
    from gpt2_model.tokenizer import EOT

    alone = max(1, len(texts)) * options["num_samples"] == 1
    waiting: dict[int, Completion] = {}
    done = tokens = 0
    started = 0.0
    for piece in stream(gpt, texts or [[EOT]], **options):
        if not started:  # the first token is there, and with it nothing can be wrong any more
            started = time.perf_counter()
            if alone and texts:
                click.echo(texts[0], nl=False)
        if alone:
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
        if piece.completion:
            waiting[piece.row] = piece.completion
            tokens += max(0, len(piece.completion.tokens) - 1)
        while not alone and done in waiting:
            row = waiting.pop(done)
            click.secho(f"--- row {row.row}", dim=True)
            click.echo((row.prompt if texts else "") + row.text)
            done += 1
    if alone:
        click.echo()
    if tokens:
        speed = tokens / (time.perf_counter() - started)
        click.secho(f"({speed:.0f} tokens/s on {gpt.device}, after the first)", dim=True, err=True)


def _converse(gpt: "GPT", text: str, options: dict[str, Any]) -> None:
    """Turns of person and model, one text that both go on writing."""
    from gpt2_model.generation import stream
    from gpt2_model.tokenizer import EOT

    with suppress(ImportError):
        import readline  # noqa: F401 # line editing and history for input()

    click.secho("What you type is added to the text as it is, spaces too; an empty line lets the model go on.\n"
                "/again: another continuation instead of the last. "
                "/reset: a new text. Ctrl-C: enough of this one. Ctrl-D: leave.", dim=True, err=True)  # fmt: skip
    before = text
    seed = options.pop("seed")
    options["slide"] = True  # the text may outgrow the context
    click.echo(text, nl=False)
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # of a line: begin it again
            continue
        if line == "/reset":
            text = before = ""
            continue
        if line.startswith("/") and line != "/again":
            click.secho(f"{line.split()[0]} is none of /again and /reset", dim=True, err=True)
            continue
        text = before if line == "/again" else text + line
        before = text
        click.echo(text, nl=False)
        with suppress(KeyboardInterrupt):
            for piece in stream(gpt, [text] if text else [[EOT]], seed=seed, **options):
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
                text += piece.text
        seed += 1


@main.command()
@click.argument("model", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@user_errors
def info(model: str, as_json: bool) -> None:
    """Show the shape and the cost of MODEL, a model or a preset (124M, 350M, 774M, 1558M)."""
    from dataclasses import asdict

    from gpt2_model.config import PRESETS, flops_per_token

    if model in PRESETS:
        config = PRESETS[model]
    else:
        from gpt2_model.weights import inspect

        config = inspect(model)
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
@click.argument("model", type=PATH)
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--overwrite", is_flag=True, help="Put it in the place of a model that OUT holds.")
@user_errors
def convert(model: str, out: str, overwrite: bool) -> None:
    """Write MODEL as a Hugging Face model folder OUT, in fp32.

    \b
    gpt2-model convert gpt2-medium my-folder
    gpt2-model convert out/ckpt.pt from-nanogpt
    """
    if not out:
        raise click.UsageError("OUT is empty: name a folder")
    if (Path(out) / "config.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a model already: name another folder, or give --overwrite")
    gpt = _load(model, "cpu", "fp32")
    gpt.save_pretrained(out)
    click.echo(f"{gpt.config.num_parameters:,} parameters in {out}")


def _load(model: str, device: str, dtype: str) -> "GPT":
    import torch

    from gpt2_model.model import GPT

    where = _device(device)
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" else "fp32"
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    return GPT.from_pretrained(model, dtype=kinds[dtype]).to(where)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" is a device, too, but nothing comes back from it
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not to be had here: use cpu, or auto") from None
    return device


def _print_json(value: Any) -> None:
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    json.dump(value, sys.stdout, indent=2, ensure_ascii=not utf8)
    sys.stdout.write("\n")
