"""Text to ids and back: GPT-2's own tokenizer by tiktoken, a folder's by the `tokenizers` library."""

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_model.checkpoints.tokenizer_files import (
    SpecialIds,
    gpt2_rules,
    open_tokenizer,
    read_files,
    read_settings,
    read_special_ids,
    rules,
    special_token,
    vocabulary_file,
)
from gpt2_model.config import EOT, PADDED

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# The pattern of the GPT-2 release, written with possessive quantifiers: same matches, no deep recursion.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def _byte_of() -> dict[str, int]:
    """Return the byte of each of the 256 characters that stand for bytes in a byte-level vocabulary.

    A byte is itself if it is printable, else a character from U+0100 on (openai/gpt-2, src/encoder.py).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; one that was added may have other characters, and is itself."""
    byte = _byte_of()
    return bytes(byte[char] for char in token) if all(char in byte for char in token) else token.encode()


@cache
def get_tokenizer() -> "tiktoken.Encoding":
    """Return GPT-2's tokenizer: 50,257 tokens, the last one `<|endoftext|>`.

    Use `encode_ordinary` for text from others: it never turns text into a special token.
    """
    import tiktoken

    symbols: dict[str, int] = json.loads(vocabulary_file("encoder.json"))
    symbols.pop("<|endoftext|>")
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=EOT + 1,
        pat_str=_PATTERN,
        mergeable_ranks={_token_bytes(symbol): rank for symbol, rank in symbols.items()},
        special_tokens={"<|endoftext|>": EOT},
    )


class Tokenizer:
    """A tokenizer turns a model's text into ids and back. Without files it is GPT-2's own; they are parsed late.

    If they cannot be followed exactly, all that needs them raises a ValueError, which is also the `problem`.

    Attributes:
        files: the folder's tokenizer files as they are, by name; saving the model writes them again.
        ids: what the folder's config.json and generation_config.json say of special ids.
    """

    def __init__(
        self, files: Mapping[str, bytes] | None = None, ids: SpecialIds | None = None, source: str = "",
        eot: int | None = None,
    ) -> None:  # fmt: skip
        self.files, self.ids = files or {}, ids or SpecialIds()
        self._source, self._eot = source, eot

    def __deepcopy__(self, memo: Any) -> "Tokenizer":
        return self  # nothing in it ever changes

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer | None":
        """None is GPT-2's own tokenizer."""
        return open_tokenizer(self.files, self._source, self.ids.vocab_size) if self.files else None

    @cached_property
    def problem(self) -> str | None:
        """The reason why this tokenizer cannot be followed exactly, in a line; None if it can."""
        try:
            self._library  # noqa: B018
        except ValueError as error:
            return str(error)
        return None

    @property
    def is_gpt2(self) -> bool:
        """True if this is GPT-2's own: any text gets the ids that `get_tokenizer` gives it."""
        return self.problem is None and self._library is None

    @cached_property
    def _tokens(self) -> dict[int, str]:
        """The tokens by id, as the library writes them; GPT-2's own are left to tiktoken."""
        return {} if self._library is None else {token: text for text, token in self._library.get_vocab().items()}

    @cached_property
    def num_tokens(self) -> int:
        """The highest id and one: ids from there on only pad the model's vocabulary."""
        return EOT + 1 if self._library is None else max(self._tokens, default=-1) + 1

    @cached_property
    def num_base(self) -> int:
        """The highest id that is not an added token's, and one: text needs a vocabulary of this size."""
        library = self._library
        return EOT if library is None else max(library.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @cached_property
    def holes(self) -> list[int]:
        """Ids below num_tokens that stand for no token."""
        return [] if self._library is None else sorted(set(range(self.num_tokens)) - self._tokens.keys())

    @property
    def eot(self) -> int | None:
        """The id that stands before a text, and from which one without a prompt begins; None if there is none."""
        own = () if self._eot is None else (self._eot,)
        return next(iter((*own, *self.ids.bos, *self.ids.eos, *self._named("bos_token", "eos_token"))), None)

    @property
    def prefix(self) -> int | None:
        """The id that stands for an empty context: `eot`, but the tokenizer's bos or eos first, as in lm-eval."""
        return next(iter(self._named("bos_token", "eos_token")), self.eot) if self._eot is None else self._eot

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return (self.ids.eos or self._named("eos_token")) if self._eot is None else (self._eot,)

    def _named(self, *names: str) -> tuple[int, ...]:
        """Return the ids of the special tokens that the files name."""
        if self.problem or self._library is None:
            return () if self.problem else (EOT,)
        texts = [special_token(read_settings(self.files), name) for name in names]
        ids = [None if text is None else self._library.token_to_id(text) for text in texts]
        return tuple(token for token in ids if token is not None)

    def saved_files(self) -> dict[str, Any]:
        """Return what saving a model writes. A dataset has tokenizer.json alone: transformers is told its end, and
        not to take it for GPT-2's, whose split of text it would apply."""
        if self._eot is None or "tokenizer_config.json" in self.files or self._eot not in self._tokens:
            return dict(self.files)
        ends = dict.fromkeys(("bos_token", "eos_token"), self._tokens[self._eot])
        return {**self.files, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **ends}}

    def encode(self, text: str) -> list[int]:
        """Return a text's ids. Special tokens written in it become theirs, but for GPT-2's own tokenizer."""
        if self._library is None:
            return get_tokenizer().encode_ordinary(text)
        return self._library.encode(whole_characters(text)).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens too; ids that stand for no token have none."""
        if self._library is None:
            return get_tokenizer().decode([token for token in ids if token <= EOT])
        return self._library.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _is_byte_level(self) -> bool:
        from tokenizers.decoders import ByteLevel

        return self._library is None or isinstance(self._library.decoder, ByteLevel)

    def token_bytes(self) -> list[bytes]:
        """Return each id's bytes, b"" for special tokens and holes. ValueError if it is not byte-level."""
        if not self._is_byte_level:
            raise ValueError(f"the tokenizer in {self._source} is not byte-level: a token has no bytes")
        special = {EOT}
        if self._library is not None:
            added = self._library.get_added_tokens_decoder()
            special = {token for token, entry in added.items() if entry.special}
        return [b"" if token in special else self._bytes(token) for token in range(self.num_tokens)]

    def _bytes(self, token: int) -> bytes:
        if self._library is None:
            return get_tokenizer().decode_single_token_bytes(token) if token <= EOT else b""
        return _token_bytes(self._tokens.get(token, ""))

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[int | None], str]:
        """Return a function that takes a row's tokens one by one, None for the end, and returns the text they add.

        An incomplete character waits for the next token; invalid UTF-8 becomes U+FFFD.
        """
        if self._library is None or self._is_byte_level:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda token: decoder.decode(b"" if token is None else self._bytes(token), final=token is None)
        ids = list(prompt)
        shown = len(self.decode(ids).rstrip("\ufffd"))

        def add(token: int | None) -> str:
            nonlocal shown  # a token's text depends on its neighbours
            ids.extend([] if token is None else [token])
            text = self.decode(ids)
            text = text if token is None else text.rstrip("\ufffd")
            start, shown = shown, max(shown, len(text))
            return text[start:]

        return add

    def same_ids(self, other: "Tokenizer") -> bool:
        """True if no text without special tokens gets other ids; tokens that were added do not matter."""
        return self is other or (self.is_gpt2 and other.is_gpt2) or self._rules == other._rules

    @cached_property
    def _rules(self) -> tuple[Any, ...]:
        """All that decides on the ids of a text without added tokens."""
        if self._library is None:
            return gpt2_rules(), []
        return rules(json.loads(self._library.to_str())), self._library.encode("").ids


