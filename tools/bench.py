"""Benchmarks, python tools/bench.py COMMAND: speeds as ratios to peers and to the machine, in the same run."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import click

import bench_data
import bench_decode
import bench_eval
import bench_suite
from bench_cases import CASES
from bench_report import provenance, write


def _writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Found out before minutes of measuring."""
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path.parent} is not there or cannot be written to")
    return path


def _there(_context: click.Context, _option: click.Parameter, device: str) -> str:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.BadParameter("this torch sees no GPU")
    return device


# What several commands take.
THREADS = click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), help="Of each contender.  "
                       "[default: one a core]")  # fmt: skip
FIELDS = click.option("--model", "fields", multiple=True, metavar="FIELD=N",
              help="Another size than the usual one: n_layer=2, n_embd=64, ...")  # fmt: skip
ROUNDS = click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each.")
SUITE_ROUNDS = click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True,
                            help="Calls of each case.")  # fmt: skip
DEVICE = click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                      callback=_there)  # fmt: skip
ONLY = click.option("--only", multiple=True, metavar="NAME", help="Only what is called so; may be given often.")
PNG = click.option("--png", type=click.Path(dir_okay=False, path_type=Path), callback=_writable,
                   help="Draw it, too.")  # fmt: skip
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results.jsonl"
OUT = click.option("--out", type=click.Path(dir_okay=False, path_type=Path), callback=_writable,
                   help="Write the JSON to a file, too.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure the packages against their peers and the machine, in the same run."""


@main.command()
@click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              callback=_there, help="cuda: ms a token in bf16 at batches 1 to 256, and compiled.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(list(bench_decode.BYTES)),
              help="Only this one; may be given often.  [default: all; on cuda bf16]")  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1),
              help="Only this many rows; may be given often.  [default: 1 and 8]")  # fmt: skip
@ROUNDS
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a row.")
@THREADS
@FIELDS
@click.option("--work", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the random model here (1 GB).  [default: a temporary folder]")  # fmt: skip
@OUT
@JSON
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
    document = _measured("decode", lambda folder: bench_decode.measure(settings, folder), work, options["device"])
    _report(document, bench_decode.table, out, as_json, check)


@main.command()
@click.option("--source", metavar="GLOB", help="Parquet files with a column `text`.  [default: one is made]")
@click.option("--megabytes", type=click.IntRange(min=4), default=100, show_default=True,
              help="Text of the source that is made, of Python's own, again and again.")  # fmt: skip
@click.option("--dataset-megabytes", type=click.IntRange(min=1), default=100, show_default=True,
              help="Tokens, at least, for the loader and verify; of copies of the source.")  # fmt: skip
@ROUNDS
@click.option("--work", type=click.Path(file_okay=False, path_type=Path),
              help="On the disk to measure; nothing is left there.  [default: a temporary folder]")  # fmt: skip
@OUT
@JSON
@click.option("--check", is_flag=True, help="Exit 1, a line each, if a bar does not hold.")
def data(work: Path | None, out: Path | None, as_json: bool, check: bool, **options: Any) -> None:
    """Time the way from Parquet to verified shards, the loader, and verify.

    Beside build-nanogpt's method, datasets.map with transformers, the tokenizer libraries alone, and sha256sum.
    Contenders take turns, each in a process of its own, with a process a core; they must write the same tokens.
    """

    def measure(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="gpt2-bench-", dir=folder) as fresh:
            return bench_data.measure(bench_data.Settings(**options), Path(fresh))

    _report(_measured("data", measure, work), bench_data.table, out, as_json, check)


@main.command("eval")
@click.option("--data", metavar="FILE", help="hellaswag_val.jsonl.  [default: downloaded]")
@click.option("--items", type=click.IntRange(min=1), default=500, show_default=True, help="The first of the file.")
@THREADS
@DEVICE
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--harness-batch", type=click.IntRange(min=1), default=16, show_default=True,
              help="Rows of lm-eval's batch; its own default is 1.")  # fmt: skip
