"""gpt2-data build | tokenizer | verify | info | show | convert.

Nothing heavy is imported at the top, since help must answer at once. Results go to stdout, progress to stderr.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click_option_group import optgroup

from gpt2_data.console import (
    SETTINGS,
    Group,
    UserPath,
    bar,
    format_bytes,
    plural,
    print_json,
    printable,
    size,
    stoppable,
)  # fmt: skip

if TYPE_CHECKING:
    from gpt2_data import BuildConfig, BuildResult

SOURCES_SHOWN = 20  # by `info`; a dataset may have thousands


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(package_name="gpt2-data", prog_name="gpt2-data")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Turn text into verified GPT-2 token shards."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise click.ClickException("gpt2-data runs on Linux and macOS; on Windows use WSL") from None


def _part(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{text!r} is not a part: write 1/4 to 4/4 for four parts")
    return int(match[1]), int(match[2])


def _tokenizer(context: click.Context, parameter: click.Parameter, text: str) -> str:
    from gpt2_data.building.config import LIBRARIES

    if text not in LIBRARIES and not Path(text).exists():
        known = f"{', '.join(LIBRARIES)} or a folder with a tokenizer.json"
        raise click.BadParameter(f"{text!r} is none: name {known}; gpt2-data tokenizer makes one")
    return text


def _separator(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    try:
        return text and text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{text!r}: {error.reason}") from None


def _encoding(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from gpt2_data.sources.opening import check_encoding

    try:
        check_encoding(name or "utf-8")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return name


def _choice(*names: str) -> Any:
    return {"type": click.Choice(names), "default": names[0], "show_default": True}


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
COUNT: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N"}
SIZE: dict[str, Any] = {"type": size, "metavar": "SIZE"}
FOLDER: dict[str, Any] = {"type": UserPath(path_type=Path), "metavar": "DIR"}
DATASET = click.argument("dataset", **FOLDER)


@main.command()
@click.argument("source", nargs=-1, type=UserPath(readable=False))  # completes files; not all are
@optgroup("Source")
@optgroup.option("--column", default="text", show_default=True, help="Column or JSON key that holds the text.")
@optgroup.option("--split-on", metavar="TEXT", callback=_separator,
                 help=r"Split text files into documents at this text, such as '\n\n' (a blank line).")  # fmt: skip
@optgroup.option("--encoding", metavar="NAME", callback=_encoding,
                 help="Encoding of text files without a byte order mark.  [default: utf-8]")  # fmt: skip
@optgroup.option("--limit-docs", **COUNT, help="Take only the first N documents.")
@optgroup.option("--order", type=click.Choice(["shuffled", "source"]),
                 help="Order of the documents; the first ones are validation.  [default: shuffled]")  # fmt: skip
@optgroup.option("--seed", type=int, default=0, show_default=True, help="Seed of --order shuffled.")
@optgroup("Shards")
@optgroup.option("--out", **FOLDER, help="Dataset folder to create.  [default: data/SOURCE]")
@optgroup.option("--shard-size", **SIZE, default="100M", show_default=True, help="Tokens per shard.")
@optgroup.option("--val-tokens", **SIZE,
                 help="Tokens for validation; 0 for none.  [default: 100M, at most a tenth of all]")  # fmt: skip
@optgroup.option("--format", **_choice("uint16", "arrow"), help="Format of the shards: llm.c's, or Arrow.")
@optgroup.option("--compat", type=click.Choice(["build-nanogpt"]), help="Cut and order as its fineweb.py does.")
@optgroup("Work")
@optgroup.option("--workers", **COUNT, help="Number of worker processes.  [default: one per core]")
@optgroup.option("--tokenizer", default="auto", show_default=True, metavar="NAME|DIR", callback=_tokenizer,
                 help="auto, tiktoken or gigatoken (GPT-2's vocabulary), or a tokenizer folder.")  # fmt: skip
@optgroup.option("--engine", **_choice("local", "ray"), help="Run in local processes, or on Ray (RAY_ADDRESS).")
@optgroup.option("--part", metavar="I/N", callback=_part, help="Do part I of N; all N jobs get the same --out.")
@optgroup("Downloads")
@optgroup.option("--downloads", type=UserPath(path_type=Path, file_okay=False), metavar="DIR",
                 help="Folder for downloaded files.  [default: OUT/downloads]")  # fmt: skip
@optgroup.option("--delete-downloads", is_flag=True, help="Delete each downloaded file once it is tokenized.")
@optgroup("Output")
@optgroup.option("--dry-run", is_flag=True, help="Print what would be built, its size and time; build nothing.")
@optgroup.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def build(source: tuple[str, ...], out: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Tokenize SOURCEs into a dataset folder.

    \b
    Each SOURCE is one of
      fineweb-edu                 FineWeb-Edu's sample-10BT: 10 billion tokens (the default)
      fineweb-edu:sample-100BT    another config of it; also fineweb:CONFIG
      hf:REPO[:CONFIG[:SPLIT]]    any dataset on the Hugging Face hub; also hf:REPO@REVISION
      tinyshakespeare             one megabyte of text, for trials
      pydocs                      the text that comes with Python: no download
      a folder                    all files in it and in its subfolders that are of these kinds
      FILES                       files or quoted globs: .parquet .jsonl .ndjson .json .csv .tsv .txt .md .rst
                                  .py and other code; all but .parquet also with .gz .zst .bz2 .xz

    An interrupted build resumes when the same command is run again. The result is the same, byte for byte, for any
    number of workers, parts, machines and interruptions.

    \b
    Example: the files of a folder and its subfolders, in shards of 10 million tokens
      gpt2-data build mytexts --out data/mytexts --shard-size 10M
    """
    from gpt2_data import BuildConfig
    from gpt2_data import build as run
    from gpt2_data.building.estimate import print_plan
    from gpt2_data.sources import catalog, hub

    source = source or ("fineweb-edu",)
    if out is None:
        name = os.path.basename(source[0].rstrip("/")) if os.path.isdir(source[0]) else source[0]
        if len(source) > 1 or not re.fullmatch(r"[\w-]+(:[A-Za-z0-9._-]+)?|hf:[^:]+(:[^:]+)*", name):
            raise click.UsageError("Missing option '--out'.")
        out = Path("data") / re.sub(r"[:/@]+", "-", name.removeprefix("hf:"))
    config = BuildConfig(sources=source, out=out, **options)
    texts: list[str] = []
    for name in source:
        if hub.parse(name) is None:
            taken, others = catalog.find_files(name)
            texts += [path for kind, path in taken if kind == "txt"]
            if os.path.isdir(name):
                counts = f"{name}: {plural(len(taken), 'file')} taken, {len(others):,} passed over"
                click.echo(printable(f"{counts}{_some(others)}"), err=True)
    if dry_run:
        print_plan(config, as_json)
        return
    with stoppable(), bar() as show:
        result = run(config, show)
    _print_result(result, config, as_json, texts)


