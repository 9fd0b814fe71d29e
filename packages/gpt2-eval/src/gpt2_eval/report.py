"""Results, their standard errors, and what is written to disk: JSON, and a record of each item."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_model.command import write_whole

# HellaSwag's protocol -> metric -> the kind of score whose highest is the answer.
METRICS = {
    "karpathy": {"acc": "sum", "acc_norm": "mean"},
    "lm-eval": {"acc": "sum", "acc_norm": "char", "acc_bytes": "byte"},
}


@dataclass(frozen=True)
class Estimate:
    """A figure, such as an accuracy from 0 to 1."""

    value: float
    stderr: float  # NaN for a single item
    ties: int | None = None  # of an accuracy: items where several choices share the best score; the first counts


@dataclass(frozen=True)
class Column:
    """A metric, item by item."""

    values: NDArray[np.float64]  # 1 or 0 for right or wrong, else nats
    weights: NDArray[np.float64]  # the metric is the sum of the values divided by the sum of the weights
    answers: NDArray[Any] | None = None  # what the model chose; None for nats
    ties: int | None = None

    def estimate(self) -> Estimate:
        """Return the metric of all items."""
        value = float(self.values.sum() / self.weights.sum())
        return Estimate(value, ratio_standard_error(self.values, self.weights), self.ties)


@dataclass(frozen=True)
class TaskResult:
    """What one model scored on a task: `metrics["karpathy"]["acc_norm"].value`."""

    task: str
    items: int  # scored
    total: int  # in the file: more than `items` if there was a limit
    data_sha256: str  # of the whole file
    doubt: str  # why it is not the published file; empty if it is
    metrics: dict[str, dict[str, Estimate]]  # by protocol and metric
    truncated: dict[str, int]  # by protocol, rows whose context was cut on the left to fit the model
    seconds: float  # of scoring, after the rows were made
    records: list[dict[str, Any]] = field(repr=False)  # one per item, in the file's order; see `write_records`

    @property
    def partial(self) -> bool:
        """True if a limit left items out, so that the numbers are not comparable."""
        return self.items < self.total

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return self._about() | self._figures("lm-eval")

    def _about(self) -> dict[str, Any]:
        names = ("task", "items", "partial", "data_sha256", "seconds")
        return {name: getattr(self, name) for name in names} | {"published_file": not self.doubt}

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
    """The exponential of a text's mean loss per token, word or byte; `stderr` is that of `nats_per_token`."""

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
    """Perplexities of a whole text."""

    task: str
    data_sha256: str
    doubt: str  # why its text is not the published one; empty if it is
    stride: int  # tokens by which the raw windows move on
    perplexities: dict[str, Perplexity]  # by protocol
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        document = asdict(self)
        perplexities: dict[str, Any] = document.pop("perplexities")
        return document | perplexities | {"published_file": not document.pop("doubt")}


@dataclass(frozen=True)
class LossResult:
    """Cross-entropy of a model on the first tokens of a split."""

    split: str
    dataset: str  # the SHA-256 that identifies it, its manifest's `hash`
    loss: float  # nats per token
    stderr: float  # of `loss`, over windows (tokens of one are not independent); NaN for a single window
    perplexity: float  # exp(loss)
    bits_per_byte: float  # per UTF-8 byte of the target text, in which `<|endoftext|>` has none
    tokens: int  # target tokens scored
    tokens_requested: int  # more than `tokens` if the split is smaller
    sequences: int  # windows that the tokens were cut into
    seq_len: int  # tokens per window; the first of each is predicted from one token alone
    seconds: float  # from the first read to the result
    records: list[dict[str, Any]] = field(repr=False)  # one per window: its number, hash, nats, tokens and bytes

    def as_dict(self) -> dict[str, Any]:
        """Return what is written as JSON."""
        return {"task": "loss"} | {name: value for name, value in vars(self).items() if name != "records"}


def columns_of(records: Sequence[dict[str, Any]]) -> dict[str, Column]:
    """Return metric -> its column, from the records of an evaluation; empty for any other records."""
    first, ones = records[0], np.ones(len(records))

    def values(name: str) -> NDArray[np.float64]:
        return np.array([record[name] for record in records], dtype=np.float64)

    if "nats" in first:  # windows of a loss
        return {"loss": Column(values("nats"), values("tokens"))}
    if "greedy" in first:  # single continuations
        hits = {"acc": values("greedy"), "acc_last_token": values("last_greedy")}
        nats = Column(np.array([-record["sum"][0] for record in records]), ones)
        return {name: Column(hit, ones, answers=hit) for name, hit in hits.items()} | {"nats": nats}
    scores = {}
    if "sum" in first:
        scores["acc"] = [record["sum"] for record in records]
        for metric, lengths in (("acc_norm", "chars"), ("acc_bytes", "bytes")):
            if lengths in first:
                scores[metric] = [divided(record["sum"], record[lengths]) for record in records]
    for protocol in [name for name in METRICS if name in first]:
        for metric, kind in METRICS[protocol].items():
            scores[f"{protocol} {metric}"] = [record[protocol][kind] for record in records]
    return {metric: accuracy(rows, [record["label"] for record in records]) for metric, rows in scores.items()}


def accuracy(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> Column:
    """Return which items are right if each answer is the choice with the highest score, the first of equals."""
    best = [max(row) for row in scores]
    answers = np.array([row.index(score) for row, score in zip(scores, best, strict=True)])
    ties = sum(row.count(score) > 1 for row, score in zip(scores, best, strict=True))
    return Column((answers == labels).astype(np.float64), np.ones(len(scores)), answers, ties)


def divided(sums: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Return each sum over the length of its choice."""
    return [total / length for total, length in zip(sums, lengths, strict=True)]


def perplexity_of(nats: float) -> float:
    """exp(nats); infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def ratio_standard_error(totals: NDArray[np.float64], weights: NDArray[Any]) -> float:
    """Return the standard error of sum(totals) / sum(weights); NaN for fewer than two (Cochran 1977, 2.11).

    With equal weights it is lm-evaluation-harness' `mean_stderr`: sample deviation (Bessel) over sqrt(n).
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
    """Write one line per item; the file appears whole or not at all.

    A line of hellaswag is {"ind", "label", "hash", "karpathy": {"sum": [4], "mean": [4]}, "lm-eval": {"sum": [4],
    "char": [4], "byte": [4]}}: log-likelihoods in nats, in total and per token, character and byte.
    """
    with write_whole(path) as file:
        for record in records:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