@FIELDS
@click.option("--work", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the random model here (0.5 GB).  [default: a temporary folder]")  # fmt: skip
@OUT
@JSON
@click.option("--check", is_flag=True, help="Exit 1, a line each, if a bar does not hold.")
def eval_(
    work: Path | None, out: Path | None, as_json: bool, check: bool, fields: tuple[str, ...], **options: Any
) -> None:
    """Time HellaSwag: ours, build-nanogpt's method (four rows an item, one item at a time), and lm-eval.

    The same random 124M weights and items; each is a process of its own, and all take turns. The scores must
    be the same.
    """
    settings = bench_eval.Settings(model=_sizes(fields), **options)
    document = _measured("eval", lambda folder: bench_eval.measure(settings, folder), work, options["device"])
    _report(document, bench_eval.table, out, as_json, check)


@main.command()
@click.option("--size", type=click.Choice(["124M", "350M", "774M", "1558M"]), default="124M", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), help="Sequences at once.  [default: 4; cuda 64, 32, 16, 8]")
@click.option("--seq-len", type=click.IntRange(min=2), help="Their tokens.  [default: 256; on cuda 1024]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="[default: fp32; on cuda bf16]")
@DEVICE
@ONLY
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, resolve_path=True),
              help="A clone of nanoGPT, to measure it, too.")  # fmt: skip
@click.option("--build-nanogpt", type=click.Path(exists=True, file_okay=False, resolve_path=True),
              help="A clone of build-nanogpt.")  # fmt: skip
@ROUNDS
@THREADS
@FIELDS
@OUT
@PNG
@JSON
@click.option("--check", is_flag=True, help="Exit 1, a line each, if a bar does not hold.")
def train(
    device: str, size: str, batch: int | None, seq_len: int | None, precision: str | None, fields: tuple[str, ...],
    nanogpt: str | None, build_nanogpt: str | None, only: tuple[str, ...], rounds: int, threads: int,
    out: Path | None, png: Path | None, as_json: bool, check: bool,
) -> None:  # fmt: skip
    """Time training steps: ours, gpt2-train as a whole, transformers, its Trainer, nanoGPT, build-nanogpt.

    First it is compared what they compute. Then each is a process of its own; on a CPU they take turns. On cuda
    there are the rungs of the ladder, too: what each technique gives. --only takes names as the table has them.
    """
    import bench_train
    from bench_steps import Work, refuse_emulation

    on_gpu, repositories = device == "cuda", {"nanoGPT": nanogpt, "build-nanogpt": build_nanogpt}
    work = Work(
        size, batch or (bench_train.GPU_BATCHES[size] if on_gpu else 4), seq_len or (1024 if on_gpu else 256),
        precision or ("bf16" if on_gpu else "fp32"), device, _sizes(fields),
        {name: path for name, path in repositories.items() if path},
    )  # fmt: skip
    if unknown := set(only) - set(bench_train.CONTENDERS):
        raise click.BadParameter(f"{unknown.pop()!r} is none of: {', '.join(bench_train.CONTENDERS)}",
                                 param_hint="--only")  # fmt: skip
    try:
        refuse_emulation(work)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--precision") from None
    settings = bench_train.Settings(work, rounds, threads, only)
    document = _measured("train", lambda folder: bench_train.measure(settings, folder), device=device)
    _report(document, bench_train.table, out, as_json, check, png)


