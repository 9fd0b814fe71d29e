"""HellaSwag (Zellers et al. 2019): items -> rows -> accuracies, by the two protocols that publish numbers.

karpathy  build-nanogpt's and llm.c's `hellaswag.py`. The raw `ctx`, then " " + the raw ending, tokenised apart.
          acc: highest sum of log-probabilities; acc_norm: highest mean per token.
          OpenAI's 124M: acc 28.59 %, acc_norm 29.55 % (build-nanogpt, TF32).
lm-eval   lm-evaluation-harness' `hellaswag`. The activity, `ctx_a` and the capitalised `ctx_b`, with WikiHow's
          tags taken out of these and of the endings. acc: highest sum; acc_norm: highest sum per character of
          the ending; acc_bytes: per UTF-8 byte. OpenAI's 124M: acc 28.92 %, acc_norm 31.14 % (build-nanogpt).
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from gpt2_eval.models import Encoder, LanguageModel, apart, gpt2_encoder, joint
from gpt2_eval.packing import Row
from gpt2_eval.published import Published, find_file, read_items, short_hash
from gpt2_eval.report import HellaSwagResult, accuracy
from gpt2_eval.scoring import ScoringOptions, count_truncated, score_items

Array = NDArray[np.float64]
# 10,042 items, on which all published numbers are.
PUBLISHED = Published(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)

# Protocol -> metric -> the per-item scores whose highest is the answer.
METRICS = {
    "karpathy": {"acc": "sum", "acc_norm": "mean"},
    "lm-eval": {"acc": "sum", "acc_norm": "char", "acc_bytes": "byte"},
}
TEXTS = ("activity_label", "ctx_a", "ctx_b", "ctx")


@dataclass(frozen=True)
class HellaSwagItem:
    """One question, tokenised for both protocols."""

    ind: int  # its number in the published data
    label: int  # index of the right ending, 0 to 3
    rows: dict[str, list[Row]]  # protocol -> one row an ending
    chars: list[int]  # of each ending as lm-eval counts them: cleaned, without the blank before it
    bytes: list[int]
    hash: str  # of its texts, by which `compare` knows that two models answered the same question


@dataclass(frozen=True)
class HellaSwag:
    """Items tokenised once for any number of evaluations; `total` and `sha256` are of the whole file."""

    items: Sequence[HellaSwagItem]
    total: int
    sha256: str


def load_hellaswag(
    path: str | Path | None = None, *, limit: int | None = None, encoder: Encoder | None = None
) -> HellaSwag:
    """Read, check and tokenise a HellaSwag file (.jsonl, or the hub's .parquet), or its first `limit` items.

    Args:
        path: the published file, downloaded once, if None.
        encoder: of the model that is to be evaluated; GPT-2's if None.

    Raises:
        OSError: no such file, or it cannot be downloaded.
        ValueError: lines are not HellaSwag items with a label.
    """
    file, sha256 = find_file(PUBLISHED, path)
    encoder = encoder or gpt2_encoder()
    items, total = read_items(file, lambda record: _item(record, encoder), limit)
    return HellaSwag(items, total, sha256)


def evaluate_hellaswag(
    model: LanguageModel,
    data: HellaSwag | str | Path,
    *,
    protocol: str = "both",
    **options: Unpack[ScoringOptions],
) -> HellaSwagResult:
    """Score `data`, a file or the items that `load_hellaswag` read, by one protocol or by both in one pass.

    Where torch.distributed is initialised, every rank must call this; each gets the whole result.

    Args:
        protocol: "karpathy", "lm-eval" or "both".
        options: those of `score_items`, and so are the errors, beside those of `load_hellaswag`.
    """
    if protocol not in (*METRICS, "both"):
        raise ValueError(f"unknown protocol {protocol!r}: choose karpathy, lm-eval or both")
    if not isinstance(data, HellaSwag):
        data = load_hellaswag(data)
    items = data.items
    start = time.perf_counter()
    rows = {name: [item.rows[name] for item in items] for name in METRICS if protocol in (name, "both")}
    scored = score_items(model, list(chain.from_iterable(rows.values())), **options)
    sums = np.array([[row.logprob for row in four] for four in scored]).reshape(len(rows), len(items), 4)
    scores = {name: _scores(name, items, sums[number]) for number, name in enumerate(rows)}
    labels = np.array([item.label for item in items])
    return HellaSwagResult(
        task="hellaswag",
        items=len(items),
        total=data.total,
        data_sha256=data.sha256,
        metrics={
            name: {metric: accuracy(scores[name][kind], labels) for metric, kind in METRICS[name].items()}
            for name in rows
        },
        truncated={name: count_truncated(fours, model.config.block_size) for name, fours in rows.items()},
        seconds=time.perf_counter() - start,
        records=[
            {"ind": item.ind, "label": item.label, "hash": item.hash}
            | {name: {kind: values[i].tolist() for kind, values in scores[name].items()} for name in rows}
            for i, item in enumerate(items)
        ],
    )


def _scores(protocol: str, items: Sequence[HellaSwagItem], sums: Array) -> dict[str, Array]:
    """Divide the sums by the lengths of the endings: kind of score -> (items, 4)."""
    if protocol == "karpathy":
        tokens = [[len(row.continuation) for row in item.rows[protocol]] for item in items]
        return {"sum": sums, "mean": sums / tokens}
    chars, utf8 = [item.chars for item in items], [item.bytes for item in items]
    return {"sum": sums, "char": sums / chars, "byte": sums / utf8}


def clean(text: str) -> str:
    """Return lm-evaluation-harness' `preprocess`, bug for bug (lm_eval/tasks/hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _item(record: dict[str, Any], encoder: Encoder) -> HellaSwagItem:
    """Check and tokenise a record; a ValueError says what is wrong with it."""
    missing = [name for name in ("ind", *TEXTS, "endings") if name not in record]
    if record.get("label", "") == "":  # as the hub's copy of the test split has it
        missing.append("label (the test split has none; use the validation split)")
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    ind, label, endings = record["ind"], record["label"], record["endings"]
    texts = {name: record[name] for name in TEXTS}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ValueError(f"{wrong[0]} is not text")
    if type(ind) is not int:
        raise ValueError(f"ind {ind!r} is not a whole number")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
        raise ValueError("endings is not a list of four texts")
    if type(label) is bool or str(label) not in ("0", "1", "2", "3"):  # the hub's copy of the data has texts
        raise ValueError(f"label {label!r} is not 0, 1, 2 or 3")
    cleaned = [clean(ending) for ending in endings]
    if "" in cleaned:
        raise ValueError(f"ending {cleaned.index('')} is empty, or nothing but [tags]")
    context = clean(f"{texts['activity_label']}: {texts['ctx_a']} {texts['ctx_b'].capitalize()}")
    rows = {
        "karpathy": [apart(encoder, texts["ctx"], f" {ending}") for ending in endings],
        "lm-eval": [joint(encoder, context, f" {ending}") for ending in cleaned],
    }
    # JSON can write half a surrogate pair: UnicodeEncodeError is a ValueError.
    chars, utf8 = [len(ending) for ending in cleaned], [len(ending.encode()) for ending in cleaned]
    return HellaSwagItem(ind, int(label), rows, chars, utf8, short_hash(texts, endings))
