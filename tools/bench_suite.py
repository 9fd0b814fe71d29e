"""`bench.py run` and `compare`: whose turn it is, what follows from the samples, and how it is shown."""

import fnmatch
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench_cases import CASES
from bench_report import bar, in_short, say, short, spread
from bench_worker import ROOT, Worker, result_of, take_turns, workers

WORKER = Path(__file__).with_name("bench_cases.py")


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    rounds: int
    threads: int
    device: str


def chosen(patterns: Sequence[str], device: str) -> list[str]:
    """Cases by name, beginning or glob; all of the device's without any.

    Raises:
        ValueError: a pattern that no case answers to.
    """
    names = [name for name, case in CASES.items() if device in case.devices]
    for pattern in patterns:
        if not fnmatch.filter(names, f"{pattern}*"):
            raise ValueError(f"no case is called {pattern!r} on {device}: `bench.py list` names all")
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, f"{p}*") for p in patterns)]


def run(names: Sequence[str], settings: Settings, folder: Path) -> dict[str, Any]:
    """The document, without its provenance: each case alone, one after the other."""
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for name in names:
        say(f"{name}: {CASES[name].text}")
        with workers([_worker(name, ROOT, folder, settings)]) as (alone,):
            (samples,) = take_turns([alone], settings.rounds)
        if alone.failed:
            absent[name] = alone.failed
            say(f"absent: {alone.failed}")
        else:
            results.append(result_of(alone, CASES[name].unit, samples))
    return {"settings": asdict(settings), "results": results, "absent": absent}


def compare(names: Sequence[str], base: str, settings: Settings, folder: Path, least: float) -> dict[str, Any]:
    """The same cases with the packages of a revision and with those of the working tree, in turn.

    A case that fails on both sides, or on the revision's alone, is absent; on the working tree's alone it is a bar
    that does not hold.

    Raises:
        ValueError: no such revision, or all cases are absent.
    """
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    bars = []
    with _checkout(base) as tree:
        for name in names:
            say(f"{name}: {CASES[name].text}")
            with workers(_worker(name, one, folder, settings) for one in (tree, ROOT)) as (old, new):
                sides = take_turns([old, new], settings.rounds)
            if new.failed and not old.failed:
                bars.append(bar(f"{name}: works ({new.failed})", 0, 1))
            elif old.failed:
                absent[name] = old.failed if new.failed else f"with {base}: {old.failed}"
                say(f"absent: {absent[name]}")
            else:
                before, after = ([sample["seconds"] for sample in samples] for samples in sides)
                ratio = spread([earlier / later for earlier, later in zip(before, after, strict=True)])
                results.append({"name": name, "base_seconds": before, "seconds": after, "ratio": ratio})
                bars.append(bar(f"{name}: {least:g} of the speed of {base}", ratio["median"], least))
    if not bars:
        raise ValueError(f"nothing could be compared: {'; '.join(f'{k}: {v}' for k, v in absent.items())}")
    document = {"base": base, "least": least, "settings": asdict(settings), "results": results, "absent": absent}
    return document | {"bars": bars}


def _worker(name: str, tree: Path, folder: Path, settings: Settings) -> Worker:
    command = [str(WORKER), name, str(folder), str(settings.threads), settings.device]
    return Worker(name, command, settings.threads, tree)


@contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    """A worktree of a revision, removed afterwards. Raises ValueError: no such revision, or git says why not."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "worktree", "prune"], capture_output=True).returncode:  # of one that was killed
        raise ValueError(f"{ROOT} is no git repository: there is nothing to compare with")
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True
    )
    if found.returncode:
        raise ValueError(f"{revision!r} is no commit here")
    with tempfile.TemporaryDirectory(prefix="gpt2-bench-") as temporary:
        tree = Path(temporary) / "base"
        commit = found.stdout.decode().strip()
        added = subprocess.run([*git, "worktree", "add", "--detach", tree, commit], capture_output=True, text=True)
        if added.returncode:
            raise ValueError(f"git worktree: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


def run_table(document: Mapping[str, Any]) -> str:
    """A line a case."""
    machine, settings = document["machine"], document["settings"]
    lines = [
        f"{machine['cpu']}, {settings['threads']} threads of {machine['cores']} cores, {settings['device']}; "
        f"median (least..most) of {settings['rounds']} rounds",
        "",
        f"{'case':22}{'a second':>30}  {'of the machine':>20}{'memory':>10}",
    ]
    for result in document["results"]:
        speed, share = result["per_second"], result.get("share")
        shown = f"{in_short(speed)} {result['unit']}"
        of = f"{share['median']:.0%} of {result['ceiling']}" if share else ""
        lines.append(f"{result['name']:22}{shown:>30}  {of:>20}{short(result['peak_memory']):>9}B")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)


def brief(document: Mapping[str, Any]) -> dict[str, Any]:
    """What results.jsonl keeps of `run`: the medians, and where they are from."""
    kept = ("date", "commit", "machine", "versions", "settings", "absent")
    return {name: document[name] for name in kept} | {
        "results": {one["name"]: _brief(one) for one in document["results"]}
    }


def _brief(one: Mapping[str, Any]) -> dict[str, Any]:
    seconds = one["seconds"]
    row = {
        "per_second": float(f"{one['per_second']['median']:.4g}"),
        "unit": one["unit"],
        "spread": float(f"{(seconds['max'] - seconds['min']) / seconds['median']:.2g}"),
        "peak_memory": one["peak_memory"],
    }
    if "share" in one:
        row |= {"share": float(f"{one['share']['median']:.3g}"), "of": one["ceiling"]}
    return row


def compare_table(document: Mapping[str, Any]) -> str:
    """A line a case."""
    lines = [
        f"speed of the working tree over that of {document['base']}: at least {document['least']:g} holds",
        "",
    ]
    least = document["least"]
    for result in document["results"]:
        ratio = result["ratio"]
        verdict = "   SLOWER" if ratio["median"] < least else "   noisy" if ratio["min"] < least else ""
        before, after = (median(result[side]) for side in ("base_seconds", "seconds"))
        lines.append(
            f"{result['name']:22}{ratio['median']:7.3f} ({ratio['min']:.3f}..{ratio['max']:.3f})"
            f"   {1000 * before:,.1f} -> {1000 * after:,.1f} ms{verdict}"
        )
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)
