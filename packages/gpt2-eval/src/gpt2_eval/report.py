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
class Estimate:
    """A figure and its standard error, NaN for a single item."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Accuracy(Estimate):
    """Share of items, 0 to 1, whose best-scored choice is the label.

    Attributes:
        ties: items whose best score is shared by several choices; the lowest index is taken.
    """

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
class TaskResult:
    """What one model scored on a task of tasks.py.

    Attributes:
        items, partial, data_sha256, seconds: as in HellaSwagResult.
        metrics: by name.
        truncated: rows whose context was cut on the left to fit the model.
        records: one mapping an item: "item" (its number), "label", "hash" of its text, "sum" (log-likelihood of
            each choice, nats), and "chars" and "bytes" of each, or "greedy" and "last_greedy" of a single one.
    """

    task: str
    items: int
    partial: bool
    data_sha256: str
    metrics: dict[str, Estimate]
    truncated: int
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        metrics = self.metrics.items()
        return {
            "task": self.task,
            "items": self.items,
            "partial": self.partial,
            "data_sha256": self.data_sha256,
            **{name: metric.value for name, metric in metrics},
            **{f"{name}_stderr": metric.stderr for name, metric in metrics},
            "ties": {name: metric.ties for name, metric in metrics if isinstance(metric, Accuracy)},
            "truncated": self.truncated,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss of a text, by what the mean is over: tokens, words, UTF-8 bytes.

    Attributes:
        stderr: of `nats_per_token`, over windows or pages.
    """

    token: float
    word: float
    byte: float
    bits_per_byte: float
    nats_per_token: float
    stderr: float
    tokens: int
    words: int
    bytes: int


@dataclass(frozen=True)
class CorpusResult:
    """What a model makes of a text as a whole: protocol -> Perplexity."""

    corpus: str
    data_sha256: str
    stride: int
    perplexities: dict[str, Perplexity]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.corpus,
            "data_sha256": self.data_sha256,
            "stride": self.stride,
            **{name: asdict(perplexity) for name, perplexity in self.perplexities.items()},
            "seconds": self.seconds,
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
        records: one mapping a window: "window" (its number), "nats", "tokens" and "bytes".
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
    records: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in vars(self).items() if name != "records"}


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


def perplexity_of(nats: float) -> float:
    """exp(nats); infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


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

    A line of hellaswag is {"ind", "label", "hash", "karpathy": {"sum": [4], "mean": [4]}, "lm-eval": {"sum": [4],
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
