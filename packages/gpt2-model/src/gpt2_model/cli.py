"""gpt2-model generate | info | convert."""

import codecs
import os
import re
import select
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click_option_group import optgroup

from gpt2_model import command
from gpt2_model.command import PATH, SETTINGS, find_device, print_json, user_errors
from gpt2_model.config import PAPER_NAMES, PRESETS, flops_per_token

if TYPE_CHECKING:  # torch takes two seconds to import: functions import what needs it, once work starts
    from gpt2_model.model import GPT

one_line_errors = user_errors("use fewer samples (-n), --dtype int8 or -d cpu")


@click.group(
    cls=command.ProgramGroup,
    context_settings=SETTINGS | {"auto_envvar_prefix": "GPT2_MODEL", "show_default": True},
)
@click.version_option(package_name="gpt2-model", prog_name="gpt2-model")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Generate text with GPT-2, describe a model, and convert any GPT-2 to the Hugging Face format.

    \b
    MODEL is one of
      gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2 on the hub: owner/name[@revision]
      a Hugging Face model folder, such as a training checkpoint
      a run folder of gpt2-train: its newest checkpoint
      a .safetensors, .bin, .pt or .ckpt file beside its config.json
      nanoGPT's ckpt.pt, build-nanogpt's model_19072.pt or llm.c's .bin
    """


@main.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@optgroup("Model and prompt")
@optgroup.option("-m", "--model", type=PATH, metavar="MODEL", required=True,
                 help="Hub name, folder or file: see gpt2-model --help.")  # fmt: skip
@optgroup.option(
    "-f", "--file", type=command.UserFile("rb"), help="File to read the prompt from; - is standard input."
)
@optgroup.option("-i", "--interactive", is_flag=True,
                 help="Write in turns with the model; the whole text so far is the next prompt.")  # fmt: skip
@optgroup("Sampling")
@optgroup.option("-n", "--num-samples", type=click.IntRange(min=1), default=1, help="Samples per prompt.")
@optgroup.option("--temperature", default=1.0, help="Randomness; 0 takes the likeliest token each time.")
@optgroup.option("--top-k", type=click.IntRange(min=0), default=50,
                 help="Sample from this many likeliest tokens; 0 for all.")  # fmt: skip
@optgroup.option("--top-p", default=1.0, help="Sample from the fewest tokens that reach this probability.")
@optgroup.option("--min-p", default=0.0, help="Drop tokens below this share of the top token's probability.")
@optgroup.option("--repetition-penalty", default=1.0, help="Values above 1 make earlier tokens less likely.")
@optgroup.option("--seed", default=0, help="Seed of the random numbers: the same seed gives the same text.")
@optgroup("Length and end")
@optgroup.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Maximum number of new tokens.")
@optgroup.option("--stop", multiple=True, metavar="TEXT",
                 help=r"End before this text; can be repeated. Escapes: \n \t \r \\ \xNN \uNNNN.")  # fmt: skip
@optgroup.option("--stop-id", multiple=True, type=int,
                 help="End at this token id, in addition to the model's own ends; can be repeated.")  # fmt: skip
@optgroup.option("--slide", is_flag=True, help="When the model's context is full, continue from its last half.")
@optgroup("Hardware")
@optgroup.option("-d", "--device", default="auto", help="cuda, mps, cpu, or auto.")
@optgroup.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto",
                 help="Precision of the weights; auto means bf16 on CUDA and fp32 elsewhere.")  # fmt: skip
@optgroup.option("--compile/--no-compile", default=None,
                 help="Compile the step. CPU: the default, needs a C compiler, 3 s once; CUDA: 30 s.")  # fmt: skip
@optgroup("Output")
@optgroup.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@optgroup.option("--logprobs", is_flag=True, help="With --json: add each token's log-probability.")
@one_line_errors
def generate(
    prompts: tuple[str, ...], model: str, file: BinaryIO | None, interactive: bool, device: str, dtype: str,
    as_json: bool, top_k: int, stop_id: tuple[int, ...], **options: Any,
) -> None:  # fmt: skip
    """Continue each PROMPT. Without one, continue the text piped to standard input, or write from nothing.

    \b
    gpt2-model generate -m gpt2 "Hello, I'm a language model,"
    gpt2-model generate -m gpt2-xl --dtype int8 --stop "." < beginning.txt
    """
    texts = _prompts(prompts, file, interactive)
    if interactive and (as_json or len(texts) > 1 or options["num_samples"] > 1):
        raise click.UsageError("--interactive takes at most one prompt, one sample, and no --json")
    if options["logprobs"] and not as_json:
        raise click.UsageError("--logprobs needs --json")
    from gpt2_model.generation import end_ids
    from gpt2_model.sampling import Sampling

    options["top_k"] = top_k or None
    options["stop"] = [_unescaped(text) for text in options["stop"]]
    try:  # before a minute of loading
        Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    gpt = _load(model, device, dtype)
    _say_if_slow(gpt, options["compile"])
    options["stop_ids"] = [*end_ids(gpt), *stop_id]
    if interactive:
        _converse(gpt, texts[0] if texts else "", options)
    elif as_json:
        from gpt2_model.generation import first_id
        from gpt2_model.generation import generate as complete

        rows = (vars(row) for row in complete(gpt, texts or [[first_id(gpt)]], **options))
        print_json([{name: value for name, value in row.items() if value is not None} for row in rows])
    else:
        _print_rows(gpt, texts, options)


def _unescaped(text: str) -> str:
    """Return an option's text with the usual escapes read; any other backslash stays as it is."""
    escape = r"\\(?:[ntr\\]|x[0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4})"
    return re.sub(escape, lambda match: codecs.decode(match[0], "unicode_escape"), text)


