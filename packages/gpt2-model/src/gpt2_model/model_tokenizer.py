"""The tokenizer of a model: GPT-2's own, by tiktoken, or its folder's, by the `tokenizers` library."""

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_model.checkpoints.tokenizer_files import (
    SpecialIds,
    open_tokenizer,
    read_files,
    read_settings,
    read_special_ids,
    special_token,
)
from gpt2_model.tokenizer import EOT, PADDED, byte_level_json, get_tokenizer, token_bytes, vocabulary_file

if TYPE_CHECKING:  # GPT-2's own tokenizer does not need it
    import tokenizers


class Tokenizer:
    """How a model's text becomes ids, and ids text; GPT-2's own without files, which are parsed once needed.

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
        """Why this tokenizer cannot be followed exactly, in a line; None if it can."""
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
        """The highest id that is not an added token's, and one: a model must have so many to read text."""
        library = self._library
        return EOT if library is None else max(library.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @cached_property
    def holes(self) -> list[int]:
        """Ids below num_tokens that stand for no token."""
        return [] if self._library is None else sorted(set(range(self.num_tokens)) - self._tokens.keys())

    @property
    def eot(self) -> int | None:
        """The id that stands before a text, and from which one without a prompt begins; None if there is none."""
        ids = (self._eot, self.ids.bos, *self.ids.eos, self._named("bos_token"), self._named("eos_token"))
        return next((token for token in ids if token is not None), None)

    @property
    def prefix(self) -> int | None:
        """The id that stands for an empty context: `eot`, but the tokenizer's bos or eos first, as in lm-eval."""
        own = (self._eot, self._named("bos_token"), self._named("eos_token"), self.eot)
        return next((token for token in own if token is not None), None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        own = self.ids.eos if self._eot is None else (self._eot,)
        named = self._named("eos_token")
        return own or (() if named is None else (named,))

    def _named(self, name: str) -> int | None:
        """Return the id of a special token that the files name."""
        if self.problem or self._library is None:
            return None if self.problem else EOT
        text = special_token(read_settings(self.files), name)
        return None if text is None else self._library.token_to_id(text)

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
        if self._library is None:
            return [get_tokenizer().decode_single_token_bytes(token) for token in range(EOT)] + [b""]
        if not self._is_byte_level:
            raise ValueError(f"the tokenizer in {self._source} is not byte-level: a token has no bytes")
        special = {token for token, entry in self._library.get_added_tokens_decoder().items() if entry.special}
        return [b"" if token in special else self._bytes(token) for token in range(self.num_tokens)]

    def _bytes(self, token: int) -> bytes:
        if self._library is None:
            return get_tokenizer().decode_single_token_bytes(token) if token <= EOT else b""
        return token_bytes(self._tokens.get(token, ""))

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[int | None], str]:
        """Return a function that takes a row's tokens one by one, None for the end, and returns the text they add.

        An incomplete character waits for the next token; invalid UTF-8 becomes U+FFFD.
        """
        if self._library is None or self._is_byte_level:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda token: decoder.decode(b"" if token is None else self._bytes(token), final=token is None)
        return _neighbours(self._library, prompt)

    def same_ids(self, other: "Tokenizer") -> bool:
        """True if no text without special tokens gets other ids; tokens that were added do not matter."""
        return self is other or (self.is_gpt2 and other.is_gpt2) or self._base == other._base

    @cached_property
    def _base(self) -> tuple[Any, ...]:
        """All that decides on the ids of a text without added tokens, in a form that can be compared."""
        if self._library is None:
            content = byte_level_json(vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe"))
            around = []
        else:
            content, around = json.loads(self._library.to_str()), self._library.encode("").ids
        added = {token["content"] for token in content["added_tokens"]} | {"<|endoftext|>"}
        model = {name: value for name, value in content["model"].items() if value}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {text: token for text, token in model["vocab"].items() if text not in added}
        if "merges" in model:
            model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        before = content["pre_tokenizer"] and {**content["pre_tokenizer"], "trim_offsets": None}
        return model, content["normalizer"], before, around


def _neighbours(library: "tokenizers.Tokenizer", prompt: Sequence[int]) -> Callable[[int | None], str]:
    """Return `Tokenizer.stream` for a decoder that looks at a token's neighbours, such as one that joins words."""
    from tokenizers.decoders import DecodeStream

    decoder, ids = DecodeStream(skip_special_tokens=False), list(prompt)
    shown = "".join(decoder.step(library, token) or "" for token in prompt)

    def add(token: int | None) -> str:
        nonlocal shown
        if token is None:  # what the stream held back
            return library.decode(ids, skip_special_tokens=False)[len(shown) :]
        ids.append(token)
        text = decoder.step(library, token) or ""
        shown += text
        return text

    return add


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
    tokenizer = load_tokenizer(folder) if folder else None
    if tokenizer is None and EOT < vocab_size <= PADDED:
        tokenizer = Tokenizer({}, ids)
    return tokenizer, ids


def describe_tokenizer(vocab_size: int, folder: Path | None) -> str:
    """Return a line on a model's tokenizer and the ids that end its texts."""
    tokenizer, ids = model_tokenizer(vocab_size, folder)
    ends = ids.eos if tokenizer is None else tokenizer.stop_ids
    end = f", texts end at {' or '.join(map(str, ends))}" if ends else ""
    if tokenizer is None or tokenizer.problem:
        return f"none{end}" if tokenizer is None else tokenizer.problem or ""
    return f"GPT-2's{end}" if tokenizer.is_gpt2 else f"its own, {tokenizer.num_tokens:,} tokens{end}"