def _print_result(result: "BuildResult", config: "BuildConfig", as_json: bool, texts: list[str]) -> None:
    if as_json:
        print_json({**vars(result), "out": str(result.out)})
        return
    from gpt2_data.sources import catalog

    what = f"{plural(result.tokens, 'token')} of {plural(result.documents, 'document')}"
    shards = plural(result.shards, "shard")
    how = f"{result.seconds:.1f} s"
    if result.text_mb_per_second:  # 0 where all had been tokenized before
        how += f", {result.text_mb_per_second:.1f} MB/s with {result.tokenizer}"
    if result.already_built:
        click.echo(f"{result.out}: already built: {what} in {shards}")
    elif not result.finished and config.part is not None:
        number, count = config.part
        click.echo(f"{result.out}: part {number} of {count}: {what}; {how}; other parts are not finished yet")
    else:
        click.echo(
            f"{result.out}: {what} in {shards} ({plural(result.val_tokens, 'token')} for validation); {how}"
        )
        if result.documents_empty:
            click.echo(
                f"{plural(result.documents_empty, 'document')} empty: kept as <|endoftext|> alone", err=True
            )
        if result.documents_replaced and not result.replaced_in:
            what = "with half of a surrogate pair, which became U+FFFD"
            click.echo(f"warning: {plural(result.documents_replaced, 'document')} {what}", err=True)
        elif result.documents_replaced:
            what = f"{plural(result.documents_replaced, 'document')} not UTF-8: the invalid bytes became U+FFFD"
            how = "; --encoding NAME, with another --out, reads text files in another encoding"
            click.echo(printable(f"warning: {what}{_some(result.replaced_in)}{how}"), err=True)
        if result.end_marks:
            mark = "<|endoftext|>"
            what = f"{mark} stands {plural(result.end_marks, 'time')} in the text files, and was taken for text"
            how = f"--split-on '{mark}', with another --out, splits them into documents"
            click.echo(f"warning: {what}: {how}", err=True)
        elif config.split_on is not None and not catalog.stands_in(config.split_on, texts, config.encoding):
            what = f"--split-on {config.split_on!r} stands in none of the text files, so each is one document"
            how = r": where all lines end with \r\n, they are read with \n" if "\r" in config.split_on else ""
            click.echo(f"warning: {what}{how}", err=True)
        elif not result.val_tokens and config.val_tokens is None and config.compat is None:
            what = f"nothing is left for validation, which takes whole documents ({result.documents:,} in all)"
            how = "more documents are needed, or --val-tokens 0"
            if texts and config.split_on is None:
                how = r"--split-on '\n\n', with another --out, splits text files at blank lines"
            click.echo(f"warning: {what}: {how}", err=True)


