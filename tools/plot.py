"""Draw the curves of runs: python tools/plot.py runs/a runs/b --out loss.png

It draws each step's loss, faint, its mean over neighbouring steps, validation losses, and accuracy on HellaSwag.
For runs of a size that OpenAI published, it also draws the figures of GPT-2 and GPT-3 of that size.
"""

import json
import os
import tomllib
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib
import numpy as np

from gpt2_model.command import SETTINGS, write_whole

matplotlib.use("Agg")  # draws to a file, not to a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Curve = list[tuple[float, float]]
GREY, FAINT = "#777777", 0.22
# Colour-blind readers can tell them apart (Okabe and Ito, without the yellow, which is too pale on paper).
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
    """The parts of a run to draw: curves of (x, value); `test` names its test's file if it is not HellaSwag's."""

    name: str
    color: str = ""
    train: Curve = field(default_factory=list)
    validation: Curve = field(default_factory=list)
    accuracy: Curve = field(default_factory=list)
    reference: Reference | None = None
    test: str = ""

    @property
    def last(self) -> float:
        """The last x of all curves, or -1 if there is no curve."""
        return max((curve[-1][0] for curve in (self.train, self.validation, self.accuracy) if curve), default=-1)


@click.command(context_settings=SETTINGS)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", default="loss.png", show_default=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Picture to write: PNG, or another format by its suffix.")  # fmt: skip
@click.option("--x", "unit", type=click.Choice(["step", "tokens"]), default="step", show_default=True,
              help="Unit of the horizontal axis.")  # fmt: skip
def main(runs: tuple[Path, ...], out: Path, unit: str) -> None:
    """Draw the training and validation loss of RUNS, and their HellaSwag accuracy if they have one.

    A folder of runs stands for all runs in it.
    """
    files = [file for run in runs for file in sorted(run.glob("*/metrics.jsonl")) or [run / "metrics.jsonl"]]
    folders = [file.parent.absolute() for file in files]
    common = os.path.commonpath([folder.parent for folder in folders])
    loaded = [load_run(folder, str(folder.relative_to(common)), unit) for folder in folders]
    shown = [run for run in loaded if run.last >= 0]
    if not shown:
        raise click.ClickException(f"{', '.join(map(str, runs))}: no run with a row in its metrics.jsonl")
    for run, color in zip(shown, cycle(COLORS), strict=False):
        run.color = color
    figure = draw(shown, unit)
    try:
        with write_whole(out) as file:
            figure.savefig(file, dpi=160, format=out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{out} cannot be written: {error}") from None
    click.echo(str(out))


def load_run(folder: Path, name: str, unit: str) -> Run:
    """Return a run's curves; broken lines and rows without tokens are skipped, with a message on stderr."""
    run, rows, broken, file = Run(name), [], 0, folder / "metrics.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        click.echo(f"{name}: skipped broken lines of metrics.jsonl: {broken}", err=True)
    # A run that was resumed by an older program may have a step twice: the last one counts.
    tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row} | {0: 0}
    for key, curve in (("loss", run.train), ("val_loss", run.validation), ("hellaswag_acc_norm", run.accuracy)):
        values = {row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float)}
        places = {step: step if unit == "step" else tokens.get(step) for step in sorted(values)}
        curve += [(x, values[step]) for step, x in places.items() if x is not None]
        if len(curve) < len(values):
            click.echo(f"{name}: skipped {key} of steps without tokens: {len(values) - len(curve)}", err=True)
    if run.last < 0:
        click.echo(f"{name}: its metrics.jsonl has nothing to draw", err=True)
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        run.reference = REFERENCES.get((config["model"]["n_layer"], config["model"]["n_embd"]))
        test = Path(config.get("hellaswag", "")).name
        run.test = "" if test.startswith("hellaswag_val") else test
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the run's size is unknown
    return run


def draw(runs: list[Run], unit: str) -> Figure:
    """Draw one panel of losses, and one of accuracies if there are any."""
    panels = [draw_loss, draw_accuracy] if any(run.accuracy for run in runs) else [draw_loss]
    size = (6.5 * len(panels), 4.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, draw_panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, runs)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_formatter(
            (lambda x, _: EngFormatter(sep="")(x).replace("G", "B")) if unit == "tokens" else "{x:,.0f}"
        )
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axis.grid(alpha=FAINT, linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.015 * max(1, *(run.last for run in runs)))
    if any(run.reference for run in runs):
        figure.supxlabel(SOURCES, fontsize=7.5, color=GREY, x=0.01, ha="left", linespacing=1.4)
    return figure


