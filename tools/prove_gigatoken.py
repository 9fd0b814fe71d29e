"""Prove that gigatoken gives tiktoken's tokens, as the two are installed here, and keep the proof in gpt2-data.

Run it before releasing gpt2-data for a new version of either: `python tools/prove_gigatoken.py`, ten minutes.

It first tries every code point in some contexts, to find the characters that the two treat differently. Without
those, it then tries long runs, white space, real text, and random mixtures of all kinds of characters. A single
difference there means that there is no proof.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise, product
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from gpt2_data import gigatoken, tokenizer
from gpt2_data.sources import pydocs
from gpt2_model.command import SETTINGS

CONTEXTS = (
    *("{}'s", "a{}'ll {}b", " {}{}'t", "x {} 're", "1{}2", "'{}s'd", "don't{}", "\n{}\n'm"),
    *("{}", "{}\u0301e", ".{}!", "\t{} \t", "é{}日'", "  {}  {}a1 "),
)
"""Contexts in which every code point is tried. 's shows best what a character is taken for: after a letter or a
digit, 's is one piece; after a sign, its ' belongs to the sign's piece."""

MAX_DIFFER = 20_000  # code points; with more of them the two are not the same encoding
_BATCH = 20_000  # strings
_WHITE = " \n\t\r\x0b\x85\xa0\u2028\u3000"
_ENGLISH = "etaoin shrdlu \n'.,0123456789STDM-\t"
_PRINTABLE = "".join(map(chr, range(32, 127)))


@click.command(context_settings=SETTINGS)
def main() -> None:
    """Compare gigatoken with tiktoken on every character and on millions of strings, and save the proof."""
    try:
        proof = prove()
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    keep(proof, gigatoken.PROVEN)
    libraries = f"gigatoken {proof.gigatoken} gives the tokens of tiktoken {proof.tiktoken}"
    click.echo(f"{libraries} for {proof.strings:,} strings, except for {len(proof.code_points()):,} characters")


def keep(proof: gigatoken.Proof, file: Path) -> None:
    """Add a proof to a file, in place of one for the same versions."""
    others = gigatoken.read_proofs(file) if file.exists() else []
    proofs = [other for other in others if other.versions != proof.versions] + [proof]
    file.write_text(json.dumps([dataclasses.asdict(item) for item in proofs], indent=1) + "\n")


def prove(
    contexts: Iterable[str] = CONTEXTS, code_points: Iterable[int] = range(0x110000), mixtures: int = 3_000_000
) -> gigatoken.Proof:
    """Compare the two installed libraries on these code points, except surrogates, and this many random mixtures.

    Raises ValueError, with a text that the two encode differently, if there is no proof.
    """
    versions, fast = gigatoken.installed_versions(), gigatoken.Encoder(tokenizer.token_ranks())
    characters = [chr(code) for code in code_points if not 0xD800 <= code < 0xE000]
    differ: set[str] = set()
    strings = 0
    for context, some in tqdm(product(contexts, list(_batches(characters))), disable=None):
        differ.update(some[i] for i in _differing(fast, [context.replace("{}", c) for c in some]))
        strings += len(some)
        if len(differ) > MAX_DIFFER or any(c.isascii() for c in differ):
            example = ascii(context.replace("{}", min(differ)))
            raise ValueError(f"not proven: {len(differ):,} characters or more differ, as in {example}")
    known = "".join(sorted(set(characters) - differ))
    special = chain(_neighbours(known), _special_strings(known), _real_text(differ))
    for texts in tqdm(chain(_batches(special), _mixtures(known, mixtures)), disable=None):
        strings += len(texts)
        for i in _differing(fast, texts)[:1]:
            raise ValueError(f"not proven: the two give different tokens for {texts[i][:1000]!a}")
    return gigatoken.Proof(*versions, strings, tuple(_ranges(sorted(map(ord, differ)))))


def _differing(fast: gigatoken.Encoder, texts: Sequence[str]) -> list[int]:
    """Return which of the texts the two libraries encode differently."""
    data, offsets = tokenizer.text_buffers(pa.array(texts, pa.large_string()))
    tokens, ends = fast.encode(data, offsets)
    expected = map(tokenizer.get_tokenizer().encode_ordinary, texts)
    return [i for i, own in enumerate(expected) if own != tokens[ends[i] : ends[i + 1]].tolist()]


