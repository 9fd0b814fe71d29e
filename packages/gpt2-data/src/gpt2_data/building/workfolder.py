"""OUT/.build, which a build works in: whose it is, what of an earlier one is kept, whether there is room."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gpt2_data.building import tokenize_units as units
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import ShardTask
from gpt2_data.building.estimate import estimate
from gpt2_data.building.plan import WORK, Plan, downloads
from gpt2_data.formats import manifest
from gpt2_data.formats import uint16 as formats


class Busy(ValueError):
    """Another build is at work in the folder."""


def check(out: Path) -> None:
    """Raise ValueError if the folder holds what a build must not touch."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    work = out / WORK
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
def locked(out: Path) -> Iterator[None]:
    """Work in the folder alone. Raises Busy, naming who is there."""
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+") as file:
        _flock(file, fcntl.LOCK_EX, work)
        _sign(file)
        yield


@contextlib.contextmanager
def shared(out: Path, number: int, count: int) -> Iterator[None]:
    """Work in the folder as part `number` of `count` beside the other parts. Raises Busy, naming who is there."""
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+") as all_parts, (work / f"lock-{number}-of-{count}").open("a+") as this_part:
        _flock(all_parts, fcntl.LOCK_SH, work)
        _flock(this_part, fcntl.LOCK_EX, work)
        _sign(this_part)
        yield


def _flock(file: IO[str], kind: int, work: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)  # goes with the process, however it ends
    except BlockingIOError:
        owners = [text for path in sorted(work.glob("lock*")) if (text := path.read_text().strip())]
        who = f" ({owners[0]})" if owners else ""
        where = f"another build is at work in {work.parent}{who}"
        raise Busy(f"{where}: wait for it or choose another --out") from None


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()


def prepare(work: Path, name: str) -> None:
    """Keep what an interrupted build of the same plan did; throw away that of another."""
    same = _planned(work) == name
    stamp = work / "plan.json"
    stamp.unlink(missing_ok=True)  # so that a kill in between leaves nothing to be trusted
    for path in work.iterdir():
        kept = path.name.startswith(("lock", "hub-"))
        if ".tmp-" in path.name or not (kept or same):
            path.unlink()
    _stamp(work, name)


def prepare_part(work: Path, name: str) -> None:
    """The same beside other parts: nothing is thrown away."""
    there = _planned(work)
    if there not in (None, name):
        raise ValueError(
            f"{work} holds an unfinished build of another source, or of files that were changed since: "
            "delete it or choose another --out"
        )
    if there is None:
        _stamp(work, name)


def _planned(work: Path) -> str | None:
    try:
        return str(json.loads((work / "plan.json").read_bytes())["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(work: Path, name: str) -> None:
    with formats.atomic(work / "plan.json", work) as file:
        file.write(json.dumps({"plan": name}).encode())


def remove_temporaries(work: Path, names: list[str]) -> None:
    """Remove the half-written files of these units or hashes, which no process writes any more."""
    for path in work.glob("*.tmp-*"):
        if path.name.partition(".")[0] in names:
            path.unlink(missing_ok=True)


def check_space(plan: Plan, config: BuildConfig) -> None:
    """Raise OSError if what is still to be written does not fit."""
    work, fetched = config.out / WORK, downloads(config)
    there = list(work.glob("unit-*"))
    if fetched.is_relative_to(config.out):
        there += [path for path in fetched.rglob("*") if path.is_file()]
    there += [path for path in config.out.iterdir() if manifest.is_shard_name(path.name)]
    guess = estimate(plan, config)
    guess.check_shards(config)
    needed = guess.peak_bytes() - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OSError(
            f"{config.out}: about {needed / 1e9:,.1f} GB are needed while building, "
            f"{free / 1e9:,.1f} GB are free: make room or choose another --out"
        )


# --- shards that a build which was interrupted has written


def remove_other_shards(out: Path, files: list[str]) -> None:
    """An interrupted build's of other sizes: they would be mixed in."""
    sidecars = [Path(name).with_suffix(".docs").name for name in files]
    for entry in out.iterdir():
        if manifest.is_shard_name(entry.name) and entry.name not in files + sidecars:
            entry.unlink()


def kept_shard(cut: ShardTask, key: str) -> manifest.Shard | None:
    """The shard, if a build with the same key has written it and its files are whole by their hashes."""
    try:
        kept = json.loads(_receipt_file(cut).read_bytes())
        shard = manifest.shard_from_json(kept["shard"])
        same = kept["key"] == key and (shard.file, shard.tokens) == (cut.file, cut.stop - cut.start)
        files = [(shard.file, shard.sha256)]
        if shard.docs is not None:
            files.append((shard.docs.file, shard.docs.sha256))
        if same and all(units.sha256_of(cut.folder / name) == sha256 for name, sha256 in files):
            return shard
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def keep_shard(cut: ShardTask, key: str, shard: manifest.Shard) -> None:
    """Note that it is written."""
    with formats.atomic(_receipt_file(cut), cut.temporary_folder) as file:
        file.write(json.dumps({"key": key, "shard": dataclasses.asdict(shard)}).encode())


def _receipt_file(cut: ShardTask) -> Path:
    return cut.temporary_folder / f"shard-{cut.file}.json"
