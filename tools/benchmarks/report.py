"""What follows from a benchmark's samples, where they are from, and how they are shown."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

LIBRARIES = {
    "gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train", "torch", "triton", "numpy", "tiktoken", "gigatoken",
    "pyarrow", "transformers", "tokenizers", "ctranslate2", "lm_eval",
}  # fmt: skip
FEATURES = {"sha_ni", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "i8mm", "bf16"}
OURS, PEER, INK = "#0072B2", "#9A9A9A", "#222222"


@dataclass(frozen=True)
class Check:
    """A bar that `--check` holds: the median of the rounds' ratios of speeds.

    Attributes:
        cases: of these the one with the best median counts.
        peers: of these the fastest in each round counts; without any, `least` is units a second.
    """

    cases: tuple[str, ...]
    peers: tuple[str, ...]
    least: float


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratio_of(result: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    """The speed of one result over that of another, each in the same round."""
    pairs = zip(result["per_second"]["rounds"], peer["per_second"]["rounds"], strict=True)
    return spread([one / other for one, other in pairs])


def bar(text: str, value: float, least: float) -> dict[str, Any]:
    """A line of what `--check` holds."""
    return {"bar": text, "value": value, "holds": value >= least}


def bars_of(checks: Sequence[Check], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Apply the checks whose cases and peers were there to be measured."""
    by_name = {result["name"]: result for result in results}
    bars = []
    for check in checks:
        ours = [by_name[name] for name in check.cases if name in by_name]
        peers = [by_name[name]["per_second"]["rounds"] for name in check.peers if name in by_name]
        if not ours or (check.peers and not peers):
            continue
        best = max(ours, key=lambda result: float(result["per_second"]["median"]))
        if peers:
            fastest = {"per_second": {"rounds": [max(of_round) for of_round in zip(*peers, strict=True)]}}
            value, text = ratio_of(best, fastest)["median"], f"over {' or '.join(check.peers)}"
        else:
            value, text = best["per_second"]["median"], f"{best['unit']} a second"
        bars.append(bar(f"{best['name']}, {text}, at least {short(check.least)}", value, check.least))
    return bars


def short(value: float) -> str:
    """1.24G, 83.1M, 12k, 792, 37.6, 5.25."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    if value >= 10_000:
        return f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def processor() -> dict[str, Any]:
    """The system, the processor's name, its cores, and which of FEATURES it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": sorted(FEATURES & {*flags}),
    }


def provenance(device: str) -> dict[str, Any]:
    """What was run, when, on which commit of the project, and on what."""
    machine = processor()
    if device == "cuda":
        import torch

        machine["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    # Short, with a + where the working tree has changes; nothing outside a clone.
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    versions = {one.name: one.version for one in distributions() if one.name in LIBRARIES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions},
    }


def table(document: Mapping[str, Any]) -> str:
    """A line a case, then what is absent, then the bars."""
    base = document.get("base")
    ratio = f"the speed here over that of {base}" if base else "the first one's speed over it"
    lines = [
        document["title"],
        f"{_where(document)}, median (least..most); ratio: {ratio}",
        "",
        f"{'':28}{'a second':>28}{'ratio':>20}{'of the machine':>20}{'memory':>10}",
    ]
    for one in document["results"]:
        speed = f"{_in_short(one['per_second'])} {one['unit']}"
        share = f"{one['share']['median']:.0%} of {one['ceiling']}" if "share" in one else ""
        ratio = _in_short(one["ratio"]) if "ratio" in one else ""
        lines.append(f"{one['name']:28}{speed:>28}{ratio:>20}{share:>20}{short(one['peak_memory']):>9}B")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    for one in document["bars"]:
        lines.append(f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['bar']}: {one['value']:.3g}")
    return "\n".join(lines)


def _in_short(values: Mapping[str, Any]) -> str:
    median, least, most = (short(values[name]) for name in ("median", "min", "max"))
    return f"{median} ({least}..{most})"


def _where(document: Mapping[str, Any]) -> str:
    machine, settings = document["machine"], document["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {settings['threads']} threads of {machine['cores']} cores"
    return f"{where}; {settings['rounds']} rounds"


def brief(document: Mapping[str, Any]) -> dict[str, Any]:
    """What results.jsonl keeps of `run`: the medians, and where they are from."""
    rows = {}
    for one in document["results"]:
        seconds, names = one["seconds"], [name for name in ("per_second", "share") if name in one]
        row = {name: float(f"{one[name]['median']:.4g}") for name in names}
        row["spread"] = float(f"{(seconds['max'] - seconds['min']) / seconds['median']:.2g}")
        rows[one["name"]] = row | {"unit": one["unit"], "peak_memory": one["peak_memory"], "of": one["ceiling"]}
    names = ["date", "commit", "machine", "versions", "settings", "absent"]
    return {name: document[name] for name in names} | {"results": rows}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw each case's share of its ceiling for `bench.py run`, else its speed, as a PNG."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")  # a file, not a window
    from matplotlib import pyplot as plt

    of_suite, rows = document["benchmark"] == "run", document["results"]
    nothing = {"median": 0.0, "min": 0.0, "max": 0.0}  # of what no rate of the machine bounds
    shown = [one.get("share" if of_suite else "per_second", nothing) for one in rows]
    least, middle, most = (np.array([one[of] for one in shown]) for of in ("min", "median", "max"))
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    names = [one["name"] for one in rows]
    colors = [OURS if of_suite or name.startswith(("ours", "gpt2-")) else PEER for name in names]
    axes.barh(names, middle, color=colors, height=0.62, xerr=[middle - least, most - middle],
              error_kw={"ecolor": INK, "elinewidth": 0.8})  # fmt: skip
    for place, (one, value) in enumerate(zip(rows, most, strict=True)):
        text = f"{short(one['per_second']['median'])} {one['unit']}/s"
        if one["ceiling"]:  # else there is no bar, but the figure
            text += f", {one['share']['median']:.0%} of {one['ceiling']}"
        axes.annotate(text, (value, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max([*most, 1e-9]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of what the machine itself reaches in the same run" if of_suite else "units a second")
    axes.set_title(f"{document['title']}\n{_where(document)}", fontsize=9, loc="left")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
