"""Benchmarks, python tools/bench.py COMMAND: speeds as ratios to peers and to the machine, in the same run."""

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import bench_data
import bench_decode

FEATURES = (
    "avx2",
    "sha_ni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)
LIBRARIES = {
    "decode": ("gpt2-model", "torch", "transformers", "ctranslate2", "numpy"),
    "data": ("gpt2-data", "tiktoken", "gigatoken", "pyarrow", "datasets", "transformers", "tokenizers", "numpy"),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure the packages against their peers and the machine, in the same run."""


@main.command()
@click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="cuda: ms a token in bf16 at batches 1 to 256, and compiled.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(bench_decode.BYTES)),
              help="Only this one; may be given often.  [default: all; on cuda bf16]")  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1),
              help="Only this many rows; may be given often.  [default: 1 and 8]")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a row.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Of each contender.")
@click.option("--model", "fields", multiple=True, metavar="FIELD=N",
              help="Another size than 124M: n_layer=2, n_embd=64, ...")  # fmt: skip
@click.option("--work", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the random model here (1 GB).  [default: a temporary folder]")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
@click.option("--check", is_flag=True, help="Exit 1, a line each, if a bar does not hold (CPU only).")
def decode(
    work: Path | None, out: Path | None, as_json: bool, check: bool, fields: tuple[str, ...], **options: Any
) -> None:
    """Time text generation: ours, transformers, CTranslate2, and the memory that bounds all of them.

    124M with random weights, prompts of 16 tokens, sampling with top-k 50. Contenders take turns, each in a
    process of its own; ratios are those of neighbours in time, and their median is given.
    """
    if check and options["device"] != "cpu":
        raise click.UsageError("--check holds the bars of the CPU: leave -d out")
    settings = bench_decode.Settings(model=_sizes(fields), **options)
    measured = _measured(lambda folder: bench_decode.measure(settings, folder), work)
    document = {"benchmark": "decode", **provenance("decode"), **measured}
    _report(document, bench_decode.table, out, as_json, check)


@main.command()
@click.option("--source", metavar="GLOB", help="Parquet files with a column `text`.  [default: one is made]")
@click.option("--megabytes", type=click.IntRange(min=4), default=100, show_default=True,
              help="Text of the source that is made, of Python's own, again and again.")  # fmt: skip
@click.option("--dataset-megabytes", type=click.IntRange(min=1), default=100, show_default=True,
              help="Tokens, at least, for the loader and verify; of copies of the source.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path),
              help="On the disk to measure; nothing is left there.  [default: a temporary folder]")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
@click.option("--check", is_flag=True, help="Exit 1, a line each, if a bar does not hold.")
def data(work: Path | None, out: Path | None, as_json: bool, check: bool, **options: Any) -> None:
    """Time the way from Parquet to verified shards, the loader, and verify.

    Beside build-nanogpt's method, datasets.map with transformers, the tokenizer libraries alone, and sha256sum.
    Contenders take turns, each in a process of its own, with a process a core; they must write the same tokens.
    """

    def measure(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="gpt2-bench-", dir=folder) as fresh:
            return bench_data.measure(bench_data.Settings(**options), Path(fresh))

    measured = _measured(measure, work)
    document = {"benchmark": "data", **provenance("data"), **measured}
    _report(document, bench_data.table, out, as_json, check)


def _measured(measure: Callable[[Path], dict[str, Any]], work: Path | None) -> dict[str, Any]:
    """What a benchmark finds, in the folder given or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return measure(folder)
        except BrokenProcessPool:
            raise click.ClickException("a contender's process died, of too little memory perhaps") from None
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None


def _report(
    document: dict[str, Any], table: Callable[[dict[str, Any]], str], out: Path | None, as_json: bool, check: bool
) -> None:
    """Show it, keep it, and exit 1 if it is to be checked and a bar does not hold."""
    text = json.dumps(document, indent=2) + "\n"
    if out:
        write(out, text)
    click.echo(text if as_json else table(document), nl=not as_json)
    if check:
        for name, why in document["absent"].items():
            click.echo(f"not checked: {name}: {why}", err=True)
        failed = [bar for bar in document["bars"] if not bar["holds"]]
        for bar in failed:
            click.echo(f"does not hold: {bar['bar']}: {bar['value']:.2f}", err=True)
        sys.exit(1 if failed else 0)


def _sizes(fields: tuple[str, ...]) -> dict[str, int]:
    sizes = {}
    for field in fields:
        name, _, number = field.partition("=")
        if name not in ("n_layer", "n_head", "n_embd", "block_size") or not number.isdecimal():
            raise click.BadParameter(f"{field!r} is not n_layer, n_head, n_embd or block_size = a number",
                                     param_hint="--model")  # fmt: skip
        sizes[name] = int(number)
    return sizes


def provenance(command: str) -> dict[str, Any]:
    """What was run, when, and on what."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES[command]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu = ""
    lines = dict(part.split(":", 1) for part in cpu.splitlines() if ":" in part)
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "versions": versions,
    }


def write(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