def _say_if_slow(gpt: "GPT", compile: bool | None) -> None:
    """Say why the engine in C cannot be used, where it was to be."""
    from gpt2_model.cpu.engine import Unavailable, library, weight_type

    if compile is None and gpt.device.type == "cpu":
        try:
            library(weight_type(gpt))
        except Unavailable as reason:
            click.echo(f"Generation is slow without the engine in C: {reason}", err=True)


def _prompts(prompts: tuple[str, ...], file: BinaryIO | None, interactive: bool) -> list[str]:
    """Return the prompts: arguments, a file, or a pipe.

    A file's last newline is the editor's, not the text's; so are a byte order mark, and CR before a newline.
    """
    if file is not None and prompts:
        raise click.UsageError("give prompts as arguments or with --file, not both")
    if file is None and not prompts and not interactive and sys.stdin and not sys.stdin.isatty():
        file = sys.stdin.buffer
    if file is None:
        return list(prompts)
    data = file.read()
    # UTF-32's mark begins with UTF-16's.
    marks = (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")
    encoding = next((encoding for mark, encoding in marks if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding).replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        reason = f"is not {error.encoding.upper()} text: byte {error.start} cannot be read"
        raise ValueError(f"the prompt in {file.name} {reason}") from None
    return [text] if text else []


def _print_rows(gpt: "GPT", texts: Sequence[str], options: dict[str, Any]) -> None:
    """Print one row as it comes, a word at a time; several in their order, each when it is whole."""
    from gpt2_model.generation import Completion, first_id, stream

    samples = options["num_samples"]
    alone = max(1, len(texts)) * samples == 1
    rows: dict[int, Completion] = {}
    shown, started = 0, 0.0
    for piece in stream(gpt, texts or [[first_id(gpt)]], **options):
        if not started:  # the first token is there, and with it nothing can be wrong any more
            started = time.perf_counter()
            click.echo(texts[0] if alone and texts else "", nl=False)
        if alone:
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
        if piece.completion:
            rows[piece.row] = piece.completion
        while not alone and shown in rows:
            sample = f", sample {shown % samples + 1} of prompt {shown // samples + 1}" if len(texts) > 1 else ""
            click.secho(f"--- row {shown}{sample}", dim=True)
            click.echo((rows[shown].prompt if texts else "") + rows[shown].text)
            shown += 1
    if alone:
        click.echo()
    most = options["max_new_tokens"]
    if any(row.finish_reason == "length" and len(row.tokens) < most for row in rows.values()):
        full = f"(the model's context of {gpt.config.block_size} tokens is full; add --slide to continue)"
        click.secho(full, dim=True, err=True)
    if tokens := sum(max(0, len(row.tokens) - 1) for row in rows.values()):
        speed = tokens / (time.perf_counter() - started)
        click.secho(f"({speed:.0f} tokens/s on {gpt.device}, after the first)", dim=True, err=True)


def _converse(gpt: "GPT", text: str, options: dict[str, Any]) -> None:
    """Let a person and the model write one text in turns."""
    from gpt2_model.generation import first_id, stream

    with suppress(ImportError):
        import readline  # noqa: F401 # line editing and history for input()
    click.secho("Your line is added to the text as it is, spaces too; it may be empty. Then the model continues.\n"
                "End a line with \\ to add a line end and write on; lines that you paste are one turn.\n"
                "/again replaces the last continuation. /reset starts a new text. Ctrl-C stops this answer. "
                "Ctrl-D quits.", dim=True, err=True)  # fmt: skip
    before = text
    options["slide"] = True  # the text may outgrow the context
    click.echo(text, nl=False)
    while True:
        try:
            line = _turn()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # begin the line again
            continue
        if line == "/reset":
            text = before = ""
            continue
        if line.startswith("/") and "\n" not in line and line != "/again":
            click.secho(f"{line.split()[0]} is not a command: use /again or /reset", dim=True, err=True)
            continue
        text = before if line == "/again" else text + line
        before = text
        click.echo(text, nl=False)
        with suppress(KeyboardInterrupt):
            for piece in stream(gpt, [text] if text else [[first_id(gpt)]], **options):
                click.secho(piece.text, nl=False, bold=True)  # the model's words
                sys.stdout.flush()
                text += piece.text
        options["seed"] += 1


def _turn() -> str:
    """Return a person's turn: one line, or several that were pasted or continued by a backslash at the end."""
    line = input("\n> ")
    while True:
        # A terminal sends what is pasted at once; a person takes longer for a line.
        if sys.stdin.isatty() and os.name == "posix" and select.select([sys.stdin], [], [], 0.05)[0]:
            line += "\n" + input()
        elif line.endswith("\\"):
            line = line[:-1] + "\n" + input("> ")
        else:
            return line


@main.command()
@click.argument("model", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
@one_line_errors
def info(model: str, as_json: bool) -> None:
    """Show the shape, the memory and the FLOPs of a model or a size.

    Sizes: 124M, 350M, 774M, 1558M, and the paper's names for them: 117M, 345M, 762M, 1542M.
    """
    progress: dict[str, Any] = {}
    folder: Path | None = None
    config = PRESETS.get(PAPER_NAMES.get(model, model))
    if config is None:
        from gpt2_model.checkpoints.load_save import inspect, read_progress

        model = _checkpoint_of(model)
        (config, folder), progress = inspect(model), read_progress(model)
    from gpt2_model.tokenizer import describe_tokenizer

    facts = progress | vars(config)
    facts["tokenizer"] = describe_tokenizer(config.vocab_size, folder)
    facts["parameters"] = config.num_parameters
    facts["bytes_fp32"] = 4 * config.num_parameters
    facts["training_flops_per_token"] = flops_per_token(config, config.block_size)
    if as_json:
        return print_json(facts)
    for name, value in facts.items():
        click.echo(f"{name:34}{value:,}" if type(value) is int else f"{name:34}{value}")


@main.command()
@click.argument("model", type=PATH)
@click.argument("out", type=command.UserPath(file_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT, if there is one.")
@one_line_errors
def convert(model: str, out: str, overwrite: bool) -> None:
    """Write a model as a Hugging Face folder, in fp32: gpt2-model convert out/ckpt.pt from-nanogpt"""
    if not out:
        raise click.UsageError("OUT is empty: name a folder")
    if (Path(out) / "config.json").exists() and not overwrite:
        raise ValueError(f"{out} already contains a model: choose another folder, or add --overwrite")
    gpt = _load(model, "cpu", "fp32")
    gpt.save_pretrained(out)
    click.echo(f"{gpt.config.num_parameters:,} parameters in {click.format_filename(out)}")


def _load(model: str, device_name: str, dtype: str) -> "GPT":
    import torch

    from gpt2_model.model import GPT

    device = find_device(device_name)
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" else "fp32"
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    return GPT.from_pretrained(_checkpoint_of(model), dtype=kinds[dtype]).to(device)


def _checkpoint_of(model: str) -> str:
    """Return a run folder's newest checkpoint, and say so on stderr; any other model as it is."""
    from gpt2_model.checkpoints.load_save import newest_checkpoint

    checkpoint = newest_checkpoint(Path(model))
    if checkpoint is None or (Path(model) / "config.json").exists():
        return model
    click.echo(f"{model} is a run folder: using its newest checkpoint, {checkpoint}", err=True)
    return str(checkpoint)
