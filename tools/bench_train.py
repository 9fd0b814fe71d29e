"""`bench.py train`: training steps of ours beside those of the peers, their matrix products alone, and the ladder.

Run as a program, `python bench_train.py CONTENDER WORK FOLDER THREADS` is the process of one of them.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_steps
from bench_report import bar, in_short, short, spread
from bench_steps import Work
from bench_worker import Ready, Worker, answer, result_of, take_turns, workers
from gpt2_model import flops_per_token

OURS, COMPILED, WHOLE = "ours", "ours, compiled", "gpt2-train"
PEER, PEER_COMPILED, TRAINER = "transformers", "transformers, compiled", "transformers' Trainer"
PEER_KEPT, PRODUCTS = "transformers, memory kept", "the matrix products alone"
REPOSITORIES = ("nanoGPT", "build-nanogpt")
CONTENDERS: dict[str, Callable[[Work], Ready]] = {
    OURS: bench_steps.ours,
    COMPILED: partial(bench_steps.ours, compile_mode="default"),
    WHOLE: bench_steps.whole_run,
    PRODUCTS: bench_steps.products,
    PEER: bench_steps.transformers,
    PEER_COMPILED: partial(bench_steps.transformers, compiled=True),
    PEER_KEPT: partial(bench_steps.transformers, memory_kept=True),
    TRAINER: bench_steps.trainer,
    **{name: partial(bench_steps.karpathy, name=name) for name in REPOSITORIES},
    # Rungs of the ladder on a GPU: each is COMPILED but for what it says. The last two compile for minutes.
    "without padded shapes": partial(bench_steps.ours, compile_mode="default", pad=False),
    "flash attention": partial(bench_steps.ours, compile_mode="default", attention="FLASH_ATTENTION"),
    "cuDNN's attention": partial(bench_steps.ours, compile_mode="default", attention="CUDNN_ATTENTION"),
    "AdamW not fused": partial(bench_steps.ours, compile_mode="default", fused=False),
    "max-autotune-no-cudagraphs": partial(bench_steps.ours, compile_mode="max-autotune-no-cudagraphs"),
    "reduce-overhead": partial(bench_steps.ours, compile_mode="reduce-overhead"),
}
LADDER = ("without padded shapes", "flash attention", "cuDNN's attention", "AdamW not fused")
USUAL = {
    "cpu": [OURS, COMPILED, WHOLE, PRODUCTS, PEER, PEER_COMPILED, *REPOSITORIES],  # 24 GB, all at once
    "cuda": [OURS, COMPILED, *LADDER, WHOLE, PRODUCTS, PEER, PEER_COMPILED, TRAINER, *REPOSITORIES],
}
GPU_BATCHES = {"124M": 64, "350M": 32, "774M": 16, "1558M": 8}  # that 80 GB hold at 1,024 tokens, compiled
H100_TOKENS = {"124M": 616_000}  # a second: 1.3 times llm.c's published 468,000, half of the maker's peak
GPU_MFU = {"124M": 0.50, "350M": 0.50, "774M": 0.55, "1558M": 0.55}
PEAK = 989e12  # of an H100 in bf16, by its maker


@dataclass(frozen=True)
class Settings:
    """What to measure, and how. `contenders`: only these; all that are usual on the device without any."""

    work: Work
    rounds: int
    threads: int
    contenders: tuple[str, ...] = ()


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """The document, without its provenance. What is computed is compared first.

    Raises:
        ValueError: ours computes something else than transformers, or compiled something else than not compiled.
    """
    checked = _check(settings, folder)
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    names = list(settings.contenders) or [
        name for name in USUAL[settings.work.device]
        if name not in REPOSITORIES or name in settings.work.repositories
    ]  # fmt: skip
    if settings.work.device == "cuda":  # one at a time: together they would not fit, and a GPU does not drift
        for name in names:
            results += _turns([name], settings, folder, absent)
    else:
        results = _turns(names, settings, folder, absent)
    document = {"settings": asdict(settings), "checked": checked, "results": results, "absent": absent}
    return document | {"bars": _bars(settings.work, results)}


def _turns(names: Sequence[str], settings: Settings, folder: Path, absent: dict[str, str]) -> list[dict[str, Any]]:
    with workers(_worker(name, settings, folder) for name in names) as warm:
        sides = take_turns(warm, settings.rounds)
    absent |= {worker.name: worker.failed for worker in warm if worker.failed}
    both = zip(warm, sides, strict=True)
    return [result_of(worker, "tokens", samples) for worker, samples in both if not worker.failed]


def _worker(name: str, settings: Settings, folder: Path) -> Worker:
    words = [name, json.dumps(asdict(settings.work)), str(folder), str(settings.threads)]
    return Worker(name, [__file__, *words], settings.threads)


def _check(settings: Settings, folder: Path) -> dict[str, float]:
    with workers([_worker("check", settings, folder)]) as (worker,):
        if worker.failed:
            raise ValueError(worker.failed)
        return {name: float(value) for name, value in worker.facts.items()}


def _bars(work: Work, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians of ratios, on a CPU of neighbours in time; of the usual work alone, which they are said of."""
    if work.fields or (work.device == "cpu" and (work.size, work.batch * work.seq_len) != ("124M", 1024)):
        return []
    speeds = {one["name"]: one["per_second"]["rounds"] for one in results}

    def ratio(ours: str, peer: str) -> float:
        pairs = zip(speeds[ours], speeds[peer], strict=True)
        return float(spread([mine / its for mine, its in pairs])["median"])

    def best(*names: str) -> str | None:
        there = [name for name in names if name in speeds]
        return max(there, key=lambda name: spread(speeds[name])["median"], default=None)

    on_gpu, found = work.device == "cuda", []
    ours, peer = best(OURS, COMPILED), best(PEER, PEER_COMPILED)
    if ours and peer and not on_gpu:
        least = 1.3 if work.precision == "bf16" else 1.2
        found.append(bar(f"{ours} over {peer}, the faster of its two", ratio(ours, peer), least))
    if ours and PRODUCTS in speeds and not on_gpu and work.precision == "bf16":
        found.append(bar("ours over the matrix products alone", ratio(ours, PRODUCTS), 0.87))
    if on_gpu and WHOLE in speeds and COMPILED in speeds:  # a CPU drifts: there a test times both within a run
        found.append(bar("gpt2-train over its steps alone", ratio(WHOLE, COMPILED), 0.98))
    mine = WHOLE if WHOLE in speeds else ours
    if on_gpu and mine and (work.seq_len, work.precision) == (1024, "bf16"):
        speed = float(spread(speeds[mine])["median"])
        if work.size in H100_TOKENS:
            found.append(bar(f"{mine}, tokens a second", speed, H100_TOKENS[work.size]))
        flops = flops_per_token(work.config, work.seq_len)
        found.append(bar(f"{mine}, MFU of 989 TFLOP/s by llm.c's count", speed * flops / PEAK, GPU_MFU[work.size]))
        for name, least in (("nanoGPT", 1.5), ("build-nanogpt", 1.5), (TRAINER, 2.0)):
            if name in speeds:
                found.append(bar(f"{mine} over {name}", ratio(mine, name), least))
    return found


