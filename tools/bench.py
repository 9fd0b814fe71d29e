"""Benchmarks, python tools/bench.py COMMAND: they compare speeds with peers and the machine in the same run."""

import fnmatch
import glob
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, TextIO

import click

from benchmarks import harness
from benchmarks.harness import ROOT, Bench, Case
from benchmarks.report import Check, bars_of, brief, provenance, table
from benchmarks.suite import CASES, work_of
from gpt2_model.command import SETTINGS, one_line

# Tokens per second on an H100: for 124M, 1.3 times llm.c's published 468,000; for 350M, half of the maker's 989
# TFLOP/s; for the largest two, 0.55 of it. Operations are counted as in llm.c.
H100_TOKENS = {"124M": 616_000, "350M": 216_893, "774M": 110_396, "1558M": 55_407}


def _fields(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (word.split("=") for word in words)}
    except ValueError:
        raise click.BadParameter("give a field of the model and its number: n_layer=2") from None


CLONE = click.Path(exists=True, file_okay=False, resolve_path=True)
COUNT = click.IntRange(min=1)
SUITE = [[case] for case in CASES]
DEVICE = click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                      help="Device to measure.")  # fmt: skip
FIELDS = click.option("--model", "fields", multiple=True, metavar="FIELD=N", callback=_fields,
                      help="Change a field of the model's shape: n_layer=2, n_embd=64, ...")  # fmt: skip
CHECK = click.option("--check", is_flag=True, help="Name each required ratio that is missed, and exit with 1.")


