"""Two models on the same items: the difference, its standard error and McNemar's test, from files of --out.

The items are the same, so most of their difficulty cancels out: the standard error of the difference is that of
the differences item by item, well below that of two independent runs. Source: Miller 2024, "Adding Error Bars to
Evals".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_eval.hellaswag import METRICS
from gpt2_eval.published import existing_file, read_items
from gpt2_eval.report import ratio_standard_error

SAME_IN_BOTH = ("ind", "item", "window", "hash", "label", "chars", "tokens", "bytes")  # whichever model answers


@dataclass(frozen=True)
class Comparison:
    """One metric of two models, `a` and `b`, on the same items."""

    a: float
    b: float
    difference: float  # b - a
    stderr: float  # of the difference, from its values item by item
    changed: int | None = None  # items that the two answer differently; None for losses, as the three below
    only_a: int | None = None  # items that only `a` has right
    only_b: int | None = None
    p: float | None = None  # of McNemar's exact test, two-sided, that the two are equally good

    @property
    def better(self) -> str | None:
        """The better model, "A" or "B"; None if chance gives such a difference in more than one of 20 cases."""
        if self.p is None:  # losses: less is better
            shown, b_is_better = abs(self.difference) > 1.96 * self.stderr, self.difference < 0
        else:
            shown, b_is_better = self.p < 0.05, self.difference > 0
        return None if not shown else "B" if b_is_better else "A"


def verdict(metrics: Mapping[str, Comparison]) -> str:
    """Say in one sentence which model is better, and by which metrics."""
    a, b = (", ".join(name for name, one in metrics.items() if one.better == side) for side in "AB")
    if not a and not b:
        return "No significant difference: chance alone may explain it."
    if a and b:
        text = f"A is better by {a}, B by {b}"
    else:
        text = f"A is better than B by {a}" if a else f"B is better than A by {b}"
    rest = "" if all(one.better for one in metrics.values()) else "; the others show no significant difference"
    return f"{text}{rest} (at a level of 5 %)."


def compare(path_a: str | Path, path_b: str | Path) -> tuple[int, dict[str, Comparison]]:
    """Compare two files that `--out` has written; return the number of items and metric -> Comparison.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file does not hold records, or the two hold those of different items.
    """
    a, b = (read_items(existing_file(path), lambda record: record)[0] for path in (path_a, path_b))
    if len(a) != len(b):
        raise ValueError(f"{path_a} has {len(a):,} items and {path_b} {len(b):,}: these are not the same items")
    for number, records in enumerate(zip(a, b, strict=True), 1):
        one, other = ({name: record[name] for name in SAME_IN_BOTH if name in record} for record in records)
        if one != other:
            texts = f"{json.dumps(one)}, and {json.dumps(other)}"
            raise ValueError(f"item {number} of {path_a} is not item {number} of {path_b}: {texts}")
    columns_a, columns_b = (_columns(records, str(path)) for records, path in ((a, path_a), (b, path_b)))
    names = [name for name in columns_a if name in columns_b]
    if not names:
        raise ValueError(f"{path_a} and {path_b} have no metric in common")
    return len(a), {name: _compare(columns_a[name], columns_b[name]) for name in names}


class Column(NamedTuple):
    """A metric, item by item: its values, what their sum is divided by, and the answers, if there are any."""

    values: NDArray[np.float64]
    weights: NDArray[np.int64]
    answers: NDArray[np.int64] | None = None


def _columns(records: Sequence[dict[str, Any]], path: str) -> dict[str, Column]:
    """Return metric -> its column: 1 or 0 for right or wrong, else nats."""
    first, columns, ones = records[0], dict[str, Column](), np.ones(len(records), dtype=np.int64)

    def answered(scores: Sequence[Any]) -> Column:
        answers = np.array([np.argmax(score) for score in scores])
        labels = np.array([record["label"] for record in records])
        return Column((answers == labels).astype(float), ones, answers)

    try:
        if "nats" in first:
            nats, tokens = ([record[name] for record in records] for name in ("nats", "tokens"))
            columns["loss"] = Column(np.array(nats), np.array(tokens))
        for protocol in [name for name in METRICS if name in first]:
            for metric, kind in METRICS[protocol].items():
                columns[f"{protocol} {metric}"] = answered([record[protocol][kind] for record in records])
        if "greedy" in first:
            for name, key in (("acc", "greedy"), ("acc_last_token", "last_greedy")):
                hits = np.array([int(record[key]) for record in records])
                columns[name] = Column(hits.astype(float), ones, hits)
            columns["nats"] = Column(np.array([-record["sum"][0] for record in records]), ones)
        elif "sum" in first:
            columns["acc"] = answered([record["sum"] for record in records])
            for name, lengths in (("acc_norm", "chars"), ("acc_bytes", "bytes")):
                if lengths in first:
                    columns[name] = answered([np.array(record["sum"]) / record[lengths] for record in records])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold one kind of record throughout: {error!r}") from None
    if not columns:
        raise ValueError(f"{path} is not a file that gpt2-eval --out has written")
    return columns


def _compare(a: Column, b: Column) -> Comparison:
    mean_a, mean_b = (float(side.values.sum() / side.weights.sum()) for side in (a, b))
    differences = b.values - a.values
    summary = mean_a, mean_b, mean_b - mean_a, ratio_standard_error(differences, a.weights)
    if a.answers is None or b.answers is None:
        return Comparison(*summary)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return Comparison(*summary, int((a.answers != b.answers).sum()), only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the chance, for equal models, of so uneven a split of what only one has right (McNemar 1947)."""
    n = only_a + only_b
    ways = term = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << n))  # of whole numbers: no float holds 2 ** 10,042, but Python divides them
