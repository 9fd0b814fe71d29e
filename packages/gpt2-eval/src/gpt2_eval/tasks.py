"""HellaSwag (Zellers et al. 2019): items -> rows -> accuracies, by the two protocols that publish numbers.

karpathy  build-nanogpt's and llm.c's `hellaswag.py`. The raw `ctx`, then " " + the raw ending, tokenised apart.
          acc: highest sum of log-probabilities; acc_norm: highest mean per token.
          OpenAI's 124M: acc 28.59 %, acc_norm 29.55 % (build-nanogpt, TF32).
lm-eval   lm-evaluation-harness' `hellaswag`. The activity, `ctx_a` and the capitalised `ctx_b`, with WikiHow's
          tags taken out of these and of the endings. acc: highest sum; acc_norm: highest sum per character of
          the ending; acc_bytes: per UTF-8 byte. OpenAI's 124M: acc 28.92 %, acc_norm 31.14 % (build-nanogpt).
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt2_model import get_tokenizer

from .report import HellaSwagResult, accuracy
from .scoring import LanguageModel, Row, count_truncated, score_rows

# hellaswag_val.jsonl of github.com/rowanz/hellaswag: 10,042 items, on which all published numbers are.
PUBLISHED_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

# Protocol -> metric -> the per-item scores whose highest is the answer.
METRICS = {
    "karpathy": {"acc": "sum", "acc_norm": "mean"},
    "lm-eval": {"acc": "sum", "acc_norm": "char", "acc_bytes": "byte"},
}
PROTOCOLS = tuple(METRICS)


@dataclass(frozen=True)
class HellaSwagItem:
    """One question, tokenised for both protocols.

    Attributes:
        ind: the item's number in the published data.
        label: index of the right ending, 0 to 3.
        rows: protocol -> one row an ending.
        chars: characters of each ending as lm-eval counts them: cleaned, without the blank before it.
        bytes: the same in UTF-8.
    """

    ind: int
    label: int
    rows: dict[str, list[Row]]
    chars: list[int]
    bytes: list[int]


@dataclass(frozen=True)
class HellaSwag:
    """Items of a file, tokenised once for any number of evaluations.

    Attributes:
        items: in the file's order.
        total: items in the file; more than `items` under a limit.
        sha256: of the whole file.
    """

    items: Sequence[HellaSwagItem]
    total: int
    sha256: str


def load_hellaswag(path: str | Path, *, limit: int | None = None) -> HellaSwag:
    """Read, check and tokenise a HellaSwag .jsonl file, or its first `limit` items.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a HellaSwag item with a label, as file:line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    data = path.read_bytes()
    # At b"\n" alone: str.splitlines would cut at U+2028 and others, which stand inside JSON strings.
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no items")
    items = [_item(line, f"{path}:{number}") for number, line in lines[:limit]]
    return HellaSwag(items, len(lines), hashlib.sha256(data).hexdigest())


def evaluate_hellaswag(
    model: LanguageModel,
    data: HellaSwag | str | Path,
    *,
    protocol: str = "both",
    limit: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
) -> HellaSwagResult:
    """Score `data`, a file or what `load_hellaswag` made of it, by one protocol or by both in one pass.

    Where torch.distributed is initialised, every rank must call this; each gets the whole result.

    Args:
        protocol: "karpathy", "lm-eval" or "both".
        limit: the first so many items only; the result is then marked partial.
        batch_size, device, autocast_dtype, progress, stop: as in `score_rows`; four rows an item and protocol.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown protocol, bad data, or a model whose scores are not finite.
        Interrupted: `stop` said True, here or on another rank.
    """
    if protocol not in (*PROTOCOLS, "both"):
        raise ValueError(f"unknown protocol {protocol!r}: choose karpathy, lm-eval or both")
    if not isinstance(data, HellaSwag):
        data = load_hellaswag(data, limit=limit)
    items = data.items[:limit]
    protocols = PROTOCOLS if protocol == "both" else (protocol,)
    start = time.perf_counter()
    rows = {name: [row for item in items for row in item.rows[name]] for name in protocols}
    sums = score_rows(
        model,
        [row for name in protocols for row in rows[name]],
        batch_size=batch_size,
        device=device,
        autocast_dtype=autocast_dtype,
        progress=progress,
        stop=stop,
    ).reshape(len(protocols), len(items), 4)
    scores = {name: _scores(name, items, sums[number]) for number, name in enumerate(protocols)}
    labels = np.array([item.label for item in items])
    return HellaSwagResult(
        items=len(items),
        partial=len(items) < data.total,
        data_sha256=data.sha256,
        metrics={
            name: {metric: accuracy(scores[name][kind], labels) for metric, kind in METRICS[name].items()}
            for name in protocols
        },
        truncated={name: count_truncated(rows[name], model.config.block_size) for name in protocols},
        seconds=time.perf_counter() - start,
        records=[
            {"ind": item.ind, "label": item.label}
            | {name: {kind: scores[name][kind][i].tolist() for kind in scores[name]} for name in protocols}
            for i, item in enumerate(items)
        ],
    )


