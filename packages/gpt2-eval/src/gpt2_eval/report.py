"""Results: accuracies with standard errors, per-item records on disk, and the JSON that programs rely on."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Accuracy:
    """Share of items whose best-scored choice is the label.

    Attributes:
        value: 0 to 1.
        stderr: standard error of `value`; NaN for a single item.
        ties: items whose best score is shared by several choices; the lowest index is taken.
    """

    value: float
    stderr: float
    ties: int


@dataclass(frozen=True)
class HellaSwagResult:
    """What one model scored on HellaSwag.

    Attributes:
        items: number of items scored.
        partial: items were left out by a limit, so that the numbers are not comparable.
        data_sha256: of the whole data file.
        metrics: protocol -> metric -> Accuracy: `metrics["karpathy"]["acc_norm"].value`.
        truncated: protocol -> rows (four an item) whose context was cut on the left to fit the model.
        records: one mapping an item, in the file's order; see `write_records`.
        seconds: from the rows to the scores.
    """

    items: int
    partial: bool
    data_sha256: str
    metrics: dict[str, dict[str, Accuracy]]
    truncated: dict[str, int]
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. A protocol's `stderr` is that of its headline metric, `acc_norm`."""
        return {
            "task": "hellaswag",
            "items": self.items,
            "partial": self.partial,
            "data_sha256": self.data_sha256,
            **{protocol: self._protocol_dict(protocol) for protocol in self.metrics},
            "seconds": self.seconds,
        }

    def _protocol_dict(self, protocol: str) -> dict[str, Any]:
        metrics = self.metrics[protocol]
        return {
            **{name: metric.value for name, metric in metrics.items()},
            "stderr": metrics["acc_norm"].stderr,
            **{f"{name}_stderr": metric.stderr for name, metric in metrics.items()},
            "ties": {name: metric.ties for name, metric in metrics.items()},
            "truncated": self.truncated[protocol],
        }


@dataclass(frozen=True)
class LossResult:
    """Cross-entropy of a model on the first tokens of a split.

    Attributes:
        loss: nats per token.
        stderr: standard error of `loss` over sequences (tokens of one sequence are not independent); NaN for
            a single sequence.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the target text, in which `<|endoftext|>` has no bytes.
        tokens: target tokens scored.
        tokens_requested: more than `tokens` where the split is smaller.
        sequences: windows that the tokens were cut into.
        seq_len: tokens a window; the first of each is predicted from one token alone.
        seconds: from the first read to the result.
    """

    loss: float
    stderr: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_requested: int
    sequences: int
    seq_len: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Accuracy:
    """Accuracy of taking the highest score: scores (items, choices), labels (items,).

    The standard error is sample deviation (Bessel) over sqrt(n), lm-evaluation-harness' `mean_stderr`.
    """
    best = scores.max(axis=1, keepdims=True)
    correct = (scores.argmax(axis=1) == labels).astype(np.float64)  # argmax takes the lowest index of equals
    ties = int(((scores == best).sum(axis=1) > 1).sum())
    return Accuracy(float(correct.mean()), standard_error(correct), ties)


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of independent values: sample deviation over sqrt(n). NaN for fewer than two."""
    if values.size < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(values.size))


def ratio_standard_error(totals: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    """Of sum(totals) / sum(weights); with equal weights, that of the mean of totals / weight. NaN below two.

    Source: Cochran 1977, "Sampling Techniques", section 2.11, the ratio estimator.
    """
    n = totals.size
    if n < 2:
        return math.nan
    residuals = totals - totals.sum() / weights.sum() * weights
    return float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / weights.sum())


def json_text(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON in which a number that is NaN or infinite is null: `NaN` is not JSON, and parsers refuse it."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one line an item, whole or not at all: temporary name, fsync, rename, fsync of the folder.

    A line of hellaswag is {"ind", "label", "karpathy": {"sum": [4], "mean": [4]}, "lm-eval": {"sum": [4],
    "char": [4], "byte": [4]}}: log-likelihoods in nats, as they are and by token, character and byte.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