@main.command()
@ROUNDS
@click.option(
    "--steps", type=click.IntRange(min=3), default=7, show_default=True, help="Of a run; two count for nothing."
)
@click.option("--data", metavar="DIR", help="A dataset folder.  [default: one is made]")
@click.option("--grad-compression", type=click.Choice(["none", "bf16"]), default="none", show_default=True)
@FIELDS
@OUT
@JSON
def scaling(fields: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Time two ranks of gpt2-train beside two runs that train alone at the same time, the most they could reach.

    A thread each, gloo, 30M parameters. They take turns, and efficiency is that of neighbours in time.
    """
    import bench_scaling

    usual = bench_scaling.Settings()
    settings = bench_scaling.Settings(model={**usual.model, **_sizes(fields)}, **options)
    document = _measured("scaling", lambda folder: bench_scaling.measure(settings, folder))
    _report(document, bench_scaling.table, out, as_json, False)


@main.command("run")
@ONLY
@DEVICE
@SUITE_ROUNDS
@THREADS
@OUT
@PNG
@JSON
def run_(only: tuple[str, ...], out: Path | None, png: Path | None, as_json: bool, **options: Any) -> None:
    """Time the suite's cases, `bench.py list`, each beside the machine's rate that bounds it, in the same run."""
    _report(_suite(only, **options), bench_suite.run_table, out, as_json, False, png)


@main.command()
@ONLY
@DEVICE
@SUITE_ROUNDS
@THREADS
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True,
              callback=_writable, help="Where a line is appended.")  # fmt: skip
def record(only: tuple[str, ...], to: Path, **options: Any) -> None:
    """Time the suite's cases as `run` does, and append a line to benchmarks/results.jsonl."""
    document = _suite(only, **options)
    click.echo(bench_suite.run_table(document))
    before = to.read_text(encoding="utf-8") if to.exists() else ""
    write(to, before + json.dumps(bench_suite.brief(document)) + "\n")
    click.echo(f"appended to {to}", err=True)


@main.command()
@click.option("--base", required=True, metavar="REV", help="Commit, tag or branch to compare with.")
@ONLY
@DEVICE
@SUITE_ROUNDS
@THREADS
@click.option("--least", type=click.FloatRange(min=0, min_open=True), default=0.9, show_default=True,
              help="Exit 1 if a case has less than this share of the base's speed.")  # fmt: skip
@OUT
@JSON
def compare(
    base: str, only: tuple[str, ...], least: float, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Time the suite's cases with the packages of a commit and with the working tree's, in turn.

    Each case is two processes, and a ratio is that of neighbours in time. The commit is checked out into a
    temporary worktree, which is removed again.
    """
    names, settings = _cases(only, options["device"]), bench_suite.Settings(**options)

    def measure(folder: Path) -> dict[str, Any]:
        return bench_suite.compare(names, base, settings, folder, least)

    _report(_measured("compare", measure, device=options["device"]), bench_suite.compare_table, out, as_json, True)


@main.command("list")
@click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def list_(device: str) -> None:
    """Name the suite's cases."""
    for name in bench_suite.chosen((), device):
        click.echo(f"{name:22} {CASES[name].text}")


def _suite(only: tuple[str, ...], **options: Any) -> dict[str, Any]:
    names, settings = _cases(only, options["device"]), bench_suite.Settings(**options)
    return _measured("suite", lambda folder: bench_suite.run(names, settings, folder), device=options["device"])


def _cases(only: tuple[str, ...], device: str) -> list[str]:
    try:
        return bench_suite.chosen(only, device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from None


def _measured(
    name: str, measure: Callable[[Path], dict[str, Any]], work: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """What a benchmark finds, in the folder given or a temporary one, and where it is from."""
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return {"benchmark": name, **provenance(name, device), **measure(folder)}
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)
        except BrokenProcessPool:
            raise click.ClickException("a contender's process died, of too little memory perhaps") from None
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None


def _report(
    document: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
    out: Path | None,
    as_json: bool,
    check: bool,
    png: Path | None = None,
) -> None:
    """Show it, keep it, and exit 1 if it is to be checked and a bar does not hold."""
    text = json.dumps(document, indent=2) + "\n"
    click.echo(text if as_json else table(document), nl=not as_json)
    if out:
        write(out, text)
    if png:
        from bench_picture import draw

        draw(document, png)
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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind, as at Ctrl-C
    main()
