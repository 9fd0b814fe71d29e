"""`bench.py data`: who is timed when, what follows from the samples, and how it is shown."""

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench_decode import Sample
from bench_report import bar, in_short, say, spread

PEERS_FILE = Path(__file__).with_name("bench_data_peers.py")
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "gpt2-data")  # of this environment, activated or not
SPLIT = ("--shard-size", "10M", "--val-tokens", "1M", "--order", "source")
BATCH, TIME = 64, 1024
HEADER, EOT = 1024, 50256  # bytes before a shard's tokens, and what stands in front of each document
OURS = ("ours, gigatoken", "ours, tiktoken")
POOLS = ("build-nanogpt", "build-nanogpt, half")  # a process a core, and as many as it takes itself
BEST_POOL = "build-nanogpt, the better"
LEAST = {  # ratios of MB/s that --check holds us to
    (OURS[0], BEST_POOL): 8.0,
    (OURS[1], BEST_POOL): 1.3,
    (OURS[0], "gigatoken alone"): 0.5,
}
LEAST_LOADED, MOST_VERIFY = 150e6, 1.3
HASHES = {
    "sha256sum": ("sha256sum",),
    "shasum": ("shasum", "-a", "256"),
    "openssl": ("openssl", "dgst", "-sha256"),
}
DEFINITIONS = {
    "mb_per_second": "UTF-8 bytes of the documents' text / 1e6 / seconds of a whole process, its start and "
    "imports included, from Parquet in the page cache to token files in a fresh folder",
    "ours": f"gpt2-data build SOURCE --out DIR {' '.join(SPLIT)} --workers CORES --tokenizer LIBRARY: shards with "
    "hashes, flushed to the disk, which no peer does",
    "verified": "the same and `gpt2-data verify DIR --level full` after it, a process of its own",
    "build-nanogpt": "its method: multiprocessing.Pool over documents, tiktoken, .npy shards; a process a core, "
    "and half as many, as it takes itself; ratios are to the faster of the two in the round",
    "datasets.map": "GPT2TokenizerFast through datasets.map, a process a core, then nanoGPT's one file of uint16",
    "alone": "the library on text in memory, a process a core at once; gigatoken in a first pass, whose words "
    "its cache has not seen, and in a second one",
    "tokens": "every contender's, in every round, are the same (datasets.map has EOT behind documents)",
    "loader": f"TokenLoader, shuffled, batch {BATCH}, {TIME} tokens, from the page cache, tokens/s of a process; "
    "copies: the two widening copies to int64 with which each batch ends",
    "verify": "seconds of whole processes on the same files in the page cache; one worker: verify() alone",
    "ratios": "of figures of the same round; medians are of the rounds' ratios",
}


@dataclass(frozen=True)
class Settings:
    """What is asked for. source: a glob of Parquet files with a column `text`, None for a made one."""

    source: str | None
    megabytes: int
    dataset_megabytes: int
    rounds: int


@dataclass(frozen=True)
class Contender:
    """A command that writes tokens into the work folder's `out`, and how to read them all from there."""

    command: list[str]
    tokens: Callable[[Path], NDArray[np.uint16]]
    verified: bool = False  # can be