def shape_of(work: Mapping[str, Any]) -> str:
    """124M, or 124M with n_layer=2."""
    changed = ", ".join(f"{name}={value}" for name, value in work["fields"].items())
    return f"{work['size']} with {changed}" if changed else str(work["size"])


def table(document: Mapping[str, Any]) -> str:
    """A line a contender, then the bars."""
    machine, settings = document["machine"], document["settings"]
    work = settings["work"]
    where = machine["gpu"] if work["device"] == "cuda" else f"{machine['cpu']}, {settings['threads']} threads"
    lines = [
        f"{shape_of(work)}, {work['batch']} x {work['seq_len']} tokens at once, {work['precision']}; {where}; "
        f"median (least..most) of {settings['rounds']} rounds",
        "the same as transformers: " + ", ".join(f"{k} {v:.1e}" for k, v in document["checked"].items()),
        "",
        f"{'':28}{'tokens a second':>26}{'of a large product':>20}{'memory':>10}",
    ]
    for one in document["results"]:
        speed = in_short(one["per_second"])
        lines.append(f"{one['name']:28}{speed:>26}{one['share']['median']:>19.1%} {short(one['peak_memory']):>8}B")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    lines += [f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['bar']}: {one['value']:.3g}"
              for one in document["bars"]]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    name, work, folder, threads = sys.argv[1:]
    given = Work(**json.loads(work))
    tempfile.tempdir = folder  # removed when all is measured, as this process is killed when its turns are over
    if name == "check":
        print(json.dumps(bench_steps.check(given)))
    else:
        answer(lambda: CONTENDERS[name](given), Path(folder), int(threads), given.device)
