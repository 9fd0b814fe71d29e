"""What a folder's files say of its tokenizer and special ids, read as transformers' AutoTokenizer reads them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_model.tokenizer import BYTE_LEVEL, EOT, PADDED, byte_level_json, vocabulary_file

if TYPE_CHECKING:  # GPT-2's own tokenizer does not need it
    import tokenizers

# The files that say what a text's ids are, then those that only say more of a vocabulary that they do not hold.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = (*VOCABULARY_FILES, "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
# What templates and other kinds of tokenizers are written in: it is kept, but never read.
_KEPT = ("chat_template.*", "vocab.txt", "*.model", "*.tiktoken", "tekken.json", "tokenization*.py")
_MAX_BYTES = 100_000_000  # the largest tokenizer.json on the hub has 40 MB
# transformers' class for a GPT-2's tokenizer; the name in tokenizer_config.json may be absent.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", None)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_END = "<|endoftext|>"
_ADVICE = "use prompts of token ids (in Python), or save it as tokenizer.json with transformers' AutoTokenizer"


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a model folder gives a meaning, in its config.json or generation_config.json.

    Attributes:
        config: config.json's `bos_token_id`, `eos_token_id` and `pad_token_id`, as they stand there.
        generation: generation_config.json as it is, b"" if there is none.
        bos: the id that a text begins with, or None.
        eos: the ids that end a text.
        vocab_size: that of config.json, 0 if it has none.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: bytes = b""
    bos: int | None = None
    eos: tuple[int, ...] = ()
    vocab_size: int = 0


def read_special_ids(folder: Path) -> SpecialIds:
    """Read a folder's special ids. Those outside its vocabulary, as old defaults are, count for nothing."""
    generation = _read(folder / "generation_config.json")
    config = _parse(_read(folder / "config.json"), folder / "config.json")
    fields = config | {
        name: value
        for name, value in _parse(generation, folder / "generation_config.json").items()
        if value is not None
    }
    size = config.get("vocab_size", EOT + 1)
    ids: dict[str, list[int]] = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = fields.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in listed):
            raise ValueError(f"{folder}: {name} = {str(value)[:50]} must be a token id, or a list of them")
        ids[name] = [token for token in listed if type(size) is int and 0 <= token < size]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own: dict[str, Any] = {name: config[name] for name in names if name in config}
    vocab_size = size if type(size) is int and "vocab_size" in config else 0
    bos = next(iter(ids["bos_token_id"]), None)
    return SpecialIds(own, generation, bos, tuple(ids["eos_token_id"]), vocab_size)


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
        settings = read_settings(files)
        content = _tokenizer_json(files, settings, vocab_size)
        added = _added_tokens(files, settings, content)
        around = [] if "tokenizer.json" in files else _around(settings)
        if _is_gpt2(content) and {token["content"] for token in added} <= {_END} and not any(around):
            return None
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.processors import TemplateProcessing

        library = Tokenizer.from_str(json.dumps(content))
        library.add_tokens([AddedToken(**{n: token[n] for n in _FLAGS if n in token}) for token in added])
        for token in [*content.get("added_tokens", []), *added]:  # the library numbers them as it likes
            if library.token_to_id(token["content"]) != token.get("id", library.token_to_id(token["content"])):
                raise ValueError(f"its token {token['content'][:50]!r} has an id that others do not lead up to")
        if max(library.get_vocab().values(), default=0) >= 2**24:
            raise ValueError("it has ids above 16 million")
        if any(around):
            template = " ".join([around[0], "$A", around[1]]).strip()
            ids = [(token, library.token_to_id(token)) for token in sorted({*around} - {""})]
            library.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exceptions and Rust's panics, damaged files any kind
        odd = isinstance(error, (AttributeError, TypeError, LookupError, OverflowError))
        reason = f"a file is damaged ({type(error).__name__})" if odd else " ".join(str(error).split())[:150]
        raise ValueError(f"the tokenizer in {source} cannot be followed: {reason}; {_ADVICE}") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = bool(settings.get("split_special_tokens"))
    return library


