"""gigatoken in tiktoken's place: the same tokens, no more memory than said, and what differs is noticed."""

import importlib.metadata
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from encoder_growth import random_words

import prove_gigatoken
from gpt2_data import gigatoken as fast
from gpt2_data import tokenizer
from gpt2_data.sources import pydocs
from prove_gigatoken import prove

pytest.importorskip("gigatoken", reason="the extra gpt2-data[fast] is not installed")
SHIPPED = fast.PROVEN


@pytest.fixture(autouse=True)
def a_proof(monkeypatch, tmp_path):
    """A proof for the installed versions, whichever those are, with the package's own list of characters."""
    (shipped, *_) = fast.read_proofs(SHIPPED)
    proof = fast.Proof(*fast.installed_versions(), 1, shipped.differ)
    prove_gigatoken.keep(proof, tmp_path / "proven.json")
    monkeypatch.setattr(fast, "PROVEN", tmp_path / "proven.json")
    return proof


def assert_same(texts, **options):
    array = pa.array(texts, pa.large_string()) if isinstance(texts, list) else texts
    ours, expected = tokenizer.encode_texts(array, "gigatoken", **options), tokenizer.encode_texts(array)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_tokens_are_tiktoken_s(texts):
    assert_same([*texts, "", "", "<|endoftext|>", "\0", " " * 5000, "a" * 5000, "^" * 5000])
    assert_same([])
    assert_same([""])
    assert_same([tokenizer.repair_surrogates(text) for _, text in pydocs.documents()[::7]])


def test_tokens_are_tiktoken_s_in_pieces_batches_and_slices(texts, monkeypatch, a_proof):
    unproven = [chr(code) for code in a_proof.code_points()[::700]]
    texts = [*texts, *unproven, "", *(f"{c}'s and {text}" for c, text in zip(unproven, texts, strict=False)), ""]
    random.Random(0).shuffle(texts)
    monkeypatch.setattr(tokenizer, "_PIECE", 100)
    monkeypatch.setattr(tokenizer, "_BATCH", 300)
    monkeypatch.setattr(tokenizer, "CHECK_EVERY", 3)
    for start, stop in [(0, 0), (3, 50), (50, len(texts)), (0, len(texts))]:
        assert_same(pa.array(texts)[start:stop], first=start)


def test_text_with_an_unproven_character_is_left_to_tiktoken(a_proof, monkeypatch):
    character = chr(a_proof.code_points()[0])
    seen = []
    encode = fast.Encoder.encode
    monkeypatch.setattr(
        fast.Encoder, "encode", lambda self, data, offsets: seen.append(bytes(data)) or encode(self, data, offsets)
    )
    assert_same(["before", f"in {character}'s midst", "after"])
    assert seen == [b"before", b"after"]


def test_characters_are_found(monkeypatch):
    rng = random.Random(0)
    wanted = [0x80, 0x7FF, 0x800, 0x88F, 0x89F, 0xA7CE, 0xFFFF, 0x10000, 0x10940, 0x1F642, 0x10FFFF]
    others = [0x41, 0x81, 0x7FE, 0x801, 0x88E, 0x890, 0x8A0, 0xA7CD, 0xFFFE, 0x10001, 0x10941, 0x1F643, 0x10FFFE]
    monkeypatch.setattr(fast, "_BLOCK", 7)
    characters = fast.CharacterSet(np.array(wanted))
    for _ in range(50):
        codes = [rng.choice(wanted if rng.random() < 0.2 else others) for _ in range(rng.randrange(60))]
        starts = np.cumsum([0, *(len(chr(code).encode()) for code in codes)])
        data = np.frombuffer("".join(map(chr, codes)).encode(), np.uint8)
        expected = [int(start) for start, code in zip(starts, codes, strict=False) if code in wanted]
        assert sorted(characters.find(data).tolist()) == expected
    assert fast.CharacterSet(np.empty(0, np.int64)).find(np.frombuffer("é🙂".encode(), np.uint8)).tolist() == []


def test_the_sampled_check_finds_a_planted_difference(monkeypatch):
    encode = fast.Encoder.encode

    def wrong(self, data, offsets):
        tokens, ends = encode(self, data, offsets)
        return np.where(tokens == 995, 1917, tokens), ends  # " world"

    monkeypatch.setattr(tokenizer, "CHECK_EVERY", 10)
    monkeypatch.setattr(fast.Encoder, "encode", wrong)
    texts = ["fine"] * 7 + ["to all the world", "the world"] + ["fine"] * 7
    for first in (3, 13, 2, 12):  # the checked texts are number 10 and 20
        with pytest.raises(tokenizer.BadText, match="--tokenizer tiktoken") as error:
            tokenizer.encode_texts(pa.array(texts), "gigatoken", first=first)
        assert error.value.index == 10 - first % 10
        assert pickle.loads(pickle.dumps(error.value)).index == error.value.index  # as from a worker
    tokenizer.encode_texts(pa.array(texts), "gigatoken", first=5)  # its sample is fine
    with pytest.raises(tokenizer.BadText, match="text 0"):  # the first text of a unit is checked
        tokenizer.encode_texts(pa.array([" world"]), "gigatoken")


