"""What `gpt2-data build` shows: the plan, a bar, the result. Results go to stdout, progress to stderr."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult, Progress, Status
    from gpt2_data.building.config import BuildConfig

SECONDS_BETWEEN_LINES = 30.0
"""Where stderr is no terminal: a short build says nothing there."""
_UNITS = {"writing": " tokens", "converting": " tokens", "comparing": " strings"}


def print_plan(config: "BuildConfig", as_json: bool) -> None:
    """What would be built, on what, and what it needs."""
    from gpt2_data.building.estimate import estimate
    from gpt2_data.building.plan import make_plan
    from gpt2_data.tokenizer import choose_backend

    backend = choose_backend(config.tokenizer)
    plan = make_plan(config)
    with _counting(sum(len(item.row_groups) for item, _ in plan.remote)) as count:
        guess = estimate(plan, config, remote=True, progress=count)
    folder = next(path for path in (config.out.absolute(), *config.out.absolute().parents) if path.exists())
    facts: dict[str, Any] = {
        "files": sum(item.kind not in ("pydocs", "stream") for item in plan.inputs),
        "units": len(plan.units),
        "documents": guess.documents,
        "tokens": guess.tokens,
        "tokens_estimated": not guess.counted,
        "shards": guess.shards(config),
        "bytes": guess.dataset_bytes(),
        "bytes_to_download": guess.download_bytes,
        "bytes_while_building": guess.peak_bytes(),
        "bytes_free": shutil.disk_usage(folder).free,
        "minutes": round(guess.minutes(config, plan, backend), 4),
        "workers": config.num_workers(plan.text_bytes),
        "tokenizer": backend,
        "out": str(config.out),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    about = "" if guess.counted else "about "
    fetched = f", {gb(guess.download_bytes)} to download" if guess.download_bytes else ""
    minutes = max(facts["minutes"], 0.1)
    click.echo(f"files      {facts['files']:,}, in {facts['units']:,} work units{fetched}")
    click.echo(f"documents  {about}{guess.documents:,}")
    click.echo(f"tokens     {about}{guess.tokens:,} ({'counted in the source' if guess.counted else 'estimate'})")
    click.echo(f"shards     {about}{facts['shards']:,} of {config.shard_size:,} tokens")
    click.echo(
        f"disk       {gb(facts['bytes'])}, {gb(facts['bytes_while_building'])} while building; "
        f"{gb(facts['bytes_free'])} free"
    )
    click.echo(
        f"time       about {minutes:,.1f} minutes with {facts['workers']:,} workers and {backend}"
        f"{', downloads left out' if fetched else ''}"
    )
    click.echo(f"out        {config.out}")


@contextmanager
def _counting(total: int) -> "Iterator[Any]":
    from tqdm import tqdm

    with tqdm(
        total=total, desc="counting", unit=" row groups", leave=False, disable=not (total and sys.stderr.isatty())
    ) as bar:
        yield bar.update


def print_result(result: "BuildResult", config: "BuildConfig", as_json: bool) -> None:
    """What was built."""
    if as_json:
        click.echo(json.dumps({**vars(result), "out": str(result.out)}))
        return
    what = f"{result.tokens:,} tokens of {result.documents:,} documents"
    if result.already_built:
        click.echo(f"{result.out}: already built: {what} in {result.shards:,} shards")
        return
    how = f"{result.seconds:.1f} s"
    if result.text_mb_per_second:  # 0 where all had been tokenized before
        how += f", {result.text_mb_per_second:.1f} MB/s with {result.tokenizer}"
    if not result.finished:
        assert config.part is not None
        number, count = config.part
        click.echo(f"{result.out}: part {number} of {count}: {what}; {how}; other parts are still to come")
        return
    click.echo(
        f"{result.out}: {what} in {result.shards:,} shards ({result.val_tokens:,} tokens for validation); {how}"
    )
    for count, note in (
        (result.documents_empty, "empty: only their <|endoftext|> is there"),
        (result.documents_replaced, "not UTF-8: what could not be read became U+FFFD"),
    ):
        if count:
            click.echo(f"{count:,} documents {note}", err=True)


@contextmanager
def progress() -> "Iterator[Progress]":
    """For build: `bar`, with what is done so far."""
    with bar() as show:
        yield lambda status: show(status.phase, status.done, status.total, _counts(status))


@contextmanager
def bar() -> "Iterator[Callable[..., None]]":
    """Show (what, done, total[, note]): a bar on a terminal, a line now and then elsewhere; on stderr."""
    from tqdm import tqdm

    drawn: Any = None
    shown = ""
    last_line = time.monotonic()

    def show(what: str, done: int, total: int, note: str = "") -> None:
        nonlocal drawn, shown, last_line
        if sys.stderr.isatty():
            if what != shown:
                if drawn is not None:
                    drawn.close()
                drawn = tqdm(desc=what, total=total, unit=_UNITS.get(what, "B"), unit_scale=True, leave=False)
                shown = what
            drawn.set_postfix_str(note, refresh=False)
            drawn.update(done - drawn.n)
        elif time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            click.echo(f"{what}: {100 * done / max(total, 1):.0f}%{note and ', '}{note}", err=True)

    try:
        yield show
    finally:
        if drawn is not None:
            drawn.close()


def _counts(status: "Status") -> str:
    counts = f"{status.documents:,} documents, {status.tokens / 1e6:,.1f}M tokens"
    return f"{counts}, {status.shards:,} shards" if status.phase == "writing" else counts


def gb(size: int) -> str:
    """Bytes for reading."""
    for unit, factor in ("GB", 1e9), ("MB", 1e6), ("kB", 1e3):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
