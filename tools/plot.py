"""Draw the loss curves of runs: python tools/plot.py runs/a runs/b --out loss.png"""

import json
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK, FAINT = "#222222", 0.25


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", default="loss.png", show_default=True, type=click.Path(dir_okay=False), help="PNG to write."
)
def main(runs: tuple[Path, ...], out: str) -> None:
    """Draw training and validation loss of RUNS, and their HellaSwag accuracy where they have one."""
    rows = {run: read_metrics(run) for run in runs}
    with_accuracy = any("hellaswag_acc_norm" in row for run_rows in rows.values() for row in run_rows)
    figure, axes = plt.subplots(
        1,
        2 if with_accuracy else 1,
        figsize=(11 if with_accuracy else 7, 4.2),
        squeeze=False,
        layout="constrained",
    )
    for number, (run, run_rows) in enumerate(rows.items()):
        color = f"C{number}"
        draw_loss(axes[0, 0], run_rows, run.name, color)
        if with_accuracy:
            draw_accuracy(axes[0, 1], run_rows, run.name, color)
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.grid(alpha=FAINT)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(out, dpi=144)
    click.echo(out)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{run} is no run folder: {error}") from None
    if not any("loss" in row for row in rows):
        raise click.ClickException(f"{run} has not trained a step yet")
    return rows


def draw_loss(axis: Axes, rows: list[dict[str, Any]], name: str, color: str) -> None:
    """Each step's training loss, faint, with its running mean over it, and the validation losses."""
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    steps, losses = zip(*train, strict=True)
    axis.plot(steps, losses, color=color, alpha=FAINT, linewidth=0.8)
    axis.plot(steps, running_mean(losses, max(1, len(losses) // 40)), color=color, label=f"{name}, training")
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if validation:
        axis.plot(*zip(*validation, strict=True), "o-", color=INK, markersize=4, linewidth=1, label="validation")
        step, loss = validation[-1]
        axis.annotate(
            f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="right", color=INK
        )
    axis.set_ylabel("loss, nats per token")


def draw_accuracy(axis: Axes, rows: list[dict[str, Any]], name: str, color: str) -> None:
    """HellaSwag accuracy at each validation, and what guessing gives."""
    points = [(row["step"], row["hellaswag_acc_norm"]) for row in rows if "hellaswag_acc_norm" in row]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
    axis.axhline(0.25, color=INK, linestyle=":", linewidth=1, label="guessing")
    axis.set_ylabel("HellaSwag accuracy, by mean per token")
    axis.set_ylim(0, 1)


def running_mean(values: tuple[float, ...], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the start."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)
        for i in range(len(values))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