def _scores(
    protocol: str, items: Sequence[HellaSwagItem], sums: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Per-item scores by name, each (items, 4)."""
    if protocol == "karpathy":
        lengths = np.array([[len(row.continuation) for row in item.rows[protocol]] for item in items])
        return {"sum": sums, "mean": sums / lengths}
    chars, utf8 = np.array([item.chars for item in items]), np.array([item.bytes for item in items])
    return {"sum": sums, "char": sums / chars, "byte": sums / utf8}


def clean(text: str) -> str:
    """lm-evaluation-harness' `preprocess`, bug for bug (lm_eval/tasks/hellaswag/utils.py).

    The blanks are stripped before the tags go, so "[substeps] Many" becomes " Many"; text in brackets that is
    no tag goes too; and three blanks become two.
    """
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def _item(line: bytes, where: str) -> HellaSwagItem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    try:
        ind, label, texts, endings = _fields(record)
        cleaned = [clean(ending) for ending in endings]
        for number, ending in enumerate(cleaned):
            if not ending:
                raise ValueError(f"ending {number} is empty, or nothing but [tags]")
        return HellaSwagItem(
            ind=ind,
            label=label,
            rows={"karpathy": _karpathy_rows(texts["ctx"], endings), "lm-eval": _lm_eval_rows(texts, cleaned)},
            chars=[len(ending) for ending in cleaned],
            bytes=[len(ending.encode()) for ending in cleaned],
        )
    except ValueError as error:  # among them UnicodeEncodeError: JSON can write half a surrogate pair
        raise ValueError(f"{where}: {error}") from None


def _fields(record: Any) -> tuple[int, int, dict[str, str], list[str]]:
    """ind, label, texts and endings of a line's JSON; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    names = ("activity_label", "ctx_a", "ctx_b", "ctx")
    missing = [name for name in ("ind", *names, "endings", "label") if name not in record]
    if missing:
        hint = " (the test split has none; use the validation split)" if missing == ["label"] else ""
        raise ValueError(f"no {', '.join(missing)}{hint}")
    for name in names:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is not text")
    ind, label, endings = record["ind"], record["label"], record["endings"]
    if type(ind) is not int:
        raise ValueError(f"ind {ind!r} is not a whole number")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
        raise ValueError("endings is not a list of four texts")
    if label in ("0", "1", "2", "3"):  # as Hugging Face's copy of the data writes them
        label = int(label)
    if type(label) is not int or not 0 <= label <= 3:
        raise ValueError(f"label {label!r} is not 0, 1, 2 or 3")
    return ind, label, {name: record[name] for name in names}, endings


def _karpathy_rows(context: str, endings: Sequence[str]) -> list[Row]:
    encode = get_tokenizer().encode_ordinary
    ids = encode(context)
    return [Row(ids, encode(" " + ending)) for ending in endings]


def _lm_eval_rows(texts: dict[str, str], endings: Sequence[str]) -> list[Row]:
    """The whole is tokenised and cut at the context's length, as lm-eval's `_encode_pair` does it.

    Source: lm_eval/tasks/hellaswag/utils.py and lm_eval/api/model.py (TemplateLM), commit 4e7e0d4.
    """
    encode = get_tokenizer().encode_ordinary
    context = clean(f"{texts['activity_label']}: {texts['ctx_a']} {texts['ctx_b'].capitalize()}")
    stripped = context.rstrip()  # blanks that end the context are scored with the continuation
    ids = encode(stripped)
    return [Row(ids, encode(f"{context} {ending}")[len(ids) :]) for ending in endings]
