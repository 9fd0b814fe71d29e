"""Draw the curves of runs: python tools/plot.py runs/a runs/b --out loss.png

Loss of each step, faint, under its mean over the steps around; validation losses; accuracy on HellaSwag. Beside
runs of a size that OpenAI published, where GPT-2 and GPT-3 of that size stand.
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import matplotlib
import numpy as np

from gpt2_model.command import SETTINGS, write_whole

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

Curve = list[tuple[float, float]]
INK, GREY, FAINT = "#222222", "#777777", 0.22
LINE = 0.045  # height of a label, of its axis'
# Told apart by the colour-blind, too (Okabe and Ito, but for the yellow, which paper swallows).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8B6914", "#5D3A9B", "#E69F00")


class Reference(NamedTuple):
    """Published figures of a size: GPT-2's loss, nats per token, and accuracies in percent."""

    title: str
    val_loss: float
    hellaswag: float
    gpt3_title: str
    gpt3_hellaswag: float


# By (n_layer, n_embd). The loss of 124M is play.ipynb's of build-nanogpt, the others and GPT-2's accuracies are
# vislog.ipynb's of llm.c. GPT-3's accuracies are the paper's, as both notebooks have them.
REFERENCES = {
    (12, 768): Reference("124M", 3.2924, 29.45, "125M", 33.7),
    (24, 1024): Reference("350M", 3.0831, 37.52, "350M", 43.6),
    (36, 1280): Reference("774M", 3.0006, 43.20, "760M", 51.0),
    (48, 1600): Reference("1558M", 2.8313, 48.89, "1.3B", 54.7),
}
SOURCES = (
    "GPT-2: OpenAI's weights; loss of 124M on build-nanogpt's validation data (FineWeb-Edu), of larger ones on "
    "llm.c's (FineWeb): compare on equal data only.\n"
    "HellaSwag: raw context, mean per token, as in llm.c (vislog.ipynb); GPT-3: its paper."
)


@dataclass
class Run:
    """What is drawn of a run: curves of (x, value); `test` is its test's file, if that is not HellaSwag's."""

    name: str
    color: str = ""
    train: Curve = field(default_factory=list)
    validation: Curve = field(default_factory=list)
    accuracy: Curve = field(default_factory=list)
    reference: Reference | None = None
    test: str = ""

    @property
    def last(self) -> float:
        """The last x of all curves, -1 without any."""
        return max((curve[-1][0] for curve in (self.train, self.validation, self.accuracy) if curve), default=-1)


@click.command(context_settings=SETTINGS)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default="loss.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Picture to write: PNG, or another format by its suffix.")  # fmt: skip
@click.option(
    "--x", "unit", type=click.Choice(("step", "tokens")), default="step", show_default=True, help="Axis."
)
def main(runs: tuple[Path, ...], out: Path, unit: str) -> None:
    """Draw training and validation loss of RUNS, and their HellaSwag accuracy where they have one.

    A folder of runs stands for all runs in it.
    """
    inner = [[path.parent for path in sorted(folder.glob("*/metrics.jsonl"))] for folder in runs]
    folders = [run for folder, inside in zip(runs, inner, strict=True) for run in inside or [folder]]
    loaded = [load_run(*pair, unit) for pair in zip(folders, names(folders), strict=True)]
    shown = [run for run in loaded if run.last >= 0]
    if not shown:
        raise click.ClickException(f"{', '.join(map(str, runs))}: no run with a row in its metrics.jsonl")
    for number, run in enumerate(shown):
        run.color = COLORS[number % len(COLORS)]
    for run in loaded:
        if run.last < 0:
            click.echo(f"{run.name}: no rows of a run to draw", err=True)
    figure = draw(shown, unit)
    try:
        with write_whole(out) as file:
            figure.savefig(file, dpi=160, format=out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{out} cannot be written: {error}") from None
    click.echo(str(out))


def names(runs: Sequence[Path]) -> list[str]:
    """A short name of each folder: its own, with its parents' where others have the same."""
    parts = [run.absolute().parts for run in runs]
    length = 1
    while length < max(map(len, parts)) and len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return [str(Path(*part[-length:])) for part in parts]


def load_run(folder: Path, name: str, unit: str) -> Run:
    """A run's curves; broken lines and rows without tokens are passed over, with a word to stderr."""
    run, rows, broken, file = Run(name), [], 0, folder / "metrics.jsonl"
    for line in filter(None, file.read_bytes().split(b"\n") if file.exists() else ()):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        click.echo(f"{name}: broken lines of metrics.jsonl passed over: {broken}", err=True)
    # A run that was resumed by an older program may have a step twice: the last one counts.
    tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row} | {0: 0}
    for key, curve in (("loss", run.train), ("val_loss", run.validation), ("hellaswag_acc_norm", run.accuracy)):
        values = {row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float)}
        places = {step: step if unit == "step" else tokens.get(step) for step in sorted(values)}
        curve += [(x, values[step]) for step, x in places.items() if x is not None]
        if len(curve) < len(values):
            click.echo(f"{name}: {key} of steps without tokens left out: {len(values) - len(curve)}", err=True)
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        run.reference = REFERENCES.get((config["model"]["n_layer"], config["model"]["n_embd"]))
        test = Path(config.get("hellaswag", "")).name
        run.test = "" if test.startswith("hellaswag_val") else test
    except (OSError, ValueError, KeyError, TypeError):
        pass  # of no known size
    return run


