"""Results: accuracies with standard errors, records of each item on disk, and the JSON that programs rely on."""

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
    """A figure, such as an accuracy from 0 to 1.

    Attributes:
        stderr: its standard error; NaN for a single item.
        ties: of an accuracy, items whose best score is shared by several choices; the lowest index is taken.
    """

    value: float
    stderr: float
    ties: int | None = None


@dataclass(frozen=True)
class HellaSwagResult:
    """What one model scored on HellaSwag.

    Attributes:
        items: number of items scored.
        partial: items were left out by a limit, so that the numbers are not comparable.
        data_sha256: of the whole data file.
        metrics: protocol -> metric -> Estimate: `metrics["karpathy"]["acc_norm"].value`.
        truncated: protocol -> rows (four an item) whose context was cut on the left to fit the model.
        seconds: from the rows to the scores.
        records: one mapping an item, in the file's order; see `write_records`.
    """

    items: int
    partial: bool
    data_sha256: str
    metrics: dict[str, dict[str, Estimate]]
    truncated: dict[str, int]
    seconds: float
    records: list[dict[str, Any]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON. A protocol's `stderr` is that of its headline metric, `acc_norm`."""
        result = {name: getattr(self, name) for name in ("items", "partial", "data_sha256", "seconds")}
        for name, metrics in self.metrics.items():
            headline = {"stderr": metrics["acc_norm"].stderr}
            result[name] = headline | _metrics_dict(metrics, self.truncated[name])
        return {"task": "hellaswag"} | result


@dataclass(frozen=True)
class TaskResult:
    """What one model scored on a task of tasks.py.

    Attributes:
        task: the task's name.
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
        """Return what is written as JSON."""
        names = ("task", "items", "partial", "data_sha256", "seconds")
        return {name: getattr(self, name) for name in names} | _metrics_dict(self.metrics, self.truncated)


def _metrics_dict(metrics: Mapping[str, Estimate], truncated: int) -> dict[str, Any]:
    return {
        **{name: metric.value for name, metric in metrics.items()},
        **{f"{name}_stderr": metric.stderr for name, metric in metrics.items()},
        "ties": {name: metric.ties for name, metric in metrics.items() if metric.ties is not None},
        "truncated": truncated,
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
    """What a model makes of a text as a whole.

    Attributes:
        stride: tokens by which the raw windows move on.
        perplexities: protocol -> Perplexity.
    """

    corpus: str
    data_sha256: str
    stride: int
    perplexities: dict[str, Perplexity]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        protocols = {name: asdict(perplexity) for name, perplexity in self.perplexities.items()}
        about = {"task": self.corpus, "data_sha256": self.data_sha256, "stride": self.stride}
        return about | protocols | {"seconds": self.seconds}


@dataclass(frozen=True)
class LossResult:
    """Cross-entropy of a model on the first tokens of a split.

    Attributes:
        loss: nats per token.
        stderr: standard error of `loss` over sequences (tokens of one sequence are not independent); NaN for a
            single sequence.
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
        """Return what is written as JSON."""
        return {name: value for name, value in vars(self).items() if name != "records"}


def accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Estimate:
    """Return the accuracy of taking the highest score: scores (items, choices), labels (items,).

    The standard error is sample deviation (Bessel) over sqrt(n), lm-evaluation-harness' `mean_stderr`.
    """
    best = scores.max(axis=1, keepdims=True)
    correct = (scores.argmax(axis=1) == labels).astype(np.float64)  # argmax takes the lowest index of equals
    ties = int(((scores == best).sum(axis=1) > 1).sum())
    return Estimate(float(correct.mean()), standard_error(correct), ties)


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of a mean of independent values, sample deviation over sqrt(n); NaN below two."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def perplexity_of(nats: float) -> float:
    """exp(nats); infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def ratio_standard_error(totals: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    """Return the standard error of sum(totals) / sum(weights); NaN below two.

    With equal weights it is that of the mean of totals / weight. Source: Cochran 1977, "Sampling Techniques",
    section 2.11, the ratio estimator.
    """
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