def sizes(runs: list[Run]) -> dict[Reference, str]:
    """Return the published sizes among the runs, with the color of each one's first run."""
    return {run.reference: run.color for run in reversed(runs) if run.reference}


def draw_loss(axis: Axes, runs: list[Run]) -> None:
    """Draw each step's loss, faint, its mean over neighbouring steps, the validation losses, and GPT-2's loss."""
    values, ends, settled = [], [], []
    for run in runs:
        if run.train:
            x, losses = np.array(run.train).T
            window = max(1, len(losses) // 100, min(10, len(losses) // 4))
            smooth = centred_mean(losses, window)
            label = f"{run.name}  {smooth[-1]:.2f}: training"
            label += f", the mean of {window} steps" if window > 1 else ""
            axis.plot(x, losses, color=run.color, alpha=FAINT / len(runs) ** 0.5, linewidth=0.7, zorder=2)
            style = "." if len(x) == 1 else "-"
            axis.plot(x, smooth, style, color=run.color, linewidth=1.8, zorder=3, label=label)
            values += [np.quantile(losses[len(losses) // 2 :], 0.01), *smooth]
            settled += [smooth[len(smooth) // 20]] if len(smooth) > 100 else []
            ends.append(smooth[-1])
        if run.validation:
            ends.append(run.validation[-1][1])
            label = f"{run.name}  {ends[-1]:.2f}: validation"
            plot_marked(axis, run.validation, run.color, linewidth=1, markerfacecolor="white", label=label)
            values += [loss for _, loss in run.validation]
    for size, color in sizes(runs).items():
        label = f"GPT-2 {size.title}  {size.val_loss:.2f}"
        axis.axhline(size.val_loss, color=color, linestyle="--", linewidth=1, zorder=1, label=label)
        ends.append(size.val_loss)
    axis.set_ylabel("loss, nats per token")
    # In a long run, the first losses fall quickly from 11, and would take most of the picture.
    low, high, high_enough = min(values + ends), max(values + ends), max(settled + ends)
    high = high_enough if settled and high - low > 1.5 * (high_enough - low) > 0 else high
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    axis.set_ylim(low - room, high + room)
    axis.legend(loc="upper right", fontsize=8.5)


def draw_accuracy(axis: Axes, runs: list[Run]) -> None:
    """Draw the accuracy in percent at each evaluation, that of guessing, and those of GPT-2 and GPT-3."""
    for run in runs:
        if run.accuracy:
            percent = [(x, 100 * accuracy) for x, accuracy in run.accuracy]
            label = f"{run.name}  {percent[-1][1]:.1f}"
            plot_marked(axis, percent, run.color, linewidth=1.8, label=label)
    for size, color in sizes(runs).items():
        gpt2 = (f"GPT-2 {size.title}", size.hellaswag, "--")
        for name, value, style in (gpt2, (f"GPT-3 {size.gpt3_title}", size.gpt3_hellaswag, "-.")):
            axis.axhline(value, color=color, linestyle=style, linewidth=1, zorder=1, label=f"{name}  {value:.4g}")
    axis.axhline(25, color=GREY, linestyle=":", linewidth=1, zorder=1, label="guessing  25")
    tests = {run.test for run in runs if run.accuracy}
    axis.set_ylabel(f"accuracy on {', '.join(sorted(test or 'HellaSwag' for test in tests))}, %")
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.legend(loc="upper left", fontsize=8.5)


def plot_marked(axis: Axes, curve: Curve, color: str, **style: Any) -> None:
    """Draw a curve with marks, also on its last point, but no more than about forty: more would be a smear."""
    marks = list(range(len(curve) - 1, -1, -1 - len(curve) // 40))
    axis.plot(*zip(*curve, strict=True), "o-", color=color, markersize=4, markevery=marks, zorder=4, **style)


def centred_mean(values: np.ndarray, window: int) -> Any:
    """Return the mean of the `window` values around each place, of fewer at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


if __name__ == "__main__":
    main()