def _some(paths: Sequence[str]) -> str:
    """The first names of a list, and how many more there are, to stand at the end of a message."""
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return f": {', '.join(paths[:3])}{more}" if paths else ""


@main.command()
@click.argument("source", nargs=-1, type=UserPath(readable=False))
@click.option("--vocab-size", **SIZE, required=True, help="Number of all ids; 0 for bytes alone.")
@click.option("--out", **FOLDER, required=True, help="Tokenizer folder to create.")
@click.option("--column", default="text", show_default=True, help="Column or JSON key that holds the text.")
@click.option("--encoding", metavar="NAME", callback=_encoding,
              help="Encoding of text files without a byte order mark.  [default: utf-8]")  # fmt: skip
@click.option(
    "--split-on", metavar="TEXT", callback=_separator, help="Split text files into documents at this text."
)
@click.option("--limit-docs", **COUNT, help="Read only the first N documents.")
@click.option("--downloads", **FOLDER, help="Folder that keeps downloaded files.  [default: delete them]")
@AS_JSON
def tokenizer(source: tuple[str, ...], vocab_size: int, as_json: bool, **options: Any) -> None:
    """Learn a vocabulary of your own from SOURCEs, for build --tokenizer.

    SOURCEs are those of build. The vocabulary is a byte-level BPE with GPT-2's split of text into words: 256
    bytes, the most frequent merges, and <|endoftext|> as the last id. transformers opens the folder, too. The same
    source gives the same files. Words are counted and the text is not kept: memory stays below 3.5 GB for any
    source, since reading ends once there are enough different words.

    \b
    Example: a vocabulary of 32,000 tokens, and a dataset with it
      gpt2-data tokenizer 'greek/*.txt' --vocab-size 32k --out data/greek-bpe
      gpt2-data build 'greek/*.txt' --tokenizer data/greek-bpe --out data/greek
    """
    from gpt2_data import BuildConfig
    from gpt2_data.building.train_tokenizer import train_tokenizer

    if not source and vocab_size:
        raise click.UsageError("Missing argument 'SOURCE...'.")
    config = BuildConfig(sources=source or ("pydocs",), **options)  # bytes alone read no source
    with stoppable(again=""), bar() as show:
        result = train_tokenizer(config, vocab_size, show)
    if result.vocab_size < vocab_size:
        few = f"the text has only {plural(result.merges, 'merge')}: {result.vocab_size:,} ids, not {vocab_size:,}"
        click.echo(f"warning: {few}", err=True)
    if as_json:
        print_json({**vars(result), "out": str(result.out)})
        return
    there = "already there: " if result.already_there else ""
    part = ", which has enough different words" if result.enough else ""
    click.echo(
        f"{result.out}: {there}{result.vocab_size:,} tokens, <|endoftext|> is {result.eot:,}; "
        f"from {format_bytes(result.text_bytes)} of text{part}; {result.seconds:.1f} s"
    )


@main.command()
@DATASET
@click.option(
    "--level", **_choice("fast", "full"), help="fast checks names, sizes and headers; full checks every byte."
)
@AS_JSON
def verify(dataset: Path, level: str, as_json: bool) -> None:
    """Check a dataset's files against its dataset.json."""
    from gpt2_data import verify as check

    report = check(dataset, level)
    files = f"{plural(report.files, 'file')}, {format_bytes(report.bytes)}"
    if as_json:
        print_json({"ok": report.ok, **vars(report)})
    elif report.ok:
        click.echo(f"{dataset}: {files}: nothing wrong ({level})")
    else:
        click.echo("\n".join(report.problems))
    if not report.ok:
        raise click.ClickException(f"{dataset}: {len(report.problems):,} of {report.files:,} files have problems")


