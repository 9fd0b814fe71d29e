"""Compare two models on the same items, from files of --out: difference, standard error and McNemar's test.

Most of the items' difficulty cancels out: the standard error is that of the differences item by item, well below
that of two independent runs. Source: Miller 2024, "Adding Error Bars to Evals".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_eval.published import read_items
from gpt2_eval.report import Column, columns_of, ratio_standard_error

SAME_IN_BOTH = ("ind", "item", "window", "hash", "label", "chars", "tokens", "bytes")  # whatever the model


@dataclass(frozen=True)
class Comparison:
    """One metric of two models, `a` and `b`, on the same items."""

    a: float
    b: float
    difference: float  # b - a
    stderr: float  # of the difference, from its values item by item
    changed: int | None = None  # items that the two answer differently; this and what follows is None for losses
    only_a: int | None = None  # items that only `a` has right
    only_b: int | None = None
    p: float | None = None  # of McNemar's exact test, two-sided, of whether the two are equally good

    @property
    def better(self) -> str | None:
        """The better model, "A" or "B"; None if chance gives such a difference in more than 1 of 20 cases."""
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


def compare_files(path_a: str | Path, path_b: str | Path) -> tuple[int, dict[str, Comparison]]:
    """Compare two files that `--out` has written; return the number of items and metric -> Comparison.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file does not hold records, or the two hold those of different items.
    """
    a, b = (read_items(Path(path), lambda record: record)[0] for path in (path_a, path_b))
    if len(a) != len(b):
        raise ValueError(f"{path_a} has {len(a):,} items and {path_b} {len(b):,}: these are not the same items")
    for number, records in enumerate(zip(a, b, strict=True), 1):
        one, other = ({name: record[name] for name in SAME_IN_BOTH if name in record} for record in records)
        if one != other:
            raise ValueError(f"item {number} of {path_a} is not item {number} of {path_b}: {one}, and {other}")
    columns_a, columns_b = _columns(a, path_a), _columns(b, path_b)
    names = [name for name in columns_a if name in columns_b]
    if not names:
        raise ValueError(f"{path_a} and {path_b} have no metric in common")
    return len(a), {name: _compare(columns_a[name], columns_b[name]) for name in names}


def _columns(records: Sequence[dict[str, Any]], path: str | Path) -> dict[str, Column]:
    try:
        columns = columns_of(records)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not hold one kind of record throughout: {error!r}") from None
    if not columns:
        raise ValueError(f"{path} is not a file that gpt2-eval --out has written")
    return columns


def _compare(a: Column, b: Column) -> Comparison:
    mean_a, mean_b = a.estimate().value, b.estimate().value
    differences = b.values - a.values
    summary = mean_a, mean_b, mean_b - mean_a, ratio_standard_error(differences, a.weights)
    if a.answers is None or b.answers is None:
        return Comparison(*summary)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return Comparison(*summary, int((a.answers != b.answers).sum()), only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the chance that equally good models split so unevenly what only one has right (McNemar 1947)."""
    n = only_a + only_b
    ways = term = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << n))  # no float holds 2 ** 10,042, but Python can divide such integers