def _batches(strings: Iterable[str]) -> Iterator[list[str]]:
    strings = iter(strings)
    while batch := list(islice(strings, _BATCH)):
        yield batch


def _neighbours(known: str) -> Iterator[str]:
    """Yield each character between its neighbours in Unicode, which are mostly of its own script."""
    for i in range(len(known)):
        yield known[i + 1 : i + 2] + known[max(0, i - 1) : i + 2]


def _special_strings(known: str) -> Iterator[str]:
    """Yield runs of each kind of character, all short mixtures of white space and some signs, and more."""
    of_each_category = {unicodedata.category(character): character for character in known}.values()
    examples = [*map(chr, range(128)), *of_each_category, *(c for c in _WHITE if c in known)]
    lengths = (*range(1, 35), 63, 64, 65, 128, 129, 257, 1000)
    yield from (character * 20_000 for character in " \na1^")
    for character, n, frame in product(examples, lengths, ("{}", "a {}", " {}b1", "\n{} ")):
        yield frame.format(character * n)
    alphabet = [c for c in " \n\t\xa0\u3000a1.'" if c in known]
    for length in range(1, 6):
        yield from map("".join, product(alphabet, repeat=length))
    contractions = ("s", "t", "re", "ve", "m", "ll", "d", "S", "LL", "r", "l", "v", "st", "\u017f")
    frames = ("'{}", "I'{}", "I '{} ", "''{}", "1'{}'{}", "\n'{}", "don’{}", "'{}'", "a'{}b")
    yield from (frame.replace("{}", end) for frame in frames for end in contractions)
    end = "<|endoftext|>"
    for n in range(len(end)):
        yield from (end, end * n, f"a {end}\n", end[n:], end[:n], f"\0{end}\0")


def _real_text(differ: set[str]) -> Iterator[str]:
    """Yield the text that Python carries, whole, and cut at random places."""
    documents = [tokenizer.repair_surrogates(text) for _, text in pydocs.documents()]
    documents = [text for text in documents if differ.isdisjoint(text)]
    yield from documents
    rng = np.random.default_rng(0)
    for text in documents[:: max(1, len(documents) // 50)]:
        places = sorted({0, len(text), *rng.integers(0, len(text) + 1, 200).tolist()})
        yield from (text[start:stop] for start, stop in pairwise(places))


def _mixtures(known: str, count: int, seed: int = 0) -> Iterator[list[str]]:
    """Yield random strings: a third English characters, a third white space and ASCII, a third of any category."""
    rng = np.random.default_rng(seed)
    common = [[c for c in pool if c in known] for pool in (_ENGLISH, _ENGLISH, _PRINTABLE, _WHITE)]
    common = [pool for pool in common if pool]
    by_category: dict[str, list[str]] = {}
    for character in known:
        by_category.setdefault(unicodedata.category(character), []).append(character)
    each = max(1, len(by_category) // len(common) // 2)
    pools = [np.array(list(map(ord, pool))) for pool in (*common * each, *by_category.values())]
    sizes = np.array([len(pool) for pool in pools])
    starts, together = np.cumsum(sizes) - sizes, np.concatenate(pools)
    for start in range(0, count, _BATCH):
        lengths = rng.integers(1, 24, min(_BATCH, count - start))
        pool = rng.integers(0, len(pools), int(lengths.sum()))
        chosen = together[starts[pool] + (rng.random(len(pool)) * sizes[pool]).astype(np.int64)]
        runs = rng.choice([1, 1, 1, 1, 1, 1, 2, 5], len(chosen))
        ends = np.cumsum(runs)[np.cumsum(lengths) - 1].tolist()
        text = np.repeat(chosen, runs).astype("<u4").tobytes().decode("utf-32-le")
        yield [text[a:b] for a, b in pairwise([0, *ends])]


def _ranges(code_points: Sequence[int]) -> Iterator[str]:
    """Yield hexadecimal ranges, joining neighbours: [0x41, 0x43, 0x44] -> "41", "43-44"."""
    array: NDArray[np.int64] = np.array(code_points, np.int64)
    for run in np.split(array, np.flatnonzero(np.diff(array) > 1) + 1):
        if len(run):
            yield f"{run[0]:x}" if len(run) == 1 else f"{run[0]:x}-{run[-1]:x}"


if __name__ == "__main__":
    main()