def _around(settings: Mapping[str, Any]) -> list[str]:
    """Return the tokens that stand before and after each text."""
    names = ("bos_token", "eos_token")
    return [special_token(settings, name) or "" if settings.get(f"add_{name}") else "" for name in names]


def _tokenizer_json(files: Mapping[str, bytes], settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return tokenizer.json, or what it would be for vocab.json and merges.txt."""
    kind, code = settings.get("tokenizer_class"), settings.get("auto_map")
    if isinstance(code, list) or "AutoTokenizer" in (code or {}):
        raise ValueError("it has code of its own, which is not run")
    content = _json(files, "tokenizer.json")
    if not content:
        others = sorted(files.keys() - set(TOKENIZER_FILES[3:]))
        if not {"vocab.json", "merges.txt"} <= files.keys() and (others or not EOT < vocab_size <= PADDED):
            raise ValueError(f"it has {', '.join(others or files)}, but neither tokenizer.json nor both of "
                             "vocab.json and merges.txt")  # fmt: skip
        if kind not in _GPT2_CLASSES:
            raise ValueError(f"it is a {kind} without tokenizer.json")
        names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
        return byte_level_json(
            *(files[name] if others else vocabulary_file(own) for name, own in names.items()),
            prefix=bool(settings.get("add_prefix_space")),
        )
    before = content.get("pre_tokenizer") or BYTE_LEVEL
    plain = before["type"] == "ByteLevel" and before.get("use_regex", True) and not content.get("normalizer")
    if kind in _GPT2_CLASSES and content["model"].get("type", "BPE") == "BPE" and plain:
        # transformers' GPT2Tokenizer takes the vocabulary and the merges alone, and this setting.
        content["pre_tokenizer"] = {**BYTE_LEVEL, "add_prefix_space": bool(settings.get("add_prefix_space"))}
        content["decoder"] = BYTE_LEVEL
    return content


def _added_tokens(
    files: Mapping[str, bytes], settings: Mapping[str, Any], content: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the tokens that other files than tokenizer.json add to the vocabulary, in the order of their ids."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    entries = [settings.get(name) for name in _SPECIAL]
    entries += extra.values() if isinstance(extra, dict) else extra
    special = [token if isinstance(token, dict) else {"content": token} for token in entries if token]
    names = {token["content"] for token in special}
    if "added_tokens_decoder" in settings:
        by_id = {int(token): entry for token, entry in settings["added_tokens_decoder"].items()}
    else:
        by_id = {
            int(token): {"content": text, "normalized": text not in names, "special": text in names}
            for text, token in _json(files, "added_tokens.json").items()
        }
    known = {token["content"] for token in [*by_id.values(), *content.get("added_tokens", [])]}
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict) and _END not in vocab:
        known.add(_END)  # transformers' default, which counts only where the vocabulary has it
    tokens = [by_id[token] | {"id": token} for token in sorted(by_id)]
    tokens += [token | {"special": True} for token in special if token["content"] not in known]
    return tokens


def _is_gpt2(content: Mapping[str, Any]) -> bool:
    """True if a tokenizer.json is that of GPT-2's own tokenizer, with no other token added."""
    model, before, after = (content.get(name) or {} for name in ("model", "pre_tokenizer", "post_processor"))
    vocab, merges = model["vocab"], model.get("merges")
    if not isinstance(vocab, dict) or len(vocab) not in (EOT, EOT + 1) or not isinstance(merges, list):
        return False
    own = byte_level_json(vocabulary_file("encoder.json"), vocabulary_file("vocab.bpe"))["model"]
    other = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model.get("type", "BPE") == "BPE"
        and {**vocab, _END: EOT} == own["vocab"]
        and [merge if isinstance(merge, str) else " ".join(merge) for merge in merges] == own["merges"]
        and not any(model.get(name) for name in other)
        and not content.get("normalizer")
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space")
        and after.get("type", "ByteLevel") == "ByteLevel"
        and all(token["content"] == _END for token in content.get("added_tokens", []))
    )


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