def measuring(rounds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of every command that measures."""
    only = click.option("--only", multiple=True, metavar="NAME", help="Time only cases of this name or prefix.")
    samples = click.option("--rounds", type=COUNT, default=rounds, show_default=True, help="Samples of each case.")
    threads = click.option("--threads", type=COUNT, default=os.cpu_count(),
                           help="Threads of each case.  [default: all cores]")  # fmt: skip
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
    return lambda command: only(DEVICE(samples(threads(as_json(command)))))


def contender(name: str, unit: str, prepare: str, **options: Any) -> Case:
    """Return a case that takes turns with others."""
    return Case(name, "", unit, f"benchmarks.{prepare}", options)


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Measure the packages against their peers and the machine, in the same run."""


@main.command("list")
@DEVICE
def list_(device: str) -> None:
    """List the cases of `run`, `record` and `compare`."""
    for case in CASES:
        if device in case.devices:
            click.echo(f"{case.name:22} {case.text}")


@main.command("run")
@measuring(5)
def run_(**options: Any) -> None:
    """Time the suite's cases beside the machine's own limits."""
    measure("run", "the suite, each case alone", SUITE, **options)


@main.command()
@measuring(5)
@click.option("--to", type=click.File("a"), default=ROOT / "benchmarks" / "results.jsonl",
              help="File to append a line to.  [default: benchmarks/results.jsonl]")  # fmt: skip
def record(to: TextIO, **options: Any) -> None:
    """Time the suite's cases as `run` does, and save the medians."""
    document = measure("run", "the suite, each case alone", SUITE, **options)
    to.write(json.dumps(brief(document)) + "\n")
    click.echo(f"appended to {to.name}", err=True)


@main.command()
@click.option("--base", required=True, metavar="REV", help="Commit, tag or branch to compare with.")
@click.option("--least", type=click.FloatRange(min=0, min_open=True), default=0.9, show_default=True,
              help="Exit with 1 if a case has less than this share of the base's speed.")  # fmt: skip
@measuring(5)
def compare(base: str, least: float, **options: Any) -> None:
    """Compare the suite's cases with another commit's packages.

    Two processes take turns at each case, one with REV's packages and one with the working tree's. Ratios compare
    neighbouring samples. REV is checked out into a temporary worktree, which is removed at the end.
    """
    timed = partial(harness.compare, base=base, least=least)
    measure("compare", f"this tree beside {base}", SUITE, timed=timed, check=True, **options)


@main.command()
@click.option("--size", type=click.Choice(list(H100_TOKENS)), default="124M", show_default=True, help="Model.")
@click.option("--batch", type=COUNT, help="Sequences in a micro-batch.  [default: 4; cuda 64, 32, 16, 8]")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens in each sequence.  [default: 256; cuda 1024]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision.  [default: fp32; cuda bf16]")
@click.option("--nanogpt", type=CLONE, help="Folder of a nanoGPT clone, to measure it too.")
@click.option("--build-nanogpt", type=CLONE, help="Folder of a build-nanogpt clone, to measure it too.")
@FIELDS
@CHECK
@measuring(3)
def train(
    size: str, batch: int | None, seq_len: int | None, precision: str | None, nanogpt: str | None,
    build_nanogpt: str | None, fields: dict[str, int], device: str, **options: Any,
) -> None:  # fmt: skip
    """Time training steps: ours, transformers and clones.

    Cases: our step, gpt2-train as a whole, transformers, nanoGPT and build-nanogpt. On a CPU they take turns;
    on a GPU, whose speed does not drift, one is timed after the other.
    """
    on_gpu = device == "cuda"
    usual = ({"124M": 64, "350M": 32, "774M": 16, "1558M": 8}[size], 1024, "bf16")  # what fits in 80 GB
    usual = usual if on_gpu else (4, 256, "fp32")
    batch, seq_len, precision = batch or usual[0], seq_len or usual[1], precision or usual[2]
    work = work_of(size, batch, seq_len, precision, device, fields)
    case = partial(contender, unit="tokens", work=work)
    contenders = [
        case("ours", prepare="cases.training"),
        case("ours, compiled", prepare="cases.training", compiled=True),
        case("gpt2-train", prepare="cases.gpt2_train", steps=16 if on_gpu else 8),
        case("transformers", prepare="peers.transformers_training"),
        case("transformers, compiled", prepare="peers.transformers_training", compiled=True),
    ]
    clones = {name: folder for name, folder in (("nanoGPT", nanogpt), ("build-nanogpt", build_nanogpt)) if folder}
    contenders += [case(name, prepare="peers.karpathy", clone=name, folder=clones[name]) for name in clones]
    checks: list[Check] = []
    if on_gpu and (seq_len, precision, fields) == (1024, "bf16", {}):
        checks = [("gpt2-train", "ours, compiled", 0.98), ("gpt2-train", "", H100_TOKENS[size])]
        checks += [("gpt2-train", name, 1.5) for name in clones]
    elif not on_gpu and (size, batch * seq_len, fields) == ("124M", 1024, {}):
        least = 1.3 if precision == "bf16" else 1.2
        checks = [("ours, compiled", peer, least) for peer in ("transformers", "transformers, compiled")]
    groups = [[one] for one in contenders] if on_gpu else [contenders]
    title = f"GPT-2 {size} {fields or ''}, {batch} x {seq_len} tokens at once, {precision}"
    measure("train", title, groups, checks, device=device, **options)


@main.command()
@FIELDS
@CHECK
@measuring(3)
def decode(fields: dict[str, int], device: str, **options: Any) -> None:
    """Time text generation: ours, transformers, CTranslate2.

    Each prompt has 16 tokens, and 1 or 128 new ones are generated; the speed of memory limits every case.
    --only "* bf16 x1*" selects a precision and a number of rows.
    """
    on_gpu, new_tokens = device == "cuda", min(128, fields.get("block_size", 1024) - 16)
    groups, checks = list[list[Case]](), list[Check]()
    precisions = ("bf16",) if on_gpu else ("fp32", "bf16", "int8")
    batches = (1, 8, 32, 128, 256) if on_gpu else (1, 8)
    for precision, rows, count in product(precisions, batches, (new_tokens, 1)):
        where = f" {precision} x{rows}" + (", first" if count == 1 else "")
        case = partial(contender, unit="tokens", precision=precision, rows=rows, new_tokens=count, fields=fields)
        groups.append([
            case("ours" + where, prepare="cases.generating"),
            case("transformers" + where, prepare="peers.transformers_generating"),
            case("ours, compiled" + where, prepare="cases.generating", compiled=True) if on_gpu
            else case("ctranslate2" + where, prepare="peers.ctranslate2"),
        ])  # fmt: skip
        least = 1 / 1.1 if count == 1 else 2.5 if (precision, rows) == ("bf16", 1) else 1.0
        checks.append((f"ours{where}", f"transformers{where}", least))
        checks += [(f"ours{where}", f"ctranslate2{where}", 1.0)] if count > 1 else []
    title = f"GPT-2 {fields or '124M'}, random weights, prompts of 16 tokens"
    measure("decode", title, groups, [] if on_gpu else checks, device=device, **options)


@main.command("eval")
@click.option("--data", metavar="FILE", default="", help="Path of hellaswag_val.jsonl.  [default: downloaded]")
@click.option("--items", type=COUNT, default=500, show_default=True, help="Items to take from the file's start.")
@FIELDS
@CHECK
@measuring(3)
def eval_(data: str, items: int, fields: dict[str, int], device: str, **options: Any) -> None:
    """Time HellaSwag: ours, build-nanogpt's method, lm-eval.

    build-nanogpt's method scores one item at a time, in four rows. All cases use the same random 124M weights and
    the same items, in fp32 (bf16 on a GPU); their scores must agree.
    """
    case = partial(contender, unit="items", prepare="peers.hellaswag", data=data, count=items, fields=fields)
    groups = [
        [case("ours, karpathy", method="karpathy"), case("build-nanogpt's method", method="build-nanogpt")],
        [case("ours, lm-eval", method="lm-eval"), case("lm-evaluation-harness", method="harness")],
    ]
    checks = [("ours, karpathy", "build-nanogpt's method", 3), ("ours, lm-eval", "lm-evaluation-harness", 2)]
    title = f"HellaSwag, GPT-2 {fields or '124M'}, random weights"
    timed = partial(harness.measure, tolerance=0.02 if device == "cpu" else 20.0)
    measure("eval", title, groups, checks, timed, device=device, **options)


@main.command("data")
@click.option("--source", metavar="GLOB", default="",
              help="Parquet files with a column `text`.  [default: generated]")  # fmt: skip
@click.option("--megabytes", type=click.IntRange(min=4), default=100, show_default=True,
              help="Size of the generated source: Python's own sources, repeated.")  # fmt: skip
@CHECK
@measuring(3)
def data_(source: str, megabytes: int, threads: int, **options: Any) -> None:
    """Time building datasets, loading batches and verifying.

    Datasets are built from Parquet with one process per core, by ours and by build-nanogpt's method, and must have
    the same tokens. Verifying is compared with sha256sum.
    """
    from benchmarks.data import write_corpus  # imports numpy, which `--help` does not need

    files = sorted(glob.glob(source, recursive=True)) if source else [write_corpus(temporary_folder(), megabytes)]
    if not files:
        raise click.BadParameter(f"no file matches {source!r}", param_hint="--source")
    case = partial(contender, unit="MB", files=files)
    # A pool with one process per core, and one with as many as build-nanogpt itself uses.
    pools = {"build-nanogpt's method": threads, "build-nanogpt's, half": max(1, threads // 2)}
    least = {"gigatoken": 8.0, "tiktoken": 1.3}
    groups = [
        [
            *(case(f"ours, {library}", prepare="data.building", library=library) for library in least),
            *(case(name, prepare="data.building_as_nanogpt", workers=pools[name]) for name in pools),
        ],
        [case("loader", unit="tokens", prepare="data.loading")],
        [case(name, unit="bytes", prepare="data.verifying", program=name) for name in ("gpt2-data", "sha256sum")],
    ]
    checks = [(f"ours, {library}", pool, least[library]) for library in least for pool in pools]
    checks += [("loader", "", 150e6), ("gpt2-data", "sha256sum", 1 / 1.3)]
    measure("data", source or f"{megabytes} MB of Python sources", groups, checks, threads=threads, **options)


@main.command()
@FIELDS
@measuring(3)
def scaling(fields: dict[str, int], **options: Any) -> None:
    """Time two ranks of gpt2-train beside two independent runs.

    The independent runs train at the same time and are the upper limit. Each process has one thread. The model has
    30M parameters, a step has one or four micro-batches of 2 x 256 tokens, and the ranks use gloo.
    """
    shape = {"n_layer": 6, "n_head": 6, "n_embd": 384, **fields}
    groups = []
    for n in (1, 4):
        work = work_of("124M", 2, 256, "fp32", "cpu", shape) | {"accumulation": n}
        case = partial(contender, unit="tokens", prepare="cases.gpt2_train", steps=7, work=work)
        groups.append([case(f"two alone, x{n}", copies=2), case(f"two ranks, x{n}", ranks=2)])
    measure("scaling", f"GPT-2 {shape}", groups, **options | {"threads": 1})


def temporary_folder() -> str:
    """Return a folder that is removed when the command ends."""
    return click.get_current_context().with_resource(tempfile.TemporaryDirectory(prefix="gpt2-bench-"))


def measure(
    name: str, title: str, groups: Sequence[Sequence[Case]], checks: Sequence[Check] = (),
    timed: Callable[..., dict[str, Any]] = harness.measure, *,
    only: tuple[str, ...], device: str, rounds: int, threads: int, as_json: bool, check: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure groups of cases and print the results; exit 1 if `check` is set and a bar does not hold."""
    chosen, bench = choose(groups, only, device), Bench(temporary_folder(), threads, device, rounds)
    try:
        results = timed(chosen, bench)
        document = {"benchmark": name, "title": title, **provenance(device), "bars": [], **results}
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(130)
    except (ValueError, OSError) as error:
        raise click.ClickException(one_line(error)) from None
    document["bars"] += bars_of(checks, document["results"])
    click.echo(json.dumps(document, indent=2) if as_json else table(document))
    failed = [bar for bar in document["bars"] if check and not bar["holds"]]
    for bar in failed:
        click.echo(f"does not hold: {bar['bar']}: {bar['value']:.2f}", err=True)
    if failed:
        sys.exit(1)
    return document


def choose(groups: Sequence[Sequence[Case]], patterns: Sequence[str], device: str) -> list[list[Case]]:
    """Return the device's cases whose name matches, or else begins with, a pattern; all if there is none."""
    if device == "cuda":
        import torch  # takes two seconds, which `--help` should not

        if not torch.cuda.is_available():
            raise click.BadParameter("this torch sees no GPU: use cpu", param_hint="--device")
    names = [case.name for group in groups for case in group if device in case.devices]
    chosen = set[str]() if patterns else {*names}
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern) or fnmatch.filter(names, f"{pattern}*")
        if not matching:
            message = f"no case is called {pattern!r} on {device}: there are {'; '.join(names)}"
            raise click.BadParameter(message, param_hint="--only")
        chosen |= {*matching}
    of_groups = [[case for case in group if case.name in chosen] for group in groups]
    return [group for group in of_groups if group]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind, as at Ctrl-C
    main()
