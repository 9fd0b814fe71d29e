"""Results as a person reads them."""

from collections.abc import Mapping

import click

from gpt2_eval.compare import Comparison
from gpt2_eval.corpora import CORPORA
from gpt2_eval.hellaswag import PUBLISHED
from gpt2_eval.report import CorpusResult, HellaSwagResult, LossResult, TaskResult
from gpt2_eval.tasks import TASKS

HELLASWAG_METRICS = {
    ("karpathy", "acc"): "highest sum of log-probabilities; raw text (build-nanogpt, llm.c)",
    ("karpathy", "acc_norm"): "highest mean per token; raw text",
    ("lm-eval", "acc"): "highest sum; cleaned text (lm-evaluation-harness)",
    ("lm-eval", "acc_norm"): "highest sum per character; cleaned text",
    ("lm-eval", "acc_bytes"): "highest sum per UTF-8 byte; cleaned text",
}
TASK_METRICS = {
    "acc": "highest sum of log-probabilities",
    "acc_norm": "highest sum per character",
    "acc_bytes": "highest sum per UTF-8 byte",
}
CLOZE_METRICS = {
    "acc": "the model's likeliest tokens are the last word",
    "acc_last_token": "its likeliest token, after all the others, is the word's last",
    "perplexity": "per last word",
}


def show_hellaswag(result: HellaSwagResult, total: int, how: str) -> None:
    """A line a metric."""
    click.echo(f"{'protocol':10}{'metric':11}{'accuracy':>8}{'stderr':>9}{'ties':>6}")
    for protocol, metrics in result.metrics.items():
        for name, metric in metrics.items():
            stderr = f"± {_number(100 * metric.stderr, '.2f')}"
            click.echo(
                f"{protocol:10}{name:11}{100 * metric.value:6.2f} %{stderr:>9}{metric.ties:6}"
                f"   {HELLASWAG_METRICS[protocol, name]}"
            )
    for protocol, rows in result.truncated.items():
        _show_truncated(rows, f"{protocol}: ")
    click.echo(f"{result.items:,} items of HellaSwag in {result.seconds:.1f} s on {how}")
    _show_comparable(result.partial, result.items, total, result.data_sha256, PUBLISHED.sha256)


def show_task(result: TaskResult, total: int, size: str | None, how: str) -> None:
    """A line a metric; `size` is the model's, where it is one of GPT-2's, for the paper's figures."""
    meaning = CLOZE_METRICS if "perplexity" in result.metrics else TASK_METRICS
    paper = TASKS[result.task].paper.get(size or "", {})
    click.echo(f"{'metric':15}{'value':>9}{'stderr':>9}" + (f"{'paper':>9}" if paper else ""))
    for name, metric in result.metrics.items():
        scale, unit = (1, "  ") if name == "perplexity" else (100, " %")
        stderr = f"± {_number(scale * metric.stderr, '.2f')}"
        line = f"{name:15}{scale * metric.value:7.2f}{unit}{stderr:>9}"
        if paper:
            line += f"{scale * paper[name]:7.2f}{unit}" if name in paper else " " * 9
        click.echo(f"{line}   {meaning[name]}")
    _show_truncated(result.truncated)
    click.echo(f"{result.items:,} items of {result.task} in {result.seconds:.1f} s on {how}")
    _show_comparable(result.partial, result.items, total, result.data_sha256, TASKS[result.task].file.sha256)


def show_corpus(result: CorpusResult, size: str | None, how: str) -> None:
    """A line a protocol and unit."""
    corpus = CORPORA[result.corpus]
    click.echo(f"{'protocol':10}{'per':7}{'perplexity':>11}{'stderr':>11}{'paper':>9}{'count':>13}")
    for protocol, found in result.perplexities.items():
        for unit in ("token", "word", "byte"):
            value, count = getattr(found, unit), getattr(found, f"{unit}s")
            # The delta method: all three are exp(nats / count) of the same nats.
            stderr = f"± {_number(value * found.stderr * found.tokens / count, '.3g')}"
            paper = corpus.paper.get(size or "") if unit == corpus.per else None
            shown = f"{paper:.2f}" if paper else ""
            figure = format(value, ".3f" if value < 1e6 else ".3g")  # a random model's: 1e24 per word
            click.echo(f"{protocol:10}{unit:7}{figure:>11}{stderr:>11}{shown:>9}{count:13,}")
        click.echo(f"{protocol:10}{found.bits_per_byte:.4f} bits per byte")
    click.echo(f"{result.corpus}, stride {result.stride:,} (raw), in {result.seconds:.1f} s on {how}")


def show_loss(result: LossResult, split: str, how: str) -> None:
    """Nats, perplexity and bits per byte."""
    click.echo(f"loss           {result.loss:.4f} ± {_number(result.stderr, '.4f')} nats per token")
    click.echo(f"perplexity     {result.perplexity:.2f}")
    click.echo(f"bits per byte  {_number(result.bits_per_byte, '.4f')}")
    click.echo(
        f"first {result.tokens:,} tokens of {split}, {result.sequences:,} windows of {result.seq_len:,}, "
        f"in {result.seconds:.1f} s on {how}"
    )
    if result.tokens < result.tokens_requested:
        click.secho(f"{split} is smaller than the {result.tokens_requested:,} tokens asked for", fg="yellow")


def show_comparison(items: int, found: Mapping[str, Comparison], a: str, b: str) -> None:
    """A line a metric: both models, and their difference in percent points or nats."""
    click.echo(f"A  {a}\nB  {b}\n")
    answered = any(one.p is not None for one in found.values())
    counts = f"{'changed':>9}{'only A':>8}{'only B':>8}{'p':>10}" if answered else ""
    click.echo(f"{'metric':20}{'A':>9}{'B':>9}{'B - A':>10}{'stderr':>9}{counts}")
    for name, one in found.items():
        scale = 1 if one.p is None else 100
        digits = ".4f" if one.p is None else ".2f"
        figures = (scale * one.a, scale * one.b)
        stderr = f"± {_number(scale * one.stderr, digits)}"
        line = (
            f"{name:20}{figures[0]:9{digits}}{figures[1]:9{digits}}{scale * one.difference:+10{digits}}{stderr:>9}"
        )
        if one.p is not None:
            line += f"{one.changed:9}{one.only_a:8}{one.only_b:8}{one.p:10.2g}"
        click.echo(line)
    what = "; changed: answered differently; p: McNemar's exact test" if answered else ""
    click.echo(f"{items:,} items, the same for both{what}")


def _show_truncated(rows: int, where: str = "") -> None:
    if rows:
        click.echo(f"{where}{rows:,} rows lost the left of their context, which the model cannot hold")


def _show_comparable(partial: bool, items: int, total: int, found: str, published: str | None) -> None:
    if partial:
        click.secho(f"PARTIAL: the first {items:,} of {total:,} items; not comparable", fg="yellow")
    if published is not None and found != published:
        click.secho(
            f"Not the published file (SHA-256 {found[:12]}…, not {published[:12]}…): compare with numbers on this "
            "same file only",
            fg="yellow",
        )


def _number(value: float, spec: str) -> str:
    return "n/a" if value != value else format(value, spec)
