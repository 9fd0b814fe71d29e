"""Results, their standard errors, and what is written of them: JSON, and a record of each item."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_model.command import write_whole


@dataclass(frozen=True)
class Estimate:
    """A figure, such as an accuracy from 0 to 1."""

    value: float
    stderr: float  # NaN for a single item
    ties: int | None = None  # of an accuracy, items whose best score several choices share; the first is taken


@dataclass(frozen=True)
class TaskResult:
    """What one model scored on a task.

    Attributes:
        task: the task's name.
        items: number of items scored.
        total: number of items in the file; more than `items` under a limit.
        data_sha256: of the whole data file.
        metrics: protocol -> metric -> Estimate: `metrics["karpathy"]["acc_norm"].value`.
        truncated: protocol -> rows whose context was cut on the left to fit the model.
        seconds: from the rows to the scores.
        records: one mapping an item, in the file's order; see `write_records`.
    """

    task: str
    items: int
    total: int
    data_sha256: str
    metrics: dict[str, dict[str, Estimate]]
    truncated: dict[str, int]
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)

    @property
    def partial(self) -> bool:
        """True if a limit left items out, so that the numbers are not comparable."""
        return self.items < self.total

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return self._about() | self._figures("lm-eval")

    def _about(self) -> dict[str, Any]:
        names = ("task", "items", "partial", "data_sha256", "seconds")
        return {name: getattr(self, name) for name in names}

    def _figures(self, protocol: str) -> dict[str, Any]:
        metrics = self.metrics[protocol]
        return {
            **{name: metric.value for name, metric in metrics.items()},
            **{f"{name}_stderr": metric.stderr for name, metric in metrics.items()},
            "ties": {name: metric.ties for name, metric in metrics.items() if metric.ties is not None},
            "truncated": self.truncated[protocol],
        }


class HellaSwagResult(TaskResult):
    """What one model scored on HellaSwag, by one protocol or both."""

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON. A protocol's `stderr` is that of its headline metric, `acc_norm`."""
        return self._about() | {
            protocol: {"stderr": metrics["acc_norm"].stderr} | self._figures(protocol)
            for protocol, metrics in self.metrics.items()
        }


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss of a text, by what the mean is over; `stderr` is that of `nats_per_token`."""

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
    """Perplexities of a text as a whole."""

    task: str
    data_sha256: str
    stride: int  # tokens by which the raw windows move on
    perplexities: dict[str, Perplexity]  # by protocol
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        document = asdict(self)
        perplexities: dict[str, Any] = document.pop("perplexities")
        return document | perplexities


@dataclass(frozen=True)
class LossResult:
    """Cross-entropy of a model on the first tokens of a split.

    Attributes:
        split: the split's name.
        dataset: SHA-256 that identifies the dataset, its manifest's `hash`.
        loss: nats per token.
        stderr: of `loss`, over windows (tokens of one window are not independent); NaN for a single one.
        perplexity: exp(loss).
        bits_per_byte: bits per UTF-8 byte of the target text, in which `<|endoftext|>` has no bytes.
        tokens: target tokens scored.
        tokens_requested: more than `tokens` where the split is smaller.
        sequences: windows that the tokens were cut into.
        seq_len: tokens a window; the first of each is predicted from one token alone.
        seconds: from the first read to the result.
        records: one mapping a window: "window" (its number), "nats", "tokens" and "bytes".
    """

    split: str
    dataset: str
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
        """Return what is written as JSON."""
        return {"task": "loss"} | {name: value for name, value in vars(self).items() if name != "records"}


def accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Estimate:
    """Return the accuracy of taking the highest score: scores (items, choices), labels (items,)."""
    best = scores.max(axis=1, keepdims=True)
    correct = (scores.argmax(axis=1) == labels).astype(np.float64)  # argmax takes the lowest index of equals
    ties = int(((scores == best).sum(axis=1) > 1).sum())
    return Estimate(float(correct.mean()), standard_error(correct), ties)


def standard_error(values: NDArray[np.float64]) -> float:
    """Return sample deviation (Bessel) over sqrt(n), lm-evaluation-harness' `mean_stderr`; NaN below two."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def perplexity_of(nats: float) -> float:
    """exp(nats); infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def ratio_standard_error(totals: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    """Return the standard error of sum(totals) / sum(weights); NaN below two (Cochran 1977, section 2.11)."""
    n = totals.size
    if n < 2:
        return math.nan
    residuals = totals - totals.sum() / weights.sum() * weights
    return float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / weights.sum())


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, which JSON writes as null: `NaN` is not JSON, and parsers refuse it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return value


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one line an item; the file appears whole or not at all.

    A line of hellaswag is {"ind", "label", "hash", "karpathy": {"sum": [4], "mean": [4]}, "lm-eval": {"sum": [4],
    "char": [4], "byte": [4]}}: log-likelihoods in nats, as they are and by token, character and byte.
    """
    with write_whole(path) as file:
        for record in records:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
