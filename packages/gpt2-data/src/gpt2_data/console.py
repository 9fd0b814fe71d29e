"""What `gpt2-data build` shows: the plan, a bar, the result. Results go to stdout, progress to stderr."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult
    from gpt2_data.building.config import BuildConfig

SECONDS_BETWEEN_LINES = 30.0
"""Where stderr is no terminal: a short build says nothing there."""
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
"""tqdm's own format leaves one column of 80 for the bar."""
_UNITS = {"writing": " tokens", "converting": " tokens"}


def print_plan(config: "BuildConfig", as_json: bool) -> None:
    """Print what would be built, on what, and what it needs."""
    from gpt2_data.building.estimate import estimate, minutes
    from gpt2_data.building.plan import make_plan
    from gpt2_data.tokenizer import choose_backend

    backend = choose_backend(config.tokenizer)
    plan = make_plan(config)
    guess = estimate(plan, config)
    folder = next(path for path in (config.out.absolute(), *config.out.absolute().parents) if path.exists())
    facts: dict[str, Any] = {
        "files": sum(item.kind not in ("pydocs", "stream") for item in plan.inputs),
        "units": len(plan.units),
        "documents": guess.documents,
        "tokens": guess.tokens,
        "tokens_estimated": True,
        "shards": guess.shards,
        "bytes": guess.dataset_bytes,
        "bytes_to_download": guess.download_bytes,
        "bytes_while_building": guess.peak_bytes,
        "bytes_free": shutil.disk_usage(folder).free,
        "minutes": round(minutes(plan, config, backend), 4),
        "workers": config.num_workers(plan.text_bytes),
        "tokenizer": backend,
        "out": str(config.out),
    }
    if as_json:
        print_json(facts)
        return
    fetched = f", {format_bytes(guess.download_bytes)} to download" if guess.download_bytes else ""
    without = ", without downloads" if fetched else ""
    sizes = [format_bytes(facts[key]) for key in ("bytes", "bytes_while_building", "bytes_free")]
    workers = plural(facts["workers"], "worker")
    click.echo(f"files      {facts['files']:,}, in {plural(facts['units'], 'work unit')}{fetched}")
    click.echo(f"documents  about {format_count(guess.documents)}")
    click.echo(f"tokens     about {format_count(guess.tokens)} (an estimate)")
    click.echo(f"shards     about {facts['shards']:,} of {format_count(config.shard_size)} tokens")
    click.echo(f"disk       {sizes[0]}, {sizes[1]} while building; {sizes[2]} free")
    click.echo(f"time       about {format_seconds(60 * facts['minutes'])} with {workers} and {backend}{without}")
    click.echo(f"out        {config.out}")


def print_result(result: "BuildResult", config: "BuildConfig", as_json: bool) -> None:
    """Print what was built."""
    if as_json:
        print_json({**vars(result), "out": str(result.out)})
        return
    what = f"{plural(result.tokens, 'token')} of {plural(result.documents, 'document')}"
    shards = plural(result.shards, "shard")
    how = f"{result.seconds:.1f} s"
    if result.text_mb_per_second:  # 0 where all had been tokenized before
        how += f", {result.text_mb_per_second:.1f} MB/s with {result.tokenizer}"
    if result.already_built:
        click.echo(f"{result.out}: already built: {what} in {shards}")
        return
    if not result.finished and config.part is not None:
        number, count = config.part
        click.echo(f"{result.out}: part {number} of {count}: {what}; {how}; other parts are not finished yet")
        return
    click.echo(f"{result.out}: {what} in {shards} ({plural(result.val_tokens, 'token')} for validation); {how}")
    if result.documents_empty:
        click.echo(f"{plural(result.documents_empty, 'document')} empty: kept as <|endoftext|> alone", err=True)
    if result.documents_replaced:
        note = "not UTF-8: the invalid bytes became U+FFFD"
        click.echo(f"{plural(result.documents_replaced, 'document')} {note}", err=True)


@contextmanager
def bar() -> "Iterator[Callable[..., None]]":
    """Show (what, done, total[, tokens so far]): a bar on a terminal, a line now and then elsewhere; on stderr."""
    from tqdm import tqdm

    drawn: Any = None
    phase, started, first = "", 0.0, 0
    last_line = time.monotonic()

    def show(what: str, done: int, total: int, tokens: int = 0) -> None:
        nonlocal drawn, phase, started, first, last_line
        now = time.monotonic()
        note = f"{format_count(tokens)} tokens" if tokens else ""
        if what != phase:
            phase, started, first = what, now, done
            if drawn is not None:
                drawn.close()
            if sys.stderr.isatty():
                unit = _UNITS.get(what, "B")
                drawn = tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, bar_format=_BAR)
        if drawn is not None:
            drawn.set_postfix_str(note, refresh=False)
            drawn.update(done - drawn.n)
        elif now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            remaining = (now - started) * (total - done) / (done - first) if done > first else None
            time_left = f", {format_seconds(remaining)} left" if remaining is not None else ""
            click.echo(f"{what}: {100 * done / max(total, 1):.0f}%{time_left}{note and ', '}{note}", err=True)

    try:
        yield show
    finally:
        if drawn is not None:
            drawn.close()


def print_json(value: Any) -> None:
    """Print one JSON document."""
    import json

    click.echo(json.dumps(value))


def plural(count: int, noun: str) -> str:
    """A count and its noun: "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_count(number: int) -> str:
    """A count for reading: "9,999", "38.7M", "9.95B"."""
    for unit, factor in ("B", 1e9), ("M", 1e6), ("k", 1e3):
        if number >= max(factor, 10_000):
            return f"{number / factor:.3g}{unit}"
    return f"{number:,}"


def format_bytes(size: int) -> str:
    """Bytes for reading: "512 bytes", "1.2 GB"."""
    for unit, factor in ("GB", 1e9), ("MB", 1e6), ("kB", 1e3):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"


def format_seconds(seconds: float) -> str:
    """A time for reading: "40 seconds", "12 minutes", "3.5 hours", "2.1 days"."""
    for unit, length in ("days", 86_400), ("hours", 3600), ("minutes", 60):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(round(seconds), 1)} seconds" if seconds > 1.5 else "a second"