@main.command()
@DATASET
@AS_JSON
def info(dataset: Path, as_json: bool) -> None:
    """Describe a dataset: its source, order and splits."""
    from gpt2_data.formats.manifest import SPLITS, load

    manifest = load(dataset)
    if as_json:
        import json

        print_json({"hash": manifest.hash, **json.loads(manifest.to_bytes())})
        return
    options, source = manifest.options, manifest.source
    seed = f", seed {options['seed']}" if options["seed"] is not None else ""
    click.echo(f"{dataset}  {manifest.hash[:16]}")
    click.echo(f"tokenizer  {manifest.tokenizer['name']}, {manifest.vocab_size:,} tokens")
    click.echo(f"order      {options['order']}{seed}")
    if "text_bytes" in source:  # not if it was converted from a dataset of others
        text = f"{format_bytes(source['text_bytes'])} in {plural(source['documents'], 'document')}"
        odd = f"{source['documents_empty']:,} empty, {source['documents_replaced']:,} repaired"
        click.echo(f"text       {text} ({odd})")
    if "converted_from" in source:
        click.echo(f"converted  from {source['converted_from']['format']}")
    inputs = source["inputs"]
    for item in inputs[:SOURCES_SHOWN]:
        click.echo(f"source     {printable(item['name'])}  {format_bytes(item['bytes'])}  {item['sha256'][:16]}")
    if len(inputs) > SOURCES_SHOWN:
        click.echo(f"           and {len(inputs) - SOURCES_SHOWN:,} more: --json lists them all")
    click.echo(f"\n{'split':<6} {'shards':>7} {'documents':>13} {'tokens':>16}")
    for split in SPLITS:
        shards = len(manifest.split(split))
        click.echo(f"{split:<6} {shards:>7,} {manifest.documents(split):>13,} {manifest.tokens(split):>16,}")


@main.command()
@DATASET
@click.argument("number", metavar="[N]", type=click.IntRange(0), default=0)
@click.option("--split", **_choice("train", "val"), help="Split that contains the document.")
@AS_JSON
def show(dataset: Path, number: int, split: str, as_json: bool) -> None:
    """Print document N, counted from 0, as the model will see it."""
    from gpt2_data import Dataset

    data = Dataset(dataset)
    start, stop = data.document_range(split, number)
    tokens = data.read(split, start, stop).tolist()
    text = data.decode([token for token in tokens if token != data.eot])
    if as_json:
        facts = {"split": split, "document": number, "start": start, "stop": stop, "tokens": tokens, "text": text}
        print_json(facts)
        return
    first = " ".join(map(str, tokens[:12])) + (" ..." if len(tokens) > 12 else "")
    click.echo(f"document {number:,} of {data.num_documents(split):,} in {split}")
    click.echo(f"tokens {start:,} to {stop:,} ({len(tokens):,}): {first}\n\n{text}")


@main.command()
@DATASET
@click.argument("out", type=UserPath(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["npy", "llmc", "uint16", "nanogpt", "megatron", "arrow"]),
    help="Format to write; uint16 is another name for llmc.",
)
@AS_JSON
def convert(dataset: Path, out: Path, to: str, as_json: bool) -> None:
    """Write a dataset in another format; its documents stay the same.

    DIR is a dataset of gpt2-data, build-nanogpt, llm.c, nanoGPT or Megatron: a folder, or the common
    beginning of a Megatron pair's two names. OUT must be empty or not exist yet. llmc and arrow are
    gpt2-data's own formats; llm.c and modded-nanogpt also read llmc, build-nanogpt reads npy. A tokenizer.json
    goes with the tokens, and is read with them.
    """
    from gpt2_data import convert as run

    with bar() as progress:
        result = run(dataset, out, "llmc" if to == "uint16" else to, progress)
    if as_json:
        print_json({**vars(result), "out": str(out)})
        return
    files = f"{plural(result.files, 'file')} ({result.format})"
    click.echo(f"{out}: {plural(result.tokens, 'token')} in {files}, {format_bytes(result.bytes)}")
