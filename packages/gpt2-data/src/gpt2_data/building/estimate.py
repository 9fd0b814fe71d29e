"""Estimate the size and the time of a build before it begins."""

import functools
import math
import shutil
from typing import Any

import click
import numpy as np

from gpt2_data import order
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import advise_split, whole_documents
from gpt2_data.building.plan import Plan, make_plan
from gpt2_data.console import format_bytes, format_count, format_seconds, plural, print_json
from gpt2_data.formats.uint16 import OFFSET, TOKEN
from gpt2_data.sources import catalog, opening

_BYTES_PER_TOKEN = 4.3  # of English web text
_BYTES_PER_TOKEN_OF_CODE = 2.7  # GPT-2 spends a token on each space of an indent
# Of text per core, on a Cascade Lake at 2.5 GHz.
_MB_PER_SECOND = {"tiktoken": 8.0, "gigatoken": 55.0, "tokenizers": 1.5}
DOWNLOADS_AT_ONCE = 2  # fetched files on the disk if they are deleted after use: one in use, one coming
MAX_SHARDS = 10_000


def estimate(plan: Plan, config: BuildConfig) -> dict[str, int]:
    """Estimate a build. Raises ValueError if there would be more than MAX_SHARDS shards."""
    documents, size = 0, 0.0
    for unit in plan.units:
        count = unit.documents
        if count is None:
            count = round(unit.text_bytes / _mean_document(unit.kind, unit.files[0], unit.split_on))
        documents += count
        per_token = _BYTES_PER_TOKEN_OF_CODE if unit.kind == "pydocs" else _BYTES_PER_TOKEN
        if config.vocabulary is not None:  # a byte a token without merges; 3.3 more with GPT-2's 50,000
            per_token = 1 + (per_token - 1) * math.log(config.vocabulary.size / 256, 50_257 / 256)
        size += count + unit.text_bytes / per_token  # one EOT per document
    tokens = round(size)
    val = _validation(plan, config, documents, tokens)
    shards = -(-val // config.shard_size) + -(-(tokens - val) // config.shard_size)
    if shards > MAX_SHARDS:
        meant = f" (was {config.shard_size}M meant?)" if config.shard_size < 1000 else ""
        raise ValueError(
            f"shard_size {config.shard_size:,} would make about {shards:,} shards: "
            f"use a larger one, such as 100M{meant}; the limit is {MAX_SHARDS:,} shards"
        )
    downloads = sorted((item.bytes for item in plan.inputs if item.remote is not None), reverse=True)
    at_once = sum(downloads[:DOWNLOADS_AT_ONCE] if config.delete_downloads else downloads)
    positions = documents * OFFSET.itemsize
    dataset = tokens * TOKEN.itemsize + positions
    return {
        "documents": documents,
        "tokens": tokens,
        "shards": shards,
        "bytes": dataset,
        "bytes_to_download": sum(downloads),
        # Tokenized units, shards, document offsets, and downloads.
        "bytes_while_building": 2 * dataset + 2 * positions + at_once,
    }


def _validation(plan: Plan, config: BuildConfig, documents: int, tokens: int) -> int:
    """Estimate the tokens for validation. Raises ValueError if they are wanted of a single document."""
    if config.compat is not None:
        return min(tokens, config.shard_size)
    if config.val_tokens and len(plan.units) == 1 and plan.units[0].documents == 1:
        raise ValueError(
            "the source is a single document, and validation takes whole ones: leave --val-tokens out"
            + advise_split(plan.units)
        )
    sizes = np.ones(min(max(documents, 1), 1000))
    if all(unit.kind == "txt" and unit.split_on is None for unit in plan.units):
        sizes = np.array([item.bytes for item in plan.inputs])  # the first may be most of the text
        if config.order == "shuffled":
            sizes = sizes[order.permute(np.arange(len(sizes)), len(sizes), config.seed)]
    return whole_documents(np.append(0, sizes.cumsum() * (tokens / max(sizes.sum(), 1))), config.val_tokens)


@functools.lru_cache
def _mean_document(kind: str, path: str, split_on: str | None) -> float:
    """Return a document's mean size in bytes: by the first megabyte of lines or split text, else a web page's."""
    if kind not in ("jsonl", "csv", "txt"):
        return 154 if kind == "tinyshakespeare" else 4_700
    with opening.open_bytes(path) as file:
        sample = file.read(1_000_000)
    count = sample.count(b"\n") if split_on is None else len(sample.strip().split(split_on.encode()))
    return max(len(sample) / max(count, 1), 1)


def print_plan(config: BuildConfig, as_json: bool) -> None:
    """Print what would be built, from what, and what the build needs."""
    backend = config.backend
    plan = make_plan(config)
    text_bytes = sum(unit.text_bytes for unit in plan.units)
    if not text_bytes:
        raise ValueError("the source contains no text")
    # What the build would refuse at once is refused here, too: an unknown column, another encoding.
    here = {item.path for item in plan.inputs if item.remote is None and item.kind != "stream"}
    for unit in {unit.kind: unit for unit in reversed(plan.units) if unit.files[0] in here}.values():
        next(catalog.read(unit), None)
    workers = config.num_workers(text_bytes)
    folder = next(path for path in (config.out.absolute(), *config.out.absolute().parents) if path.exists())
    facts: dict[str, Any] = {
        "files": sum(item.kind not in ("pydocs", "stream") for item in plan.inputs),
        "units": len(plan.units),
        **estimate(plan, config),
        "tokens_estimated": True,
        "bytes_free": shutil.disk_usage(folder).free,
        "minutes": round(text_bytes / 1e6 / _MB_PER_SECOND[backend] / workers / 60, 4),  # without downloads
        "workers": workers,
        "tokenizer": backend,
        "out": str(config.out),
    }
    if as_json:
        print_json(facts)
        return
    size, needed, free = (format_bytes(facts[key]) for key in ("bytes", "bytes_while_building", "bytes_free"))
    download = facts["bytes_to_download"]
    fetched = f", {format_bytes(download)} to download" if download else ""
    without = ", without downloads" if download else ""
    time = f"{format_seconds(60 * facts['minutes'])} with {plural(workers, 'worker')} and {backend}"
    click.echo(
        f"files      {facts['files']:,}, in {plural(facts['units'], 'work unit')}{fetched}\n"
        f"documents  about {format_count(facts['documents'])}\n"
        f"tokens     about {format_count(facts['tokens'])} (an estimate)\n"
        f"shards     about {facts['shards']:,} of {format_count(config.shard_size)} tokens\n"
        f"disk       {size}, {needed} while building; {free} free\n"
        f"time       about {time}{without}\n"
        f"out        {config.out}"
    )