def measure(settings: Settings, work: Path) -> dict[str, Any]:
    """Run all of it in an empty folder.

    Returns:
        The document of `--json`, but for where it comes from.

    Raises:
        ValueError, OSError: what the user can mend, and tokens that are not the same.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source, facts = _source(settings, work)
    absent: dict[str, str] = {}
    contenders = _contenders(source, cores, work, absent)
    libraries = ["tiktoken"] if OURS[0] in absent else ["gigatoken", "tiktoken"]
    samples: dict[str, list[Sample]] = {}
    streams: set[tuple[int, str]] = set()
    for turn in range(settings.rounds):
        for name, contender in contenders.items():
            sample, stream = _time(contender, source, facts["text_bytes"], work / "out")
            streams.add(stream)
            if len(streams) > 1:
                raise ValueError(f"the tokens of {name} are not those of the others: its speed means nothing")
            samples.setdefault(name, []).append(sample)
            say(f"round {turn + 1} of {settings.rounds}, {name}: {sample['mb_per_second']:.1f} MB/s")
        for library in libraries:
            for name, speed in json.loads(_run(_peer("alone", library, _files(source), cores))[1]).items():
                samples.setdefault(name, []).append({"mb_per_second": speed})
                say(f"round {turn + 1} of {settings.rounds}, {name}: {speed:.1f} MB/s")
    (tokens, digest), *_ = streams
    dataset, made = _dataset(settings, source, tokens, cores, work, libraries[0])
    document: dict[str, Any] = {
        "definitions": DEFINITIONS,
        "settings": {**asdict(settings), "cores": cores},
        "source": {**facts, "tokens": tokens},
        "absent": absent,
        "streams": {"tokens": tokens, "sha256": digest, "equal": list(contenders)},
        **results(samples),
        "dataset": made,
        **_read(dataset, settings.rounds, absent),
    }
    return {**document, "bars": bars(document)}


def _source(settings: Settings, work: Path) -> tuple[str, dict[str, Any]]:
    """The glob to read, and what is in it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = settings.source or str(work / "pydocs.parquet")
    if settings.source is None:
        say(f"a corpus of {settings.megabytes} MB from Python's own text")
        copies = json.loads(_run(_peer("write_corpus", name, settings.megabytes))[1])
        told = f"made: pydocs {copies} times, each in another order; what repeats flatters gigatoken's cache"
    else:
        told = settings.source
    files, text, documents = _files(name), 0, 0
    if not files:
        raise ValueError(f"no file matches {name!r}")
    for file in files:
        if "text" not in pq.read_schema(file).names:
            raise ValueError(f"{file} has no column text")
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            documents += batch.num_rows
            text += pc.sum(pc.binary_length(batch.column(0))).as_py() or 0
    size = sum(os.path.getsize(file) for file in files)
    return name, {"name": told, "files": len(files), "bytes": size, "text_bytes": text, "documents": documents}


def _files(source: str) -> list[str]:
    """As the build orders them."""
    return sorted(glob.glob(source, recursive=True))