@pytest.mark.slow
@pytest.mark.skipif(fast._memory() is None, reason="only Linux says how much memory a process has")
def test_memory_is_bounded():
    """30 MB of words that were never seen make a cache without bound grow by 350 MB."""
    bound = 40_000_000
    # In a process of its own: other tests' threads and heaps are in this one's memory, too.
    program = [sys.executable, Path(__file__).with_name("encoder_growth.py"), str(bound)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    most, renewals = json.loads(done.stdout)
    assert 2 <= renewals <= 20
    assert most < 3 * bound  # its table doubles at times, and the allocator keeps some


def test_without_proc_the_cache_is_bounded_by_text(monkeypatch):
    monkeypatch.setattr(fast, "_memory", lambda: None)
    encoder = fast.Encoder(tokenizer.token_ranks(), max_growth=7 * 3_000_000 - 1)
    for seed in range(7):
        encoder.encode(*random_words(seed))
    assert encoder.renewals == 2


def test_choice_of_the_library(monkeypatch, a_proof):
    for name, library in (("auto", "gigatoken"), ("gigatoken", "gigatoken"), ("tiktoken", "tiktoken")):
        assert tokenizer.choose_backend(name) == library
    monkeypatch.setattr(fast, "installed_versions", lambda: (a_proof.gigatoken, "0.99", a_proof.machine))
    assert tokenizer.choose_backend("auto") == "tiktoken"
    with pytest.raises(ValueError, match=r"not proven to give the tokens of tiktoken 0.99.*--tokenizer tiktoken"):
        tokenizer.choose_backend("gigatoken")


def test_gigatoken_is_not_installed(monkeypatch):
    missing = Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert tokenizer.choose_backend("auto") == "tiktoken"
    with pytest.raises(ValueError, match=r"pip install 'gpt2-data\[fast\]'"):
        tokenizer.choose_backend("gigatoken")


# --- the proof: tools/prove_gigatoken.py


LITTLE = {"code_points": range(0x400), "mixtures": 2000}


@pytest.fixture
def plant(monkeypatch):
    """Make gigatoken give a wrong token in each text with these bytes; the real text is short."""
    encode = fast.Encoder.encode
    monkeypatch.setattr(
        prove_gigatoken.pydocs, "documents", lambda: (("a", "Some text.\n"), ("b", "and\n\n\tmore"))
    )

    def plant(needle):
        def wrong(self, data, offsets):
            tokens, ends = encode(self, data, offsets)
            tokens = tokens.copy()
            for i in range(len(offsets) - 1):
                if needle in bytes(data[offsets[i] : offsets[i + 1]]):
                    tokens[ends[i]] += 1
            return tokens, ends

        monkeypatch.setattr(fast.Encoder, "encode", wrong)

    return plant


@pytest.mark.slow
def test_the_shipped_proof_holds():
    """All 1,112,064 code points, where letters, digits, white space and signs show best, and mixtures."""
    proof = prove(contexts=(" {}'s",), mixtures=50_000)
    assert proof.strings > 1_112_064 + 50_000
    for shipped in fast.read_proofs(SHIPPED):
        if shipped.versions == proof.versions:
            assert proof.differ == shipped.differ


@pytest.mark.parametrize(
    ("needle", "differ"), [("no such text", ()), ("\u03a9", ("3a9",)), (b"\xce", ("380-3bf",))]
)
def test_characters_that_differ_are_found_and_kept(plant, tmp_path, needle, differ):
    """The first byte of U+0380 to U+03BF makes a range."""
    plant(needle if isinstance(needle, bytes) else needle.encode())
    proof = prove(**LITTLE)
    assert proof.differ == differ
    assert proof.strings > 0x400 * len(prove_gigatoken.CONTEXTS) + 2000
    file = tmp_path / "kept.json"
    for item in (fast.Proof("0.1", "0.2", "z80", 1, ()), fast.Proof(*proof.versions, 5, ("41",)), proof):
        prove_gigatoken.keep(item, file)
    assert [item.gigatoken for item in fast.read_proofs(file)] == ["0.1", proof.gigatoken]
    assert fast.read_proofs(file)[1] == proof


@pytest.mark.parametrize("needle", [" q\n", "a \t\n", "\u0301\u0302", "\n", "<|endoftext|>", "\0\0"])
def test_a_difference_in_ascii_or_in_no_single_character_is_no_proof(plant, needle):
    plant(needle.encode())
    with pytest.raises(ValueError, match="not proven: "):
        prove(code_points=[*range(0x80), 0x301, 0x302], mixtures=200_000)


def test_mixtures_are_the_seed_s():
    known = "".join(map(chr, range(0x400)))
    first, again, other = (list(prove_gigatoken._mixtures(known, 50_000, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sum(map(len, first)) == 50_000
    assert set("".join(first[0])) == set(known)
