"""A benchmark's results as a picture: bars of what is reached, of the machine's own rate where there is one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot as plt

from bench_report import short
from bench_train import shape_of

OURS, PEER, INK = "#0072B2", "#9A9A9A", "#222222"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Of `bench.py run` each case's share of its ceiling, of `bench.py train` tokens a second, as a PNG."""
    training = document["benchmark"] == "train"
    rows = document["results"]
    measure, nothing = "per_second" if training else "share", {"median": 0.0, "min": 0.0, "max": 0.0}
    names = [one["name"] for one in rows]
    middle, least, most = ([one.get(measure, nothing)[of] for one in rows] for of in ("median", "min", "max"))
    errors = [
        [a - b for a, b in zip(middle, least, strict=True)],
        [b - a for a, b in zip(middle, most, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    colors = [OURS if not training or name.startswith(("ours", "gpt2-train")) else PEER for name in names]
    axes.barh(names, middle, color=colors, height=0.62, xerr=errors, error_kw={"ecolor": INK, "elinewidth": 0.8})
    for place, (one, value) in enumerate(zip(rows, most, strict=True)):
        text = f"{short(one['per_second']['median'])} {one['unit']}/s"
        if one["ceiling"]:  # else there is no bar, but the figure
            text += f", {one['share']['median']:.0%} of {one['ceiling']}"
        axes.annotate(text, (value, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max([*most, 1e-9]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens a second" if training else "share of what the machine itself reaches in the same run")
    axes.set_title(_title(document), fontsize=9, loc="left")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _title(document: Mapping[str, Any]) -> str:
    machine, settings = document["machine"], document["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {settings['threads']} threads"
    line = f"{where}; median, least and most of {settings['rounds']} rounds"
    if document["benchmark"] != "train":
        return line
    work = settings["work"]
    return f"{shape_of(work)}, {work['batch']} x {work['seq_len']} tokens at once, {work['precision']}\n{line}"
