"""gpt2-data build | verify | info | show.

Nothing heavy is imported here at the top: help must answer at once. Results go to stdout, progress to stderr.
"""

import errno
import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from gpt2_data.console import gb

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_DATA"}


def size(text: str) -> int:
    """A count such as 100M, 1.5B or 64k."""
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits = text.strip().lower()
    factor = factors.get(digits[-1:], 1)
    try:
        number = float(digits[:-1] if factor > 1 else digits) * factor
        if number < 0 or number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is no count: write 100M, 1.5B, 64k or a whole number") from None
    return int(number)


class _Group(click.Group):
    """Turns what a user can mend (ValueError, OSError) into one line and exit code 1; --debug shows the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` has seen enough: click knows
        except (ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = ": make room and run the same command again" if error.errno == errno.ENOSPC else ""
        return _printable(f"{where}{error.strerror}{full}")
    return _printable(" ".join(str(error).split()))


def _printable(text: str) -> str:
    """Escape what a file's name or content might do to a terminal, or to the one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(package_name="gpt2-data", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Text to verified GPT-2 token shards."""


def _part(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{text!r} is no part: write 1/4 to 4/4 for four parts")
    return int(match[1]), int(match[2])


def _choice(*names: str) -> Any:
    return {"type": click.Choice(names), "default": names[0], "show_default": True}


@main.command()
@click.argument("source", nargs=-1, type=click.Path(readable=False))  # completes files; not all are
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make.  [default: data/SOURCE]")
@click.option("--shard-size", type=size, metavar="SIZE", default="100M", show_default=True, help="Tokens a shard.")
@click.option(
    "--val-tokens",
    type=size,
    metavar="SIZE",
    help="Tokens for validation, 0 for none.  [default: 100M, or a tenth of a small source]",
)
@click.option("--format", **_choice("uint16", "arrow"), help="Of the shards: llm.c's, or Arrow.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: one a core]")
@click.option("--tokenizer", **_choice("auto", "tiktoken", "gigatoken"), help="Library; the tokens are the same.")
@click.option(
    "--order", type=click.Choice(["shuffled", "source"]), help="Order of the documents.  [default: shuffled]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --order shuffled.")
@click.option("--column", default="text", show_default=True, help="Column or JSON key of the text.")
@click.option(
    "--limit-docs", type=click.IntRange(1), metavar="N", help="Only the first N documents of the source."
)
@click.option("--engine", **_choice("local", "ray"), help="Processes here, or a Ray cluster (RAY_ADDRESS).")
@click.option("--part", metavar="I/N", callback=_part, help="Share I of N, for N jobs with one --out.")
@click.option(
    "--downloads",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep fetched files here.  [default: OUT/downloads]",
)
@click.option("--delete-downloads", is_flag=True, help="Delete each fetched file once it is tokenized.")
@click.option(
    "--compat", type=click.Choice(["build-nanogpt"]), help="Split and cut as its fineweb.py does, to the token."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be built.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def build(source: tuple[str, ...], out: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Tokenize SOURCEs into a dataset folder.

    \b
    SOURCE is one or several of
      fineweb-edu                 its sample-10BT: 10 billion tokens (the default)
      fineweb-edu:sample-100BT    another of its configs; fineweb likewise
      hf:REPO[:CONFIG[:SPLIT]]    any dataset on the Hugging Face hub; REPO@REVISION, too
      tinyshakespeare             a megabyte, to try things
      pydocs                      the text that comes with Python: no download
      FILES                       or quoted globs: .parquet .jsonl[.gz|.zst] .txt[.gz]

    An interrupted build goes on when the same command is run again. The result is the same, byte for byte, for any
    number of workers, parts, machines and interruptions.
    """
    from gpt2_data import console
    from gpt2_data.building.config import BuildConfig

    source = source or ("fineweb-edu",)
    if out is None:
        if len(source) > 1 or not re.fullmatch(r"[a-z-]+(:[A-Za-z0-9._-]+)?|hf:[^:]+(:[^:]+)*", source[0]):
            _check_names(source)
            raise click.UsageError("Missing option '--out'.")
        out = Path("data") / re.sub(r"[:/@]+", "-", source[0].removeprefix("hf:"))
    config = BuildConfig(sources=source, out=out, **options)
    if dry_run:
        console.print_plan(config, as_json)
        return
    from gpt2_data.building.build import build as run

    with _stoppable(), console.progress() as progress:
        result = run(config, progress)
    console.print_result(result, config, as_json)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block, and the command, with 128 + their number; the workers are ended, too."""
    number = signal.SIGINT

    def stop(received: int, _: FrameType | None) -> None:
        nonlocal number
        number = signal.Signals(received)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nstopped by {number.name}: the same command goes on from what is done", err=True)
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_names(source: tuple[str, ...]) -> None:
    """Raise ValueError for one that is none: more to the point than what else is missing."""
    from gpt2_data.sources import catalog as sources
    from gpt2_data.sources import hub

    for name in source:
        if hub.parse(name) is None:
            sources.expand(name)


DATASET = click.argument("dataset", metavar="DIR", type=click.Path(path_type=Path))


@main.command()
@DATASET
@click.option(
    "--level",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: files, sizes and headers; full: every byte.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(dataset: Path, level: str, as_json: bool) -> None:
    """Check a dataset's files against its dataset.json."""
    from gpt2_data.formats.verification import verify as check

    report = check(dataset, level)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **vars(report)}))
    elif report.ok:
        click.echo(f"{dataset}: {report.files:,} files, {gb(report.bytes)}: nothing wrong ({level})")
    else:
        for problem in report.problems:
            click.echo(problem)
    if not report.ok:
        raise click.ClickException(f"{dataset}: {len(report.problems):,} of {report.files:,} files are not right")


@main.command()
@DATASET
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(dataset: Path, as_json: bool) -> None:
    """Say what a dataset is made of."""
    from gpt2_data.formats.manifest import SPLITS, load

    made = load(dataset)
    if as_json:
        click.echo(json.dumps({"hash": made.hash, **json.loads(made.to_bytes())}))
        return
    options, source = made.options, made.source
    seed = f", seed {options['seed']}" if options["seed"] is not None else ""
    click.echo(f"{dataset}  {made.hash[:16]}")
    click.echo(f"tokenizer  {made.tokenizer['name']}, {made.vocab_size:,} tokens")
    click.echo(f"order      {options['order']}{seed}")
    if "text_bytes" in source:  # not if it was converted from a dataset of others
        click.echo(
            f"text       {gb(source['text_bytes'])} in {source['documents']:,} documents "
            f"({source['documents_empty']:,} empty, {source['documents_replaced']:,} repaired)"
        )
    if "converted_from" in source:
        click.echo(f"converted  from {source['converted_from']['format']}")
    for item in source["inputs"]:
        click.echo(f"source     {_printable(item['name'])}  {gb(item['bytes'])}  {item['sha256'][:16]}")
    click.echo(f"\n{'split':<6} {'shards':>7} {'documents':>13} {'tokens':>16}")
    for split in SPLITS:
        shards = made.split(split)
        click.echo(f"{split:<6} {len(shards):>7,} {made.documents(split):>13,} {made.tokens(split):>16,}")


@main.command()
@DATASET
@click.argument("number", metavar="[N]", type=click.IntRange(0), default=0)
@click.option("--split", type=click.Choice(["train", "val"]), default="train", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(dataset: Path, number: int, split: str, as_json: bool) -> None:
    """Print document N, counted from 0, as the model will see it."""
    from gpt2_data.dataset import Dataset
    from gpt2_data.tokenizer import get_tokenizer

    data = Dataset(dataset)
    start, stop = data.document_range(split, number)
    tokens = data.read(split, start, stop).tolist()
    text = get_tokenizer().decode(tokens[1:])
    if as_json:
        facts = {"split": split, "document": number, "start": start, "stop": stop, "tokens": tokens, "text": text}
        click.echo(json.dumps(facts))
        return
    shown = " ".join(map(str, tokens[:12])) + (" ..." if len(tokens) > 12 else "")
    click.echo(f"document {number:,} of {data.num_documents(split):,} in {split}")
    click.echo(f"tokens {start:,} to {stop:,} ({len(tokens):,}): {shown}\n")
    click.echo(text)


@main.command()
@click.option("--quick", is_flag=True, help="Compare less, in half a minute, and keep nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="File of proofs to add to.  [default: in ~/.cache]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def prove(quick: bool, out: Path | None, as_json: bool) -> None:
    """Prove that gigatoken gives tiktoken's tokens.

    Compares the two, as they are installed, on every character and on millions of strings. The result is kept, and
    from then on build takes gigatoken, which is many times as fast; text with a character that the two treat
    differently is left to tiktoken. Versions that this package knows already need no proof.
    """
    from gpt2_data import console
    from gpt2_data import gigatoken as fast
    from gpt2_data.proof import prove as run

    started = time.monotonic()
    with console.bar() as progress:
        result = run(quick, progress)
    file = None if quick else out or fast.user_proofs()
    if file is not None:
        fast.keep_proof(result.proof, file)
    seconds = time.monotonic() - started
    if as_json:
        facts = {**vars(result.proof), "code_points_that_differ": result.code_points_that_differ}
        click.echo(json.dumps({**facts, "bytes": result.bytes, "seconds": seconds, "file": file and str(file)}))
        return
    click.echo(
        f"gigatoken {result.proof.gigatoken} gives the tokens of tiktoken {result.proof.tiktoken} for "
        f"{result.proof.strings:,} strings, {gb(result.bytes)}, all but those with one of "
        f"{result.code_points_that_differ:,} characters; {seconds:.0f} s"
    )
    click.echo(f"kept in {file}" if file else "nothing kept: that takes the whole comparison, without --quick")


@main.command()
@DATASET
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["npy", "llmc", "uint16", "nanogpt", "megatron", "arrow"]),
    help="Format to write; uint16 is another name of llmc.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def convert(dataset: Path, out: Path, to: str, as_json: bool) -> None:
    """Write a dataset in another format; the tokens stay the same, byte for byte.

    DIR is a dataset of ours, or one of build-nanogpt's, llm.c's, nanoGPT's or Megatron's: a folder, or the common
    beginning of a Megatron pair's two names. OUT is a folder that is not there or empty. llmc and arrow are
    datasets of ours; llm.c and modded-nanogpt read llmc too, npy is for build-nanogpt.
    """
    from gpt2_data import console
    from gpt2_data.conversion import convert as run

    with console.bar() as progress:
        result = run(dataset, out, "llmc" if to == "uint16" else to, progress)
    if as_json:
        click.echo(json.dumps({**vars(result), "out": str(out)}))
        return
    click.echo(f"{out}: {result.tokens:,} tokens in {result.files:,} files ({result.format}), {gb(result.bytes)}")
