"""Vocabularies other than GPT-2's: a tokenizer folder is checked, and the `tokenizers` library follows it."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data import disk, tokenizer

FILE_NAME = "tokenizer.json"
END = "<|endoftext|>"
MAX_IDS = 2**16  # ids are stored as uint16
_SPLITTERS = ("ByteLevel", "Split", "Digits", "Punctuation")  # they keep all of a text
_SAMPLE = "Zażółć 日本語\u0301 ﬁ Å\t\r\n\n  it's 1234 <|endoftext|> 🙂\x00\x7f "


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary that is not GPT-2's.

    Attributes:
        data: its tokenizer.json.
        size: its highest id and 1.
        eot: the id that stands before each document.
    """

    data: bytes
    size: int
    eot: int

    @property
    def identity(self) -> dict[str, object]:
        """The vocabulary's entry in dataset.json."""
        digest = hashlib.sha256(self.data).hexdigest()
        return {"name": FILE_NAME, "vocab_size": self.size, "eot": self.eot, "sha256": digest}


def identity(vocabulary: Vocabulary | None) -> dict[str, object]:
    """Return what dataset.json records about a vocabulary; None is GPT-2's."""
    return tokenizer.identity() if vocabulary is None else vocabulary.identity


def load(path: Path) -> Vocabulary | None:
    """Read a tokenizer folder or a tokenizer.json; None if it is GPT-2's.

    Raises ValueError, naming the file, if a build could not follow it exactly, or if it has no end-of-text token.
    """
    folder, file = (path, path / FILE_NAME) if path.is_dir() else (path.parent, path)
    try:
        if file.exists() or not path.is_dir():
            data = file.read_bytes()
        elif (folder / "vocab.json").exists():
            data = _from_older_files(folder)
        else:
            raise ValueError(f"there is no {FILE_NAME} in it, nor vocab.json and merges.txt")
        content = json.loads(data)
        added, vocab = content.get("added_tokens") or [], content["model"]["vocab"]
        ids = (vocab if isinstance(vocab, dict) else {}) | {token["content"]: token["id"] for token in added}
        if (problem := _problem(content, ids)) is not None:
            raise ValueError(f"a build cannot follow this tokenizer exactly: {problem}")
        end = _end(folder, ids)
        library = _open(content, ids[end])
        sample = library.encode(_SAMPLE, add_special_tokens=False).ids
        if library.get_vocab() != ids or library.decode(sample, skip_special_tokens=False) != _SAMPLE:
            raise ValueError("a build cannot follow this tokenizer: its tokens do not give a text back")
    except OSError:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a tokenizer of the tokenizers library: {error!r}") from None
    except Exception as error:  # that library raises Exception itself
        raise ValueError(f"{file}: {error}") from None
    others = [token for token in added if token["content"] != END]
    if end == END and not others and _cuts(content) and _is_gpt2(content["model"]["merges"], ids):
        return None
    return Vocabulary(data, max(ids.values()) + 1, ids[end])


def write(folder: Path, data: bytes, config: Mapping[str, object]) -> None:
    """Write a tokenizer.json and its tokenizer_config.json, which names the end-of-text token."""
    for name, content in ("tokenizer_config.json", json.dumps(config, indent=2).encode()), (FILE_NAME, data):
        with disk.write_whole(folder / name) as file:
            file.write(content)


