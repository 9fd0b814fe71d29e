"""Benchmarks, python tools/bench.py COMMAND: speeds as ratios to peers and to the machine, in the same run."""

import fnmatch
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import cases, data, harness, peers
from benchmarks.cases import CASES, FIRST_TOKEN, starting
from benchmarks.harness import Bench, Case, Ready
from benchmarks.report import Check, bars_of, brief, draw, provenance, table
from gpt2_model.command import SETTINGS, one_line, write_whole

Document = dict[str, Any]
RESULTS = harness.ROOT / "benchmarks" / "results.jsonl"
# Tokens a second on an H100: of 124M 1.3 times llm.c's published 468,000, of larger ones half of the maker's 989
# TFLOP/s, and of the largest two 0.55 of it, as llm.c counts operations.
H100_TOKENS = {"124M": 616_000, "350M": 216_893, "774M": 110_396, "1558M": 55_407}


def _writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before minutes of measuring."""
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path.parent} does not exist or cannot be written to")
    return path


def _fields(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (word.split("=") for word in words)}
    except ValueError:
        raise click.BadParameter("give a field of the model and its number: n_layer=2") from None


FILE = click.Path(dir_okay=False, path_type=Path)
CLONE = click.Path(exists=True, file_okay=False, resolve_path=True)
COUNT = click.IntRange(min=1)
DEVICE = click.option(
    "-d",
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device to measure.",
)
FIELDS = click.option("--model", "fields", multiple=True, metavar="FIELD=N", callback=_fields,
                      help="Change a field of the model's shape: n_layer=2, n_embd=64, ...")  # fmt: skip
CHECK = click.option("--check", is_flag=True, help="Exit 1 if a required ratio is missed, with a line for each.")


def measuring(rounds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of every command that measures."""
    options = [
        click.option("--only", multiple=True, metavar="NAME", help="Run only cases of this name; repeatable."),
        DEVICE,
        click.option("--rounds", type=COUNT, default=rounds, show_default=True, help="Samples of each case."),
        click.option(
            "--threads", type=COUNT, default=os.cpu_count(), help="Threads of each.  [default: all cores]"
        ),
        click.option("--out", type=FILE, callback=_writable, help="Also write the JSON to this file."),
        click.option("--png", type=FILE, callback=_writable, help="Also draw the results into this file."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table."),
    ]
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


def contender(name: str, unit: str, prepare: Callable[..., Ready], **options: Any) -> Case:
    """A case that takes turns with others."""
    return Case(name, prepare.__name__.replace("_", " "), unit, prepare, options)


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Measure the packages against their peers and the machine, in the same run."""


@main.command("list")
@DEVICE
def list_(device: str) -> None:
    """List the suite's cases."""
    for case in CASES:
        if device in case.devices:
            click.echo(f"{case.name:22} {case.text}")


def measure_suite(name: str = "run", title: str = "the suite, each case alone", **options: Any) -> Document:
    """Measure the suite's cases, each a group of its own."""
    return measure(name, title, [[case] for case in CASES], **options)


@main.command("run")
@measuring(5)
def run_(**options: Any) -> None:
    """Time the suite's cases, each beside the machine's own limit for it, in the same run."""
    measure_suite(**options)


@main.command()
@measuring(5)
@click.option("--to", type=FILE, default=RESULTS, show_default=True, callback=_writable, help="File to append to.")
def record(to: Path, **options: Any) -> None:
    """Time the suite's cases as `run` does, and append a line to benchmarks/results.jsonl."""
    line = json.dumps(brief(measure_suite(**options)))
    before = to.read_bytes() if to.exists() else b""
    with write_whole(to) as file:
        file.write(before + line.encode() + b"\n")
    click.echo(f"appended to {to}", err=True)


@main.command()
@click.option("--base", required=True, metavar="REV", help="Commit, tag or branch to compare with.")
@click.option("--least", type=click.FloatRange(min=0, min_open=True), default=0.9, show_default=True,
              help="Exit 1 if a case has less than this share of the base's speed.")  # fmt: skip
@measuring(5)
def compare(base: str, least: float, **options: Any) -> None:
    """Time the suite's cases with a commit's packages and with the working tree's, in turns.

    Each case is two processes in turns; ratios are of neighbouring samples. The commit is checked out into a
    temporary worktree, which is removed again.
    """
    measure_suite("compare", f"this tree beside {base}", base=base, least=least, check=True, **options)


@main.command()
@click.option("--size", type=click.Choice(list(H100_TOKENS)), default="124M", show_default=True, help="Model.")
@click.option("--batch", type=COUNT, help="Sequences of a micro-batch.  [default: 4; cuda 64, 32, 16, 8]")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens of each sequence.  [default: 256; cuda 1024]")
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
    """Time training steps: ours, gpt2-train as a whole, transformers, nanoGPT, build-nanogpt.

    On a CPU all take turns; on a GPU, which does not drift, one is timed after the other.
    """
    on_gpu = device == "cuda"
    usual = ({"124M": 64, "350M": 32, "774M": 16, "1558M": 8}[size], 1024, "bf16")  # what 80 GB hold
    usual = usual if on_gpu else (4, 256, "fp32")
    batch, seq_len, precision = batch or usual[0], seq_len or usual[1], precision or usual[2]
    work = {"size": size, "batch": batch, "seq_len": seq_len, "precision": precision, "fields": fields}
    clones = {"nanoGPT": nanogpt, "build-nanogpt": build_nanogpt}
    case = partial(contender, unit="tokens", work=work)
    contenders = [
        case("ours", prepare=cases.training),
        case("ours, compiled", prepare=cases.training, compiled=True),
        case("gpt2-train", prepare=cases.gpt2_train, steps=16 if on_gpu else 8),
        case("matrix products alone", prepare=peers.products),
        case("transformers", prepare=peers.transformers_training),
        case("transformers, compiled", prepare=peers.transformers_training, compiled=True),
        *(case(name, prepare=peers.karpathy, clone=name, folder=clones[name]) for name in clones if clones[name]),
    ]
    ours, theirs, checks = ("ours", "ours, compiled"), ("transformers", "transformers, compiled"), []
    if on_gpu and (seq_len, precision, fields) == (1024, "bf16", {}):
        checks = [Check(("gpt2-train",), ("ours, compiled",), 0.98), Check(("gpt2-train",), (), H100_TOKENS[size])]
        checks += [Check(("gpt2-train",), (name,), 1.5) for name in clones]
    elif not on_gpu and (size, batch * seq_len, fields) == ("124M", 1024, {}):
        checks = [Check(ours, theirs, 1.3 if precision == "bf16" else 1.2)]
        checks += [Check(ours, ("matrix products alone",), 0.87)] if precision == "bf16" else []
    groups = [[one] for one in contenders] if on_gpu else [contenders]
    title = f"GPT-2 {size} {fields or ''}, {batch} x {seq_len} tokens at once, {precision}"
    measure("train", title, groups, checks, device=device, **options)


@main.command()
@FIELDS
@CHECK
@measuring(3)
def decode(fields: dict[str, int], device: str, **options: Any) -> None:
    """Time text generation: ours, transformers, CTranslate2, and the memory that bounds all of them.

    Prompts have 16 tokens; 128 are generated. Timed are the first token, the later ones, and `gpt2-model generate`
    from its start to its first token. --only "* bf16 x1*" selects a precision and a number of rows.
    """
    on_gpu, new_tokens = device == "cuda", min(128, fields.get("block_size", 1024) - 16)
    groups, checks = [], []
    for precision, rows, count in product(
        ("bf16",) if on_gpu else tuple(cases.BYTES), (1, 8, 32, 128, 256) if on_gpu else (1, 8), (new_tokens, 1)
    ):
        where = f" {precision} x{rows}" + (", first" if count == 1 else "")
        case = partial(contender, unit="tokens", precision=precision, rows=rows, new_tokens=count, fields=fields)
        groups.append([
            case("ours" + where, prepare=cases.generating),
            case("transformers" + where, prepare=peers.transformers_generating),
            case("ours, compiled" + where, prepare=cases.generating, compiled=True) if on_gpu
            else case("ctranslate2" + where, prepare=peers.ctranslate2),
        ])  # fmt: skip
        least = 1 / 1.1 if count == 1 else 2.5 if (precision, rows) == ("bf16", 1) else 1.0
        checks.append(Check((f"ours{where}",), (f"transformers{where}",), least))
        checks += [Check((f"ours{where}",), (f"ctranslate2{where}",), 1.0)] if count > 1 else []
    groups.append([starting("start to first token", FIRST_TOKEN, fields)])
    checks.append(Check(("start to first token",), (), 1 / 3))
    title = f"GPT-2 {fields or '124M'}, random weights, prompts of 16 tokens"
    measure("decode", title, groups, [] if on_gpu else checks, device=device, **options)


@main.command("eval")
@click.option("--data", metavar="FILE", default="", help="hellaswag_val.jsonl.  [default: downloaded]")
@click.option("--items", type=COUNT, default=500, show_default=True, help="Items to take from the file's start.")
@FIELDS
@CHECK
@measuring(3)
def eval_(data: str, items: int, fields: dict[str, int], device: str, **options: Any) -> None:
    """Time HellaSwag: ours, build-nanogpt's method (four rows an item, one item at a time), and lm-eval.

    All use the same random 124M weights and items, in fp32 (bf16 on a GPU); their scores must agree.
    """
    case = partial(contender, unit="items", prepare=peers.hellaswag, data=data, count=items, fields=fields)
    groups = [
        [case("ours, karpathy", method="karpathy"), case("build-nanogpt's method", method="build-nanogpt")],
        [case("ours, lm-eval", method="lm-eval"), case("lm-evaluation-harness", method="harness")],
    ]
    checks = [Check((ours.name,), (peer.name,), least) for (ours, peer), least in zip(groups, (3, 2), strict=True)]
    title, tolerance = f"HellaSwag, GPT-2 {fields or '124M'}, random weights", 0.02 if device == "cpu" else 20.0
    measure("eval", title, groups, checks, tolerance=tolerance, device=device, **options)


@main.command("data")
@click.option(
    "--source", metavar="GLOB", default="", help="Parquet files with a column `text`.  [default: generated]"
)
@click.option("--megabytes", type=click.IntRange(min=4), default=100, show_default=True,
              help="Size of the generated source: Python's own sources, repeated.")  # fmt: skip
@CHECK
@measuring(3)
def data_(source: str, megabytes: int, threads: int, **options: Any) -> None:
    """Time building from Parquet, loading batches and verifying, with one process per core.

    The peers are build-nanogpt's method and sha256sum. All builds must write the same tokens.
    """
    case, half = partial(contender, source=source, megabytes=megabytes), max(1, threads // 2)
    groups = [
        [
            case("ours, gigatoken", "MB", data.building, library="gigatoken"),
            case("ours, gigatoken, verified", "MB", data.building, library="gigatoken", verified=True),
            case("ours, tiktoken", "MB", data.building, library="tiktoken"),
            # A process a core, and as many as it takes itself.
            case("build-nanogpt's method", "MB", data.building_as_nanogpt, workers=threads),
            case("build-nanogpt's, half", "MB", data.building_as_nanogpt, workers=half),
        ],
        [case("loader", "tokens", data.loading), case("loader, prefetch", "tokens", data.loading, prefetch=True)],
        [case(program[0], "bytes", data.verifying, program=program)
         for program in (["gpt2-data"], ["sha256sum"], ["openssl", "dgst", "-sha256"])],
    ]  # fmt: skip
    pools = ("build-nanogpt's method", "build-nanogpt's, half")
    checks = [
        Check(("ours, gigatoken",), pools, 8.0),
        Check(("ours, tiktoken",), pools, 1.3),
        Check(("loader",), (), 150e6),
        Check(("loader, prefetch",), (), 150e6),
        Check(("gpt2-data",), ("sha256sum",), 1 / 1.3),
    ]
    measure("data", source or f"{megabytes} MB of Python sources", groups, checks, threads=threads, **options)


@main.command()
@FIELDS
@measuring(3)
def scaling(fields: dict[str, int], **options: Any) -> None:
    """Time two ranks of gpt2-train and, as their upper limit, two independent runs at the same time.

    Each has one thread; 30M parameters, gloo, one or four micro-batches of 2 x 256 tokens a step.
    """
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, **fields}
    work = {"size": "124M", "batch": 2, "seq_len": 256, "precision": "fp32", "fields": sizes}
    case = partial(contender, unit="tokens", prepare=cases.gpt2_train, work=work, steps=7)
    groups = [
        [
            case(f"two alone, x{n}", accumulation=n, threads=1, copies=2),
            case(f"two ranks, x{n}", accumulation=n, threads=1, ranks=2),
            case(f"one, x{n}", accumulation=n, threads=1),
            case(f"two threads, x{n}", accumulation=n, threads=2),
        ]
        for n in (1, 4)
    ]
    measure("scaling", f"GPT-2 {sizes}", groups, **options)


def measure(
    name: str, title: str, groups: Sequence[Sequence[Case]], checks: Sequence[Check] = (), *,
    only: tuple[str, ...], device: str, rounds: int, threads: int, out: Path | None, png: Path | None,
    as_json: bool, check: bool = False, tolerance: float = 0.0, base: str = "", least: float = 0.0,
) -> Document:  # fmt: skip
    """Measure groups of cases, show and keep what it gives; exit 1 if a bar is to hold and does not."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this torch sees no GPU", param_hint="--device")
    chosen = choose(groups, only, device, of_suite=name in ("run", "compare"))
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as folder:
        bench = Bench(folder, threads, device, rounds)
        try:
            if base:
                results = harness.compare([case for group in chosen for case in group], base, bench, least)
            else:
                results = harness.measure(chosen, bench, tolerance)
            document: Document = {"benchmark": name, "title": title, **provenance(device), "bars": [], **results}
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)
        except (ValueError, OSError) as error:
            raise click.ClickException(one_line(error)) from None
    document["bars"] += bars_of(checks, document["results"])
    text = json.dumps(document, indent=2)
    click.echo(text if as_json else table(document))
    if out:
        with write_whole(out) as file:
            file.write(text.encode() + b"\n")
    if png:
        draw(document, png)
    failed = [bar for bar in document["bars"] if check and not bar["holds"]]
    for bar in failed:
        click.echo(f"does not hold: {bar['bar']}: {bar['value']:.2f}", err=True)
    if failed:
        sys.exit(1)
    return document


def choose(
    groups: Sequence[Sequence[Case]], patterns: Sequence[str], device: str, of_suite: bool
) -> list[list[Case]]:
    """The device's cases by name or glob, and of the suite by the name's beginning; all without a pattern."""
    names = [case.name for group in groups for case in group if device in case.devices]
    chosen = set[str]() if patterns else {*names}
    for pattern in patterns:
        matching = fnmatch.filter(names, f"{pattern}*" if of_suite else pattern)
        if not matching:
            advice = "`bench.py list` names all" if of_suite else f"there are {'; '.join(names)}"
            raise click.BadParameter(f"no case is called {pattern!r} on {device}: {advice}", param_hint="--only")
        chosen |= {*matching}
    of_groups = [[case for case in group if case.name in chosen] for group in groups]
    return [group for group in of_groups if group]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind, as at Ctrl-C
    main()
