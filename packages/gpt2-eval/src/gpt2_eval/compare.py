"""Two models on the same items: the difference, its standard error and McNemar's test, from files of --out.

The items are the same, so most of their difficulty cancels out: the standard error of the difference is that of
the differences item by item, well below that of two independent runs. Source: Miller 2024, "Adding Error Bars to
Evals".
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_eval.files import read_items
from gpt2_eval.hellaswag import METRICS
from gpt2_eval.report import ratio_standard_error, standard_error


@dataclass(frozen=True)
class Comparison:
    """One metric of two models, `a` and `b`, on the same items.

    Attributes:
        a, b: the metric of each.
        difference: b - a.
        stderr: of the difference, from its values item by item.
        changed: items that the two answer differently; None for what has no answer.
        only_a, only_b: those that one of them has right and the other wrong; None likewise.
        p: of McNemar's exact test, two-sided, that the two are equally good; None likewise.
    """

    a: float
    b: float
    difference: float
    stderr: float
    changed: int | None = None
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None


def compare(path_a: str | Path, path_b: str | Path) -> tuple[int, dict[str, Comparison]]:
    """(items, metric -> Comparison) of two files that `--out` has written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not of records, or two that are not of the same items.
    """
    a, b = (_read(Path(path)) for path in (path_a, path_b))
    if len(a) != len(b):
        raise ValueError(f"{path_a} has {len(a):,} items and {path_b} {len(b):,}: these are not the same items")
    for number, (one, other) in enumerate(zip(a, b, strict=True), 1):
        if _identity(one) != _identity(other):
            raise ValueError(f"item {number} of {path_a} is not item {number} of {path_b}: {_identity(one)}, and "
                             f"{_identity(other)}")  # fmt: skip
    if "nats" in a[0]:
        return len(a), {"loss": _compare_losses(a, b)}
    columns_a, columns_b = (_columns(records, str(path)) for records, path in ((a, path_a), (b, path_b)))
    names = [name for name in columns_a if name in columns_b]
    if not names:
        raise ValueError(f"{path_a} and {path_b} have no metric in common")
    return len(a), {name: _compare(columns_a[name], columns_b[name]) for name in names}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return read_items(path, lambda record: record)[0]


def _identity(record: Mapping[str, Any]) -> str:
    """What an item has whichever model is asked."""
    names = ("ind", "item", "window", "hash", "label", "chars", "tokens", "bytes")
    return json.dumps({name: record[name] for name in names if name in record})


class Column(NamedTuple):
    """A metric's value of each item, and what was answered; None where nothing is."""

    values: NDArray[np.float64]
    answers: NDArray[np.int64] | None


def _columns(records: Sequence[dict[str, Any]], path: str) -> dict[str, Column]:
    """Metric -> its column: 1 or 0 for right or wrong, else nats."""
    first, found = records[0], dict[str, Column]()
    try:
        for protocol, metrics in METRICS.items():
            if protocol in first:
                for name, kind in metrics.items():
                    found[f"{protocol} {name}"] = _answered(
                        [record[protocol][kind] for record in records], records
                    )
        if "greedy" in first:
            for name, key in (("acc", "greedy"), ("acc_last_token", "last_greedy")):
                hits = np.array([int(record[key]) for record in records])
                found[name] = Column(hits.astype(float), hits)
            found["nats"] = Column(np.array([-record["sum"][0] for record in records]), None)
        elif "sum" in first:
            found["acc"] = _answered([record["sum"] for record in records], records)
            for name, lengths in (("acc_norm", "chars"), ("acc_bytes", "bytes")):
                if lengths in first:
                    by_length = [np.array(record["sum"]) / record[lengths] for record in records]
                    found[name] = _answered(by_length, records)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold one kind of record throughout: {error!r}") from None
    if not found:
        raise ValueError(f"{path} is not a file that gpt2-eval --out has written")
    return found


def _compare_losses(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Comparison:
    nats = [np.array([record["nats"] for record in side]) for side in (a, b)]
    tokens = np.array([record["tokens"] for record in a])
    loss_a, loss_b = (float(side.sum() / tokens.sum()) for side in nats)
    return Comparison(loss_a, loss_b, loss_b - loss_a, ratio_standard_error(nats[1] - nats[0], tokens))


def _answered(scores: Sequence[Any], records: Sequence[dict[str, Any]]) -> Column:
    answers = np.array([int(np.argmax(score)) for score in scores])
    labels = np.array([record["label"] for record in records])
    return Column((answers == labels).astype(float), answers)


def _compare(a: Column, b: Column) -> Comparison:
    differences = b.values - a.values
    means = float(a.values.mean()), float(b.values.mean())
    summary = *means, float(differences.mean()), standard_error(differences)
    if a.answers is None or b.answers is None:
        return Comparison(*summary)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return Comparison(*summary, int((a.answers != b.answers).sum()), only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Chance of so uneven a split, or a worse one, of the items that only one has right, if both are equally good.

    Exact and two-sided: a binomial with 1/2 (McNemar 1947).
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    # In logarithms: 2^-10042 is no float.
    terms = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    largest = max(terms)
    log_tail = largest + math.log(math.fsum(math.exp(term - largest) for term in terms)) - n * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))