def whole_characters(text: str) -> str:
    """Return a text without half surrogate pairs, as tiktoken reads it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_tokenizer(folder: str | Path, eot: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of a folder, such as a model's or a dataset's; None if it has no tokenizer files.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt; and maybe tokenizer_config.json and the like.
        eot: the id that stands before a text and ends one, in place of what the folder's files say.
    """
    files = read_files(Path(folder))
    return Tokenizer(files, read_special_ids(Path(folder)), str(folder), eot) if files else None


def model_tokenizer(vocab_size: int, folder: Path | None) -> tuple[Tokenizer | None, SpecialIds]:
    """Return a model's tokenizer and special ids: its folder's, or GPT-2's if the vocabulary is as large."""
    ids = read_special_ids(folder) if folder else SpecialIds()
    own = Tokenizer({}, ids) if EOT < vocab_size <= PADDED else None
    return (folder and load_tokenizer(folder)) or own, ids


def describe_tokenizer(vocab_size: int, folder: Path | None) -> str:
    """Return a line on a model's tokenizer and the ids that end its texts."""
    tokenizer, ids = model_tokenizer(vocab_size, folder)
    if tokenizer and tokenizer.problem:
        return tokenizer.problem
    ends = tokenizer.stop_ids if tokenizer else ids.eos
    own = f"its own, {tokenizer.num_tokens:,} tokens" if tokenizer else "none"
    name = "GPT-2's" if tokenizer and tokenizer.is_gpt2 else own
    return f"{name}, texts end at {' or '.join(map(str, ends))}" if ends else name
