"""gpt2-data build | verify | info | show | convert.

Nothing heavy is imported here at the top: help must answer at once. Results go to stdout, progress to stderr.
"""

import errno
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gpt2_data.build import BuildResult, Progress
    from gpt2_data.plan import BuildConfig

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_DATA"}
SECONDS_BETWEEN_LINES = 10.0


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
        return f"{where}{error.strerror}{full}"
    return " ".join(str(error).split())


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(package_name="gpt2-data", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Text to verified GPT-2 token shards."""


@main.command()
@click.argument("source", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make.  [default: data/SOURCE]")
@click.option("--shard-size", type=size, metavar="SIZE", default="100M", show_default=True, help="Tokens a shard.")
@click.option(
    "--val-tokens",
    type=size,
    metavar="SIZE",
    default="100M",
    show_default=True,
    help="Tokens for validation; 0 for none.",
)
@click.option(
    "--format",
    type=click.Choice(["uint16", "arrow"]),
    default="uint16",
    show_default=True,
    help="Format of shards.",
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes.  [default: one a core]")
@click.option(
    "--tokenizer",
    type=click.Choice(["auto", "tiktoken"]),
    default="auto",
    show_default=True,
    help="Tokenizer library; the tokens are the same.",
)
@click.option(
    "--order",
    type=click.Choice(["source", "shuffled"]),
    default="source",
    show_default=True,
    help="Order of the documents.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --order shuffled.")
@click.option("--engine", type=click.Choice(["local"]), default="local", show_default=True, help="Where to run.")
@click.option(
    "--limit-docs", type=click.IntRange(1), metavar="N", help="Only the first N documents of the source."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be built.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def build(source: tuple[str, ...], out: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Tokenize SOURCEs into a dataset folder.

    SOURCE is pydocs (the text that comes with Python), or a file or a quoted glob of .parquet, .jsonl, .jsonl.gz,
    .jsonl.zst, .txt or .txt.gz. Parquet needs a column `text`, JSON lines a key `text`; a text file is a document.

    An interrupted build goes on when the same command is run again. The result is the same, byte for byte, for any
    number of workers and interruptions.
    """
    from gpt2_data.plan import BuildConfig
    from gpt2_data.sources import KNOWN

    if not source:
        raise click.UsageError(f"Missing argument 'SOURCE': known are {KNOWN}.")
    if out is None:
        if source != ("pydocs",):
            raise click.UsageError("Missing option '--out'.")
        out = Path("data") / source[0]
    config = BuildConfig(sources=source, out=out, **options)
    if dry_run:
        _print_plan(config, as_json)
        return
    from gpt2_data.build import build as run

    with _progress() as progress:
        result = run(config, progress)
    _print_result(result, as_json)


def _print_plan(config: "BuildConfig", as_json: bool) -> None:
    import shutil

    from gpt2_data.plan import estimate, make_plan

    plan = make_plan(config)
    guess = estimate(plan)
    folder = next(path for path in (config.out.absolute(), *config.out.absolute().parents) if path.exists())
    facts: dict[str, Any] = {
        "files": sum(item.kind != "pydocs" for item in plan.inputs),
        "units": len(plan.units),
        "documents": guess.documents,
        "tokens": guess.tokens,
        "tokens_estimated": not guess.counted,
        "shards": guess.shards(config),
        "bytes": guess.dataset_bytes(),
        "bytes_while_building": guess.peak_bytes(),
        "bytes_free": shutil.disk_usage(folder).free,
        "out": str(config.out),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    about = "" if guess.counted else "about "
    click.echo(f"files      {facts['files']:,}, in {facts['units']:,} work units")
    click.echo(f"documents  {about}{guess.documents:,}")
    click.echo(f"tokens     {about}{guess.tokens:,} ({'counted in the source' if guess.counted else 'estimate'})")
    click.echo(f"shards     {about}{facts['shards']:,} of {config.shard_size:,} tokens")
    click.echo(
        f"disk       {_gb(facts['bytes'])}, {_gb(facts['bytes_while_building'])} while building; "
        f"{_gb(facts['bytes_free'])} free"
    )
    click.echo(f"out        {config.out}")


def _print_result(result: "BuildResult", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**vars(result), "out": str(result.out)}))
        return
    if result.already_built:
        click.echo(f"{result.out}: already built: {result.tokens:,} tokens in {result.shards:,} shards")
        return
    click.echo(
        f"{result.out}: {result.tokens:,} tokens of {result.documents:,} documents in {result.shards:,} shards "
        f"({result.val_tokens:,} for validation); {result.seconds:.1f} s, {result.text_mb_per_second:.1f} MB/s"
    )
    for count, what in (
        (result.documents_empty, "empty: skipped"),
        (result.documents_replaced, "not UTF-8: repaired"),
    ):
        if count:
            click.echo(f"{count:,} documents {what}", err=True)


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on a terminal, a line every ten seconds elsewhere; on stderr."""
    from tqdm import tqdm

    bar: Any = None
    shown = ""
    last_line = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal bar, shown, last_line
        if sys.stderr.isatty():
            if what != shown:
                if bar is not None:
                    bar.close()
                unit = {"writing": " tokens", "comparing": " strings"}.get(what, "B")
                bar = tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, file=sys.stderr)
                shown = what
            bar.update(done - bar.n)
        elif time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            click.echo(f"{what}: {100 * done / max(total, 1):.0f}% of {total:,}", err=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


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
    from gpt2_data.manifest import verify as check

    report = check(dataset, level)
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **vars(report)}))
    elif report.ok:
        click.echo(f"{dataset}: {report.files:,} files, {_gb(report.bytes)}: nothing wrong ({level})")
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
    from gpt2_data.manifest import SPLITS, load

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
            f"text       {_gb(source['text_bytes'])} in {source['documents']:,} documents "
            f"({source['documents_empty']:,} empty, {source['documents_replaced']:,} repaired)"
        )
    if "converted_from" in source:
        click.echo(f"converted  from {source['converted_from']['format']}")
    for item in source["inputs"]:
        click.echo(f"source     {item['name']}  {_gb(item['bytes'])}  {item['sha256'][:16]}")
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
@click.option("--quick", is_flag=True, help="Compare less, in a quarter of a minute, and keep nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="File of proofs to add to.  [default: in ~/.cache]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def prove(quick: bool, out: Path | None, as_json: bool) -> None:
    """Prove that gigatoken gives tiktoken's tokens.

    Compares the two, as they are installed, on every character and on millions of strings. The result is kept, and
    from then on build takes gigatoken, which is many times as fast; text with a character that the two treat
    differently is left to tiktoken. Versions that this package knows already need no proof.
    """
    from gpt2_data import fast
    from gpt2_data.proof import prove as run

    started = time.monotonic()
    with _progress() as progress:
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
        f"{result.proof.strings:,} strings, {_gb(result.bytes)}, all but those with one of "
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
    from gpt2_data.convert import convert as run

    with _progress() as progress:
        result = run(dataset, out, "llmc" if to == "uint16" else to, progress)
    if as_json:
        click.echo(json.dumps({**vars(result), "out": str(out)}))
        return
    click.echo(f"{out}: {result.tokens:,} tokens in {result.files:,} files ({result.format}), {_gb(result.bytes)}")


def _gb(size: int) -> str:
    for unit, factor in ("GB", 1e9), ("MB", 1e6), ("kB", 1e3):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
