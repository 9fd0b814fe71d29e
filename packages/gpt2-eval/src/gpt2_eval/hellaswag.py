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
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

from gpt2_eval.models import Encoder, LanguageModel, encoder_of, gpt2_encoder, joint, tokenizer_encoder
from gpt2_eval.packing import Row
from gpt2_eval.published import Fields, Published, find_file, read_items, short_hash
from gpt2_eval.report import METRICS, HellaSwagResult, columns_of, divided
from gpt2_eval.scoring import ScoringOptions, count_truncated, score_items
from gpt2_model import Tokenizer

# The items of all published numbers.
PUBLISHED = Published(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    10_042,
)
TEXTS = ("activity_label", "ctx_a", "ctx_b", "ctx")
FIELDS: Fields = {"ind": None, "label": None, "endings": None, **dict.fromkeys(TEXTS, str)}  # None: see `_item`


@dataclass(frozen=True)
class HellaSwagItem:
    """One question, tokenised for both protocols."""

    ind: int  # its number in the published data
    label: int  # index of the right ending, 0 to 3
    rows: dict[str, list[Row]]  # protocol -> one row per ending
    # Protocol -> kind of score -> what each ending's sum is divided by. lm-eval counts the characters and bytes of
    # the cleaned ending, without the blank before it.
    lengths: dict[str, dict[str, list[int]]]
    hash: str  # of its texts; shows `compare` that two models answered the same question


@dataclass(frozen=True)
class HellaSwag:
    """Items tokenised once for any number of evaluations; `total` and `sha256` are of the whole file."""

    items: Sequence[HellaSwagItem]
    total: int
    sha256: str
    doubt: str = ""  # why it is not the published file
    path: str | Path | None = None
    limit: int | None = None
    encoder: Encoder | None = None


def load_hellaswag(
    path: str | Path | None = None, *, limit: int | None = None, encoder: Encoder | Tokenizer | None = None
) -> HellaSwag:
    """Read, check and tokenise a HellaSwag file (.jsonl, or the hub's .parquet), or its first `limit` items.

    Args:
        path: the published file, downloaded once, if None.
        encoder: the tokenizer of the model to evaluate; GPT-2's if None.

    Raises:
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: lines are not HellaSwag items with a label.
    """
    file, sha256 = find_file(PUBLISHED, path)
    encoder = tokenizer_encoder(encoder) if isinstance(encoder, Tokenizer) else encoder or gpt2_encoder()
    items, total = read_items(file, lambda record: _item(record, encoder), limit, FIELDS)
    return HellaSwag(items, total, sha256, PUBLISHED.doubt(sha256, total, path is not None), path, limit, encoder)


_reload = lru_cache(maxsize=1)(load_hellaswag)  # training evaluates the same items again and again


def evaluate_hellaswag(
    model: LanguageModel,
    data: HellaSwag | str | Path,
    *,
    protocol: str = "both",
    **options: Unpack[ScoringOptions],
) -> HellaSwagResult:
    """Score `data`, a file or the items that `load_hellaswag` read, by one protocol or by both in one pass.

    Items that were tokenized for another tokenizer than the model's are read and tokenized again, once.

    Where torch.distributed is initialised, every rank must call this; each gets the whole result.

    Args:
        protocol: "karpathy", "lm-eval" or "both".
        options: those of `score_items`, and so are the errors, beside those of `load_hellaswag`.
    """
    if protocol not in (*METRICS, "both"):
        raise ValueError(f"unknown protocol {protocol!r}: choose karpathy, lm-eval or both")
    encoder = encoder_of(model)
    if not isinstance(data, HellaSwag):
        data = load_hellaswag(data, encoder=encoder)
    elif data.encoder not in (None, encoder):
        data = _reload(data.path, limit=data.limit, encoder=encoder)
    start = time.perf_counter()
    rows = {name: [item.rows[name] for item in data.items] for name in METRICS if protocol in (name, "both")}
    scored = iter(score_items(model, [four for fours in rows.values() for four in fours], **options))
    records = [dict[str, Any](ind=item.ind, label=item.label, hash=item.hash) for item in data.items]
    for name in rows:
        for item, record in zip(data.items, records, strict=True):
            sums = [row.logprob for row in next(scored)]
            record[name] = {"sum": sums} | {kind: divided(sums, by) for kind, by in item.lengths[name].items()}
    columns = columns_of(records)
    return HellaSwagResult(
        task="hellaswag",
        items=len(data.items),
        total=data.total,
        data_sha256=data.sha256,
        doubt=data.doubt,
        metrics={
            name: {metric: columns[f"{name} {metric}"].estimate() for metric in METRICS[name]} for name in rows
        },
        truncated={name: count_truncated(fours, model.config.block_size) for name, fours in rows.items()},
        seconds=time.perf_counter() - start,
        records=records,
    )


def clean(text: str) -> str:
    """Clean a text as lm-evaluation-harness' `preprocess` does, bug for bug (lm_eval/tasks/hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _item(record: dict[str, Any], encoder: Encoder) -> HellaSwagItem:
    """Check and tokenise a record; a ValueError says what is wrong with it."""
    if record.get("label", "") == "":  # as in the hub's copy of the test split
        raise ValueError("no label: the test split has none, use the validation split")
    ind, label, endings = record["ind"], record["label"], record["endings"]
    texts = {name: record[name] for name in TEXTS}
    if type(ind) is not int:
        raise ValueError(f"ind {ind!r} is not a whole number")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
        raise ValueError("endings is not a list of four texts")
    if type(label) is bool or str(label) not in ("0", "1", "2", "3"):  # the hub's copy of the data has strings
        raise ValueError(f"label {label!r} is not 0, 1, 2 or 3")
    cleaned = [clean(ending) for ending in endings]
    if "" in cleaned:
        raise ValueError(f"ending {cleaned.index('')} is empty, or nothing but [tags]")
    given = encoder.begin(texts["ctx"]) or [encoder.prefix]
    context = clean(f"{texts['activity_label']}: {texts['ctx_a']} {texts['ctx_b'].capitalize()}")
    rows = {
        "karpathy": [Row(given, encoder.go_on(f" {ending}")) for ending in endings],
        "lm-eval": [joint(encoder, context, f" {ending}") for ending in cleaned],
    }
    lengths = {
        "karpathy": {"mean": [len(row.continuation) for row in rows["karpathy"]]},
        # JSON can write half a surrogate pair: UnicodeEncodeError is a ValueError.
        "lm-eval": {"char": [len(text) for text in cleaned], "byte": [len(text.encode()) for text in cleaned]},
    }
    return HellaSwagItem(ind, int(label), rows, lengths, short_hash(texts, endings))
