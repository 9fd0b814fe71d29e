"""Statistics of a benchmark's samples, their provenance, and the tables that show them."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

LIBRARIES = {
    "gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train", "torch", "triton", "numpy", "tiktoken", "gigatoken",
    "pyarrow", "transformers", "tokenizers", "ctranslate2", "lm_eval",
}  # fmt: skip
FEATURES = {"sha_ni", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "i8mm", "bf16"}
# A case, a peer, and the least median ratio of their speeds that `--check` accepts (without a peer: least speed).
Check = tuple[str, str, float]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, least and most of the values, and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratio_of(result: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of two results' speeds, round by round."""
    pairs = zip(result["per_second"]["rounds"], peer["per_second"]["rounds"], strict=True)
    return spread([one / other for one, other in pairs])


def bar(text: str, value: float, least: float) -> dict[str, Any]:
    """Return one requirement of `--check`, and whether it holds."""
    return {"bar": text, "value": value, "holds": value >= least}


def bars_of(checks: Sequence[Check], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Apply the checks whose case and peer were there to be measured."""
    by_name, bars = {result["name"]: result for result in results}, []
    for name, peer, least in checks:
        if name in by_name and peer in by_name:
            ratio = ratio_of(by_name[name], by_name[peer])["median"]
            bars.append(bar(f"{name}, over {peer}, at least {short(least)}", ratio, least))
        elif name in by_name and not peer:
            speed, unit = by_name[name]["per_second"]["median"], by_name[name]["unit"]
            bars.append(bar(f"{name}, {unit} a second, at least {short(least)}", speed, least))
    return bars


def short(value: float) -> str:
    """Format a number: 1.24G, 83.1M, 12.3k, 792, 37.6, 5.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def processor() -> dict[str, Any]:
    """Return the system, the processor's name, its cores, and which of FEATURES it has."""
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
    """Return what was run, when, with which commit and versions, and on which machine."""
    machine = processor()
    if device == "cuda":
        import torch

        machine["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    # The short hash, with a + if the working tree has changes; nothing outside a clone.
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
    """Return a table: one line per case, then what is absent, then the bars."""
    base, machine, settings = document.get("base"), document["machine"], document["settings"]
    ratio = f"the speed here over that of {base}" if base else "the first one's speed over it"
    where = machine.get("gpu") or f"{machine['cpu']}, {settings['threads']} threads of {machine['cores']} cores"
    lines = [
        document["title"],
        f"{where}; {settings['rounds']} rounds, median (least..most); ratio: {ratio}",
        "",
        f"{'':28}{'a second':>30}{'ratio':>22}{'of the machine':>20}{'memory':>10}",
    ]
    for one in document["results"]:
        speed = f"{_in_short(one['per_second'])} {one['unit']}"
        share = f"{one['share']['median']:.0%} of {one['ceiling']}" if "share" in one else ""
        ratio = _in_short(one["ratio"]) if "ratio" in one else ""
        lines.append(f"{one['name']:28}{speed:>30}{ratio:>22}{share:>20}{short(one['peak_memory']):>9}B")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    for one in document["bars"]:
        lines.append(f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['bar']}: {one['value']:.3g}")
    return "\n".join(lines)


def _in_short(values: Mapping[str, Any]) -> str:
    median, least, most = (short(values[name]) for name in ("median", "min", "max"))
    return f"{median} ({least}..{most})"


def brief(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what results.jsonl keeps of a `run`: the medians, and their provenance."""
    rows = {}
    for one in document["results"]:
        seconds, names = one["seconds"], [name for name in ("per_second", "share") if name in one]
        row = {name: float(f"{one[name]['median']:.4g}") for name in names}
        row["spread"] = float(f"{(seconds['max'] - seconds['min']) / seconds['median']:.2g}")
        rows[one["name"]] = row | {"unit": one["unit"], "peak_memory": one["peak_memory"], "of": one["ceiling"]}
    names = ["date", "commit", "machine", "versions", "settings", "absent"]
    return {name: document[name] for name in names} | {"results": rows}
