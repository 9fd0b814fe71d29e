"""Results as tables for people to read."""

from collections.abc import Mapping

import click

from gpt2_eval.compare import Comparison, verdict
from gpt2_eval.corpora import CORPORA
from gpt2_eval.report import CorpusResult, LossResult, TaskResult
from gpt2_eval.tasks import TASKS

CHOICES = {
    "karpathy acc": "highest sum of log-probabilities; raw text (build-nanogpt, llm.c)",
    "karpathy acc_norm": "highest mean per token; raw text",
    "lm-eval acc": "highest sum; lm-evaluation-harness' text",
    "lm-eval acc_norm": "highest sum per character",
    "lm-eval acc_bytes": "highest sum per UTF-8 byte",
}
LAST_WORD = {
    "lm-eval acc": "the model's likeliest tokens are the last word",
    "lm-eval acc_last_token": "its likeliest token, after all the others, is the word's last",
    "lm-eval perplexity": "per last word",
}


def show_result(result: TaskResult | CorpusResult | LossResult, size: str | None, how: str) -> None:
    """Print a result, with the paper's figures for a GPT-2 of this size; `how` names the device and precision."""
    if isinstance(result, TaskResult):
        _show_task(result, size, how)
    elif isinstance(result, CorpusResult):
        _show_corpus(result, size, how)
    else:
        _show_loss(result, how)


def _show_task(result: TaskResult, size: str | None, how: str) -> None:
    comparable = not result.doubt and not result.partial and result.task in TASKS
    paper = TASKS[result.task].paper.get(size or "", {}) if comparable else {}
    heading = f"{'protocol':10}{'metric':15}{'value':>9}{'stderr':>9}{'ties':>6}"
    click.echo(heading + (f"{'paper':>9}" if paper else ""))
    for protocol, metrics in result.metrics.items():
        meaning = LAST_WORD if "perplexity" in metrics else CHOICES
        for name, metric in metrics.items():
            scale, unit = (1, "  ") if name == "perplexity" else (100, " %")
            value, ties = _figure(scale * metric.value, ".2f"), "" if metric.ties is None else metric.ties
            line = f"{protocol:10}{name:15}{value:>7}{unit}{_error(scale * metric.stderr):>9}{ties:>6}"
            if paper:
                line += f"{scale * paper[name]:7.2f}{unit}" if name in paper else " " * 9
            click.echo(f"{line}   {meaning[f'{protocol} {name}']}")
        if rows := result.truncated[protocol]:
            click.echo(
                f"{protocol}: {rows:,} rows lost the beginning of their context, which is longer than the model's"
            )
    what = result.task + ", not the published file," * bool(result.doubt)
    click.echo(f"{result.items:,} items of {what} in {result.seconds:.1f} s on {how}")
    if result.partial:
        click.secho(f"PARTIAL: the first {result.items:,} of {result.total:,} items; not comparable", fg="yellow")


def _show_corpus(result: CorpusResult, size: str | None, how: str) -> None:
    corpus = CORPORA[result.task]
    click.echo(f"{'protocol':10}{'per':7}{'perplexity':>11}{'stderr':>11}{'paper':>9}{'count':>13}")
    for protocol, perplexity in result.perplexities.items():
        for unit in ("token", "word", "byte"):
            value, count = getattr(perplexity, unit), getattr(perplexity, f"{unit}s")
            # The delta method: all three are exp(nats / count) of the same nats.
            stderr = value * perplexity.stderr * perplexity.tokens / count
            comparable = (protocol, unit) == corpus.nearest and not result.doubt
            paper = corpus.paper.get(size or "") if comparable else None
            click.echo(
                f"{protocol:10}{unit:7}{_figure(value, '.3f'):>11}{_error(stderr, '.3g'):>11}"
                f"{f'{paper:.2f}' if paper else '':>9}{count:13,}"
            )
        click.echo(f"{protocol:10}{perplexity.bits_per_byte:.4f} bits per byte")
    main = next(iter(result.perplexities))
    what = result.task + " (not the published file)" * bool(result.doubt)
    click.echo(f"{what}, stride {result.stride:,} ({main}), in {result.seconds:.1f} s on {how}")
    for protocol, perplexity in result.perplexities.items():
        known = corpus.tokens[protocol]
        if not result.doubt and perplexity.tokens == known:
            click.echo(f"{protocol}: {known:,} tokens, as published")
        else:
            click.echo(f"{protocol}: {perplexity.tokens:,} tokens; GPT-2's of the published text are {known:,}")


def _show_loss(result: LossResult, how: str) -> None:
    click.echo(f"loss           {result.loss:.4f} {_error(result.stderr, '.4f')} nats per token")
    click.echo(f"perplexity     {result.perplexity:.2f}")
    click.echo(f"bits per byte  {_figure(result.bits_per_byte, '.4f')}")
    click.echo(
        f"first {result.tokens:,} tokens of {result.split}, {result.sequences:,} windows of {result.seq_len:,}, "
        f"in {result.seconds:.1f} s on {how}"
    )
    if result.tokens < result.tokens_requested:
        click.secho(
            f"{result.split} is smaller than the {result.tokens_requested:,} tokens asked for", fg="yellow"
        )


def show_comparison(items: int, comparisons: Mapping[str, Comparison], a: str, b: str) -> None:
    """Print a line for each metric (both models, and their difference in percent points or nats) and a verdict."""
    click.echo(f"A  {a}\nB  {b}\n")
    answered = any(one.p is not None for one in comparisons.values())
    counts = f"{'changed':>9}{'only A':>8}{'only B':>8}{'p':>10}" if answered else ""
    click.echo(f"{'metric':20}{'A':>9}{'B':>9}{'B - A':>10}{'stderr':>9}{counts}")
    for name, one in comparisons.items():
        scale, digits = (1, ".4f") if one.p is None else (100, ".2f")
        line = f"{name:20}{scale * one.a:9{digits}}{scale * one.b:9{digits}}{scale * one.difference:+10{digits}}"
        line += f"{_error(scale * one.stderr, digits):>9}"
        if one.p is not None:
            line += f"{one.changed:9}{one.only_a:8}{one.only_b:8}{one.p:10.2g}"
        click.echo(line)
    explained = "; changed: answered differently; p: McNemar's exact test" if answered else ""
    click.echo(f"{items:,} items, the same for both{explained}\n{verdict(comparisons)}")


def _error(stderr: float, spec: str = ".2f") -> str:
    return f"± {_figure(stderr, spec)}"


def _figure(value: float, spec: str) -> str:
    """A number in a table; a random model's perplexity per word may be 1.55M, or 1e24."""
    if value != value:
        return "n/a"
    for suffix, scale in (("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if scale <= value < 1000 * scale:
            return f"{value / scale:.2f}{suffix}"
    return format(value, spec if value < 1e6 else ".3g")