def draw(runs: list[Run], unit: str) -> Figure:
    """One panel of losses, and one of accuracies if there are any."""
    with_accuracy = any(run.accuracy for run in runs)
    references = [one for one in REFERENCES.values() if one in [run.reference for run in runs]]
    size = (13 if with_accuracy else 8, 4.8)
    figure, axes = plt.subplots(1, 1 + with_accuracy, figsize=size, squeeze=False, layout="constrained")
    handles = draw_loss(axes[0, 0], runs, references, unit)
    if with_accuracy:
        draw_accuracy(axes[0, 1], runs, references)
    for axis in axes[0]:
        axis.set_xlabel(unit)
        axis.xaxis.set_major_formatter(FuncFormatter(short if unit == "tokens" else "{:,.0f}".format))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axis.grid(alpha=FAINT, linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, length=3)
        axis.set_xlim(0, 1.015 * max(1, *(run.last for run in runs)))
    columns = 5 if with_accuracy else 3
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    if references:
        figure.supxlabel(SOURCES, fontsize=7.5, color=GREY, x=0.01, ha="left", linespacing=1.4)
    return figure


def short(count: float, _place: object = None) -> str:
    """A number of tokens: 2B, 500M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def draw_loss(axis: Axes, runs: list[Run], references: list[Reference], unit: str) -> list[Line2D]:
    """Each step's loss, faint, its mean over it, and the validation losses; what the lines mean, for a legend."""
    labels, values, settled, windows = [], [], [], []
    for run in runs:
        if run.train:
            x, losses = np.array(run.train).T
            windows.append(max(1, len(losses) // 100, min(10, len(losses) // 4)))
            smooth = centred_mean(losses, windows[-1])
            axis.plot(x, losses, color=run.color, alpha=FAINT / len(runs) ** 0.5, linewidth=0.7, zorder=2)
            axis.plot(x, smooth, color=run.color, linewidth=1.8, zorder=3, marker="." if len(x) == 1 else "")
            values += [*np.quantile(losses[len(losses) // 2 :], [0.01]), *smooth]
            settled += [smooth[len(smooth) // 20]] if len(smooth) > 100 else []
        if run.validation:
            plot_marked(axis, run.validation, run.color, linewidth=1, markerfacecolor="white", zorder=4)
            values += [loss for _, loss in run.validation]
        if run.validation or run.train:
            last = run.validation[-1][1] if run.validation else float(smooth[-1])
            labels.append((last, f"{last:.2f}", run.color))
    for one in references:
        axis.axhline(one.val_loss, color=INK, linestyle=(0, (5, 3)), linewidth=1, zorder=1)
        labels.append((one.val_loss, f"GPT-2 {one.title}  {one.val_loss:.2f}", INK))
        values.append(one.val_loss)
    axis.set_ylabel("loss, nats per token")
    # The first steps of a long run fall from 11 within no time, and would take most of the picture.
    low, high, high_enough = min(values), max(values), max([*settled, *(y for y, _, _ in labels)])
    high = high_enough if settled and high - low > 1.5 * (high_enough - low) > 0 else high
    label_right(axis, labels, low, high)

    color = runs[0].color if len(runs) == 1 else GREY
    handles = [Line2D([], [], color=run.color, linewidth=2, label=run.name) for run in runs]
    if windows:
        means = "the mean" if len(set(windows)) > 1 else f"the mean of {windows[0]} steps"
        label = f"training loss, each step; bold: {means}"
        handles.append(Line2D([], [], color=color, alpha=0.4, linewidth=0.9, label=label))
    if any(run.validation for run in runs):
        handles.append(Line2D([], [], color=color, marker="o", markersize=4, linewidth=1, markerfacecolor="white",
                              label="validation"))  # fmt: skip
    return handles


def draw_accuracy(axis: Axes, runs: list[Run], references: list[Reference]) -> None:
    """Accuracy in percent at each evaluation, what guessing gives, and what GPT-2 and GPT-3 have."""
    labels, values = [(25.0, "guessing  25", GREY)], [25.0]
    axis.axhline(25, color=GREY, linestyle=":", linewidth=1, zorder=1)
    for run in runs:
        if run.accuracy:
            percent = [(x, 100 * accuracy) for x, accuracy in run.accuracy]
            plot_marked(axis, percent, run.color, linewidth=1.8, zorder=3)
            labels.append((percent[-1][1], f"{percent[-1][1]:.1f}", run.color))
            values += [value for _, value in percent]
    for one in references:
        gpt2 = (f"GPT-2 {one.title}", one.hellaswag, (5, 3))
        for name, value, dashes in (gpt2, (f"GPT-3 {one.gpt3_title}", one.gpt3_hellaswag, (5, 2, 1, 2))):
            axis.axhline(value, color=INK, linestyle=(0, dashes), linewidth=1, zorder=1)
            labels.append((value, f"{name}  {value:.4g}", INK))
            values.append(value)
    tests = {run.test for run in runs if run.accuracy}
    axis.set_ylabel(f"accuracy on {', '.join(sorted(test or 'HellaSwag' for test in tests))}, %")
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    label_right(axis, labels, min(values), max(values))


def plot_marked(axis: Axes, curve: Curve, color: str, **style: Any) -> None:
    """Draw a curve with marks, on its last point too: forty of them are a line, more are a smear."""
    marks = list(range(len(curve) - 1, -1, -1 - len(curve) // 40))
    axis.plot(*zip(*curve, strict=True), "o-", color=color, markersize=4, markevery=marks, **style)


def label_right(axis: Axes, labels: list[tuple[float, str, str]], low: float, high: float) -> None:
    """Set the range of y, with some room, and write (y, text, color) each beside its right end, moved apart."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    low, high = low - room, high + room
    axis.set_ylim(low, high)
    labels = sorted(labels)
    places = [(y - low) / (high - low) for y, _, _ in labels]
    for place, middle, (_, text, color) in zip(places, spread(places, LINE), labels, strict=True):
        arrow = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.7,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axis.annotate(text, (1, place), (1.04, middle), "axes fraction", "axes fraction", arrow,
                      color=color, fontsize=8.5, va="center")  # fmt: skip


def spread(places: Sequence[float], height: float) -> list[float]:
    """Middles of boxes of one height that want to be at `places`, ascending, and must not overlap.

    Boxes that would overlap form a stack, whose middle is the mean of their places; a stack may run into the next.
    """
    stacks: list[list[float]] = []
    for place in places:
        stacks.append([place])
        while len(stacks) > 1:
            below, above = stacks[-2:]
            if mean(above) - mean(below) >= height * (len(above) + len(below)) / 2:
                break
            stacks[-2:] = [below + above]
    return [mean(stack) + height * (n - (len(stack) - 1) / 2) for stack in stacks for n in range(len(stack))]


def centred_mean(values: np.ndarray, window: int) -> Any:
    """The mean of the `window` values around each place, of fewer at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


if __name__ == "__main__":
    main()
