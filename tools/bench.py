"""Benchmarks, python tools/bench.py COMMAND: speeds as ratios to peers and to the machine, in the same run."""

import fnmatch
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks import cases, data, harness, peers
from benchmarks.harness import Bench, Case, Ready
from benchmarks.report import Check, bars_of, brief, draw, provenance, table
from benchmarks.suite import CASES, FIRST_TOKEN, starting
from gpt2_model.command import SETTINGS, one_line, write_whole

Document = dict[str, Any]
RESULTS = harness.ROOT / "benchmarks" / "results.jsonl"
# Tokens a second on an H100: of 124M 1.3 times llm.c's published 468,000, of larger ones half of the maker's 989
# TFLOP/s, and of the largest two 0.55 of it, as llm.c counts operations.
H100_TOKENS = {"124M": 616_000, "350M": 216_893, "774M": 110_396, "1558M": 55_407}


def _writable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before minutes of measuring."""
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path.parent} is not there or cannot be written to")
    return path


def _device(_context: click.Context, _option: click.Parameter, device: str) -> str:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.BadParameter("this torch sees no GPU")
    return device


def _fields(_context: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, int]:
    sizes = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in ("n_layer", "n_head", "n_embd", "block_size") or not number.isdecimal():
            raise click.BadParameter(f"{word!r} is not n_layer, n_head, n_embd or block_size = a number")
        sizes[name] = int(number)
    return sizes


FILE = click.Path(dir_okay=False, path_type=Path)
CLONE = click.Path(exists=True, file_okay=False, resolve_path=True)
COUNT = click.IntRange(min=1)
DEVICE = click.option("-d", "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                      callback=_device, help="Device to measure.")  # fmt: skip
FIELDS = click.option("--model", "fields", multiple=True, metavar="FIELD=N", callback=_fields,
                      help="Another size than the usual one: n_layer=2, n_embd=64, ...")  # fmt: skip
CHECK = click.option("--check", is_flag=True, help="Exit 1, with a line each, if a bar does not hold.")


def measuring(rounds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of every command that measures."""
    threads = os.cpu_count()
    options = [
        click.option("--only", multiple=True, metavar="NAME", help="Only cases of this name; may be given often."),
        DEVICE,
        click.option("--rounds", type=COUNT, default=rounds, show_default=True, help="Samples of each case."),
        click.option("--threads", type=COUNT, default=threads, help="Threads of each.  [default: one a core]"),
        click.option("--out", type=FILE, callback=_writable, help="Write the JSON to a file, too."),
        click.option("--png", type=FILE, callback=_writable, help="Draw it, too."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Measure the packages against their peers and the machine, in the same run."""


@main.command("list")
@DEVICE
def list_(device: str) -> None:
    """Name the suite's cases."""
    for case in CASES:
        if device in case.devices:
            click.echo(f"{case.name:22} {case.text}")


@main.command("run")
@measuring(5)
def run_(**options: Any) -> None:
    """Time the suite's cases, each alone, beside the machine's rate that bounds it, in the same run."""
    measure("run", "the suite, each case alone", [[case] for case in CASES], **options)


@main.command()
@measuring(5)
@click.option("--to", type=FILE, default=RESULTS, show_default=True, callback=_writable, help="File to append to.")
def record(to: Path, **options: Any) -> None:
    """Time the suite's cases as `run` does, and append a line to benchmarks/results.jsonl."""
    document = measure("run", "the suite, each case alone", [[case] for case in CASES], **options)
    before = to.read_bytes() if to.exists() else b""
    with write_whole(to) as file:
        file.write(before + json.dumps(brief(document)).encode() + b"\n")
    click.echo(f"appended to {to}", err=True)


@main.command()
@click.option("--base", required=True, metavar="REV", help="Commit, tag or branch to compare with.")
@click.option("--least", type=click.FloatRange(min=0, min_open=True), default=0.9, show_default=True,
              help="Exit 1 if a case has less than this share of the base's speed.")  # fmt: skip
@measuring(5)
def compare(base: str, least: float, **options: Any) -> None:
    """Time the suite's cases with the packages of a commit and with the working tree's, in turn.

    Each case is two processes, and a ratio is that of neighbours in time. The commit is checked out into a
    temporary worktree, which is removed again.
    """
    groups = [[case] for case in CASES]
    measure("compare", f"this tree beside {base}", groups, base=base, least=least, check=True, **options)


@main.command()
@click.option("--size", type=click.Choice(list(H100_TOKENS)), default="124M", show_default=True, help="Model.")
@click.option("--batch", type=COUNT, help="Sequences at once.  [default: 4; cuda 64, 32, 16, 8]")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens of each.  [default: 256; cuda 1024]")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision.  [default: fp32; cuda bf16]")
@click.option("--nanogpt", type=CLONE, help="A clone of nanoGPT, to measure it, too.")
@click.option("--build-nanogpt", type=CLONE, help="A clone of build-nanogpt.")
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
    batch = batch or ({"124M": 64, "350M": 32, "774M": 16, "1558M": 8}[size] if on_gpu else 4)  # what 80 GB hold
    seq_len, precision = seq_len or (1024 if on_gpu else 256), precision or ("bf16" if on_gpu else "fp32")
    work = {"size": size, "batch": batch, "seq_len": seq_len, "precision": precision, "fields": fields}

    def case(name: str, prepare: Callable[..., Ready], **more: Any) -> Case:
        return Case(name, f"a step of {batch} x {seq_len}", "tokens", prepare, {"work": work, **more})

    clones = {"nanoGPT": nanogpt, "build-nanogpt": build_nanogpt}
    contenders = [
        case("ours", cases.training),
        case("ours, compiled", cases.training, compiled=True),
        case("gpt2-train", cases.gpt2_train, steps=16 if on_gpu else 8),
        case("matrix products alone", peers.products),
        case("transformers", peers.transformers_training),
        case("transformers, compiled", peers.transformers_training, compiled=True),
        *(case(name, peers.karpathy, clone=name, folder=folder) for name, folder in clones.items() if folder),
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

    Prompts of 16 tokens, 128 new ones, top-k 50: the tokens after the first, the first, and `gpt2-model generate`
    from its start to its first token. --only "* bf16 x1*" takes a precision and a number of rows.
    """
    on_gpu, new_tokens = device == "cuda", min(128, fields.get("block_size", 1024) - 16)
    peer = ("ours, compiled", cases.generating) if on_gpu else ("ctranslate2", peers.ctranslate2)
    contenders = [("ours", cases.generating), ("transformers", peers.transformers_generating), peer]
    groups, checks = [], []
    for precision, rows, count in product(
        ("bf16",) if on_gpu else tuple(cases.BYTES), (1, 8, 32, 128, 256) if on_gpu else (1, 8), (new_tokens, 1)
    ):
        where = f" {precision} x{rows}" + (", first" if count == 1 else "")
        work = {"precision": precision, "rows": rows, "new_tokens": count, "fields": fields}
        groups.append([
            Case(name + where, f"{count} tokens a row", "tokens", prepare,
                 work | ({"compiled": True} if name == "ours, compiled" else {}))
            for name, prepare in contenders
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
@click.option("--items", type=COUNT, default=500, show_default=True, help="The first of the file.")
@FIELDS
@CHECK
@measuring(3)
def eval_(data: str, items: int, fields: dict[str, int], device: str, **options: Any) -> None:
    """Time HellaSwag: ours, build-nanogpt's method (four rows an item, one item at a time), and lm-eval.

    The same random 124M weights and items, in fp32 (on a GPU bf16); the scores must be the same.
    """

    def case(name: str, method: str) -> Case:
        work = {"data": data, "count": items, "fields": fields, "method": method}
        return Case(name, f"{items} items", "items", peers.hellaswag, work)

    groups = [
        [case("ours, karpathy", "karpathy"), case("build-nanogpt's method", "build-nanogpt")],
        [case("ours, lm-eval", "lm-eval"), case("lm-evaluation-harness", "harness")],
    ]
    checks = [Check((ours.name,), (peer.name,), least) for (ours, peer), least in zip(groups, (3, 2), strict=True)]
    title, tolerance = f"HellaSwag, GPT-2 {fields or '124M'}, random weights", 0.02 if device == "cpu" else 20.0
    measure("eval", title, groups, checks, tolerance=tolerance, device=device, **options)


@main.command("data")
@click.option(
    "--source", metavar="GLOB", default="", help="Parquet files with a column `text`.  [default: one is made]"
)
@click.option("--megabytes", type=click.IntRange(min=4), default=100, show_default=True,
              help="Text of the source that is made, of Python's own, again and again.")  # fmt: skip
@CHECK
@measuring(3)
def data_(source: str, megabytes: int, threads: int, **options: Any) -> None:
    """Time the way from Parquet to verified shards, the loader, and verify, a process a core.

    Beside build-nanogpt's method and sha256sum. All must write the same tokens.
    """

    def case(name: str, unit: str, prepare: Callable[..., Ready], **more: Any) -> Case:
        return Case(name, prepare.__name__, unit, prepare, {"source": source, "megabytes": megabytes, **more})

    groups = [
        [
            case("ours, gigatoken", "MB", data.building, library="gigatoken"),
            case("ours, gigatoken, verified", "MB", data.building, library="gigatoken", verified=True),
            case("ours, tiktoken", "MB", data.building, library="tiktoken"),
            # A process a core, and as many as it takes itself.
            case("build-nanogpt's method", "MB", data.building_as_nanogpt, workers=threads),
            case("build-nanogpt's, half", "MB", data.building_as_nanogpt, workers=max(1, threads // 2)),
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
@click.option("--grad-compression", type=click.Choice(["none", "bf16"]), default="none", show_default=True)
@FIELDS
@measuring(3)
def scaling(grad_compression: str, fields: dict[str, int], **options: Any) -> None:
    """Time two ranks of gpt2-train beside two runs that train alone at the same time, the most they could reach.

    A thread each, gloo, 30M parameters; with one micro-batch of 2 x 256 tokens a step, and with four.
    """
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, **fields}
    work = {"size": "124M", "batch": 2, "seq_len": 256, "precision": "fp32", "fields": sizes}

    def case(name: str, batches: int, **more: int) -> Case:
        how = {"work": work, "steps": 7, "accumulation": batches, "threads": 1, "compression": grad_compression}
        return Case(f"{name}, x{batches}", "micro-batches of 2 x 256", "tokens", cases.gpt2_train, {**how, **more})

    groups = [
        [case("two alone", n, copies=2), case("two ranks", n, ranks=2), case("one", n),
         case("two threads", n, threads=2)]
        for n in (1, 4)
    ]  # fmt: skip
    measure("scaling", f"GPT-2 {sizes}", groups, **options)


def measure(
    name: str, title: str, groups: Sequence[Sequence[Case]], checks: Sequence[Check] = (), *,
    only: tuple[str, ...], device: str, rounds: int, threads: int, out: Path | None, png: Path | None,
    as_json: bool, check: bool = False, tolerance: float = 0.0, base: str = "", least: float = 0.0,
) -> Document:  # fmt: skip
    """Measure groups of cases, show and keep what it gives; exit 1 if a bar is to hold and does not."""
    chosen = choose(groups, only, device, beginnings=name in ("run", "compare"))
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
    text = json.dumps(document, indent=2) + "\n"
    click.echo(text if as_json else table(document), nl=not as_json)
    if out:
        with write_whole(out) as file:
            file.write(text.encode())
    if png:
        draw(document, png)
    failed = [bar for bar in document["bars"] if check and not bar["holds"]]
    for bar in failed:
        click.echo(f"does not hold: {bar['bar']}: {bar['value']:.2f}", err=True)
    if failed:
        sys.exit(1)
    return document


def choose(
    groups: Sequence[Sequence[Case]], patterns: Sequence[str], device: str, beginnings: bool
) -> list[list[Case]]:
    """The device's cases by name or glob, and of the suite by the name's beginning; all without a pattern."""
    names = [case.name for group in groups for case in group if device in case.devices]
    globs = [f"{pattern}*" if beginnings else pattern for pattern in patterns]
    for pattern, glob in zip(patterns, globs, strict=True):
        if not fnmatch.filter(names, glob):
            advice = "`bench.py list` names all" if beginnings else f"there are {'; '.join(names)}"
            raise click.BadParameter(f"no case is called {pattern!r} on {device}: {advice}", param_hint="--only")
    chosen = [
        [case for case in group if case.name in names and any(fnmatch.fnmatch(case.name, g) for g in globs or "*")]
        for group in groups
    ]
    return [group for group in chosen if group]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing behind, as at Ctrl-C
    main()