def byte_level(vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str]) -> bytes:
    """Return the tokenizer.json of a vocabulary with GPT-2's split; `vocab` has the special tokens, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(vocab, list(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(special))
    return str(library.to_str(pretty=True)).encode()


def _from_older_files(folder: Path) -> bytes:
    """Return the tokenizer.json of a folder with vocab.json, merges.txt and maybe added_tokens.json."""
    from tokenizers import models

    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    more = folder / "added_tokens.json"
    added = json.loads(more.read_bytes()) if more.exists() else {}
    return byte_level(vocab | added, merges, [*added, *([END] if END in vocab else [])])


def _problem(content: Any, ids: dict[str, int]) -> str | None:
    """Return why a build could not follow a tokenizer.json exactly, or None."""
    model, normalizer, decoder = content["model"], content.get("normalizer"), content.get("decoder") or {}
    splitters = _flat(content.get("pre_tokenizer"), "pretokenizers")
    byte_levels = [one for one in splitters if one["type"] == "ByteLevel"]
    odd = [one["type"] for one in splitters if one["type"] not in _SPLITTERS or one.get("behavior") == "Removed"]
    stripping = [token for token in content.get("added_tokens") or [] if token["lstrip"] or token["rstrip"]]
    missing = [symbol for symbol in tokenizer.byte_symbols() if symbol not in model["vocab"]]
    numbers = list(ids.values())
    affixes = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    for problem, wrong in (
        (f"its model is {model.get('type')}, not BPE", model.get("type", "BPE") != "BPE" or "merges" not in model),
        (f"its normalizer {(normalizer or {}).get('type')} changes texts", _flat(normalizer, "normalizers")),
        ("it is not byte-level", not byte_levels or any(affixes)),
        (f"its pre-tokenizer {', '.join(odd)} may drop text", odd),
        ("it adds a space (add_prefix_space)", any(one["add_prefix_space"] for one in byte_levels)),
        (f"its decoder {decoder.get('type')} is not ByteLevel", decoder.get("type") != "ByteLevel"),
        (f"{len(missing)} of the 256 bytes have no token", missing),
        ("it drops merges at random (dropout)", model.get("dropout")),
        (f"{[token['content'] for token in stripping][:3]} take the spaces beside them (lstrip, rstrip)",
         [token for token in stripping if not token["special"]]),
        ("an id stands twice", len(set(numbers)) < len(numbers)),
        (f"its ids go up to {max(numbers, default=0):,}, and shards of uint16 hold {MAX_IDS - 1:,} at most",
         max(numbers, default=0) >= MAX_IDS),
    ):  # fmt: skip
        if wrong:
            return problem
    return None


def _flat(step: Any, key: str) -> list[Any]:
    """Return the steps of a Sequence, or the one step; none of None."""
    if step is None:
        return []
    return [one for part in step[key] for one in _flat(part, key)] if step["type"] == "Sequence" else [step]


def _end(folder: Path, ids: dict[str, int]) -> str:
    """Return the end-of-text token: the `eos_token` of the folder's files, else `<|endoftext|>`."""
    for name in "tokenizer_config.json", "special_tokens_map.json":
        token = json.loads((folder / name).read_bytes()).get("eos_token") if (folder / name).exists() else None
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            if token not in ids:
                raise ValueError(f"the eos_token of {name}, {token!r}, is not in its vocabulary")
            return str(token)
    if END not in ids:
        raise ValueError(
            f"it names no end of a text: put an eos_token into a tokenizer_config.json beside it ({END} is not "
            "in its vocabulary)"
        )
    return END


def _cuts(content: Any) -> bool:
    """True if its pre-tokenizer is GPT-2's pattern, so that texts can be cut where tokenizer.find_cut says."""
    steps = _flat(content["pre_tokenizer"], "pretokenizers")
    plain = all(token["special"] for token in content.get("added_tokens") or [])
    return len(steps) == 1 and bool(steps[0].get("use_regex", True)) and plain


def _is_gpt2(merges: list[Any], ids: dict[str, int]) -> bool:
    """True if vocabulary and merges are those of OpenAI's two files, which have these hashes."""
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    files = {
        "encoder.json": json.dumps(dict(sorted(ids.items(), key=lambda item: item[1]))),
        "vocab.bpe": "\n".join(["#version: 0.2", *lines, ""]),
    }
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    return hashes == tokenizer.VOCABULARY_SHA256


def _open(content: Any, eot: int) -> Any:
    """Return the library's tokenizer, to which a text of a special token is text as any other."""
    from tokenizers import Tokenizer

    for token in content.get("added_tokens") or []:
        token["special"] |= token["id"] == eot
    library = Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))
    library.encode_special_tokens = True
    return library


@functools.lru_cache(2)
def encoder(file: Path, eot: int) -> tokenizer.Encoder:
    """Return the encoder of a tokenizer.json that `load` has checked."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a build has a process per core already
    content = json.loads(file.read_bytes())
    library = _open(content, eot)

    def encode(
        data: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        texts = [str(data.data[start:stop], "utf-8") for start, stop in itertools.pairwise(offsets.tolist())]
        pieces = [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]
        ends = np.cumsum([0, *map(len, pieces)])
        return np.fromiter(itertools.chain.from_iterable(pieces), np.uint32, int(ends[-1])), ends

    return tokenizer.Encoder(encode, eot, _cuts(content))


def decode(file: Path, ids: Sequence[int]) -> str:
    """Return the text of these ids by a dataset's tokenizer.json."""
    from tokenizers import Tokenizer

    return str(Tokenizer.from_str(file.read_text(encoding="utf-8")).decode(ids, skip_special_tokens=False))