def _contenders(source: str, cores: int, work: Path, absent: dict[str, str]) -> dict[str, Contender]:
    """Who is there, in the order of their turns; the others go into `absent`."""
    from gpt2_data.tokenizer import choose_backend

    found: dict[str, Contender] = {}
    out = work / "out"
    for name in OURS:
        library = name.partition(", ")[2]
        try:
            choose_backend(library)
        except ValueError as error:
            absent[name] = str(error)
            continue
        found[name] = Contender(_build(source, out, library, cores), _ours, True)
    for name, processes in zip(POOLS, dict.fromkeys((cores, max(1, cores // 2))), strict=False):
        found[name] = Contender(_peer("build_nanogpt", _files(source), str(out), processes), _npy)
    missing = [name for name in ("datasets", "transformers") if find_spec(name) is None]
    if missing:
        absent["datasets.map"] = f"{missing[0]} is not installed"
    else:
        folder = work / "tokenizer"
        folder.mkdir()
        _run(_peer("write_tokenizer", str(folder)))
        command = _peer("datasets_map", _files(source), str(out), cores, str(folder))
        found["datasets.map"] = Contender(command, _nanogpt)
    return found


def _build(source: str, out: Path, library: str, workers: int) -> list[str]:
    return [
        PROGRAM, "build", source, "--out", str(out), *SPLIT, "--tokenizer", library, "--workers", str(workers),
    ]  # fmt: skip


def _peer(function: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(PEERS_FILE), function, json.dumps(arguments)]


def _time(
    contender: Contender, source: str, text_bytes: int, out: Path
) -> tuple[Sample, tuple[int, str]]:  # fmt: skip
    """One sample, and how many tokens there are and their SHA-256."""
    out.mkdir()
    os.sync()  # what the one before has left to be written must not slow this one
    _read_all(map(Path, _files(source)))
    seconds, _ = _run(contender.command)
    sample = {"seconds": seconds, "mb_per_second": text_bytes / seconds / 1e6}
    if contender.verified:
        seconds += _run([PROGRAM, "verify", str(out), "--level", "full"])[0]
        sample |= {"verified_seconds": seconds, "verified_mb_per_second": text_bytes / seconds / 1e6}
    tokens = contender.tokens(out)
    digest = hashlib.sha256(tokens.data).hexdigest()
    shutil.rmtree(out)
    return sample, (len(tokens), digest)


def _run(command: list[str]) -> tuple[float, str]:
    """Seconds of a process, and what it printed. Raises ValueError with its last words if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise ValueError(f"{' '.join(command[:3])[:200]}: {words[0]}")
    return seconds, done.stdout


def _read_all(paths: Any) -> None:
    """Into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def _ours(out: Path) -> NDArray[np.uint16]:
    files = [*sorted(out.glob("val_*.bin")), *sorted(out.glob("train_*.bin"))]
    return np.concatenate([np.fromfile(file, "<u2", offset=HEADER) for file in files])


def _npy(out: Path) -> NDArray[np.uint16]:
    return np.concatenate([np.load(file) for file in sorted(out.glob("*.npy"), key=lambda file: file.name[-10:])])


def _nanogpt(out: Path) -> NDArray[np.uint16]:
    """EOT behind each document -> before each."""
    tokens = np.fromfile(out / "train.bin", np.uint16)
    assert tokens[-1] == EOT
    return np.roll(tokens, 1)


def results(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """What the rounds come to: of each contender, and ratios of ours to the others."""
    build = {
        name: {field: spread([sample[field] for sample in taken]) for field in taken[0]}
        for name, taken in samples.items()
    }
    speeds = {name: fields["mb_per_second"]["rounds"] for name, fields in build.items()}
    speeds[BEST_POOL] = [
        max(pair) for pair in zip(*(speeds[name] for name in POOLS if name in speeds), strict=True)
    ]
    ratios: dict[str, dict[str, Any]] = {}
    for name in OURS:
        if name in build:
            verified = build[name]["verified_mb_per_second"]["rounds"]
            for kind, ours in ((name, speeds[name]), (f"{name}, verified", verified)):
                ratios[kind] = {
                    peer: spread([one / other for one, other in zip(ours, theirs, strict=True)])
                    for peer, theirs in speeds.items()
                    if peer not in OURS
                }
    return {"build": build, "ratios": ratios}


def _dataset(
    settings: Settings, source: str, tokens: int, cores: int, work: Path, library: str
) -> tuple[Path, dict[str, Any]]:
    """Ours for the loader and verify, of as many copies of the source as make it large enough."""
    copies = -(-settings.dataset_megabytes * 1_000_000 // (2 * tokens))
    say(f"a dataset of {copies * 2 * tokens / 1e6:.0f} MB for the loader and verify")
    folder, dataset = work / "copies", work / "dataset"
    folder.mkdir()
    for copy in range(copies):
        for i, file in enumerate(_files(source)):
            shutil.copyfile(file, folder / f"{copy:04d}-{i:05d}.parquet")  # a link would be named twice
    _run(_build(str(folder / "*.parquet"), dataset, library, cores))
    files = _shards(dataset)
    size = sum(file.stat().st_size for file in files)
    return dataset, {"tokens": copies * tokens, "bytes": size, "files": len(files), "copies_of_source": copies}


def _shards(dataset: Path) -> list[Path]:
    """What verify hashes."""
    return sorted(path for path in dataset.iterdir() if path.suffix in (".bin", ".docs"))


def _read(dataset: Path, rounds: int, absent: dict[str, str]) -> dict[str, Any]:
    """The loader, and verify beside what else hashes the same files."""
    hashes = {name: command for name, command in HASHES.items() if shutil.which(command[0])}
    if "sha256sum" in hashes:
        hashes.pop("shasum", None)
    absent |= {name: "not installed" for name in HASHES if name not in hashes and name != "shasum"}
    files = list(map(str, _shards(dataset)))
    commands = {"gpt2-data verify": [PROGRAM, "verify", str(dataset), "--level", "full"]}
    commands |= {name: [*command, *files] for name, command in hashes.items()}
    seconds: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    for turn in range(rounds):
        os.sync()
        _read_all(map(Path, files))
        for name, command in commands.items():
            seconds.setdefault(name, []).append(_run(command)[0])
        seconds.setdefault("one worker", []).append(json.loads(_run(_peer("verify_alone", str(dataset)))[1]))
        for name, speed in json.loads(_run(_peer("loader", str(dataset), BATCH, TIME))[1]).items():
            speeds.setdefault(name, []).append(speed)
        say(
            f"round {turn + 1} of {rounds}: verify {seconds['gpt2-data verify'][-1]:.2f} s, "
            f"loader {speeds['plain'][-1] / 1e6:.0f}M tokens/s"
        )
    return read_results(speeds, seconds)


def read_results(speeds: dict[str, list[float]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Spreads, the loader's share of the copies' speed, and verify's seconds over those of each program."""

    def over(one: list[float], other: list[float]) -> dict[str, Any]:
        return spread([ours / theirs for ours, theirs in zip(one, other, strict=True)])

    programs = [name for name in seconds if name in HASHES]
    return {
        "loader": {name: spread(values) for name, values in speeds.items()},
        "loader_shares": {name: over(speeds[name], speeds["copies"]) for name in ("plain", "prefetch")},
        "verify": {name: spread(values) for name, values in seconds.items()},
        "verify_ratios": {name: over(seconds["gpt2-data verify"], seconds[name]) for name in programs},
    }


def bars(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What `--check` holds ours to, where the peer was there to be measured."""
    found = []
    for (name, peer), least in LEAST.items():
        if ratios := document["ratios"].get(name, {}).get(peer):
            found.append(bar(f"{name}: MB/s over those of {peer}, at least {least}", ratios["median"], least))
    for name in ("plain", "prefetch"):
        millions = document["loader"][name]["median"] / 1e6
        text = f"loader, {name}: million tokens/s, at least {LEAST_LOADED / 1e6:.0f}"
        found.append(bar(text, millions, LEAST_LOADED / 1e6))
    for name in ("sha256sum", "shasum"):
        if ratios := document["verify_ratios"].get(name):
            text = f"verify --level full: seconds over those of {name}, at most {MOST_VERIFY}"
            found.append(bar(text, ratios["median"], most=MOST_VERIFY))
    return found


def table(document: dict[str, Any]) -> str:
    """The document for a person, 100 columns at most but for the source's name."""
    settings, source, made = document["settings"], document["source"], document["dataset"]
    ours = [name for name in OURS if name in document["build"]]
    versions = document["versions"]
    libraries = ("tiktoken", "gigatoken", "datasets", "transformers", "pyarrow")
    lines = [
        f"source: {source['name']}",
        f"{source['text_bytes'] / 1e6:,.1f} MB of text in {source['documents']:,} documents, {source['tokens']:,} "
        f"tokens; {source['bytes'] / 1e6:,.1f} MB of Parquet",
        f"{document['machine']['cpu']}, {settings['cores']} cores",
        ", ".join(f"{name} {versions[name]}" for name in libraries if name in versions),
        f"median (least..most) of {settings['rounds']} rounds; all tokens of all contenders are the same",
        "",
        f"{'':28}{'MB/s':>20}{'seconds':>20}" + "".join(f"{name:>16}" for name in ours),
    ]
    for name, fields in document["build"].items():
        ratios = [document["ratios"][one].get(name) for one in ours]
        cells = [f"{ratio['median']:.2f}x" if ratio else "-" for ratio in ratios]
        # of a library alone the seconds would be without its start
        seconds = in_short(fields["seconds"]) if "seconds" in fields else "-"
        speed = in_short(fields["mb_per_second"])
        lines.append(f"{name:28}{speed:>20}{seconds:>20}" + "".join(f"{cell:>16}" for cell in cells))
        if "verified_seconds" in fields:
            speed, seconds = (in_short(fields[field]) for field in ("verified_mb_per_second", "verified_seconds"))
            lines.append(f"{'  and verified':28}{speed:>20}{seconds:>20}")
    for title, kind in ((BEST_POOL, ""), ("  to verified shards", ", verified")):
        cells = [f"{document['ratios'][one + kind][BEST_POOL]['median']:.2f}x" for one in ours]
        lines.append(f"{title:68}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", f"{made['bytes'] / 1e6:,.0f} MB of shards, {made['tokens']:,} tokens, in the page cache:"]
    for name, values in document["loader"].items():
        share = document["loader_shares"].get(name)
        of_copies = f", {share['median']:.0%} of the copies" if share else ""
        lines.append(f"{f'  loader, {name}':28}{in_short(values, 1e-6):>20} million tokens/s{of_copies}")
    for name, values in document["verify"].items():
        ratio = document["verify_ratios"].get(name)
        to_ours = f", verify takes {ratio['median']:.2f} times that" if ratio else ""
        lines.append(f"{f'  {name}':28}{in_short(values):>20} s{to_ours}")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)
