"""The proof that two libraries give the same tokens finds what differs."""

import functools
import json

import numpy as np
import pytest
from click.testing import CliRunner

from gpt2_data import gigatoken as fast
from gpt2_data import proof, tokenizer
from gpt2_data.cli import main

pytest.importorskip("gigatoken", reason="the extra gpt2-data[fast] is not installed")

prove = functools.partial(proof.prove, code_points=range(0x400), mixtures=2000)


@pytest.fixture(autouse=True)
def little_real_text(monkeypatch):
    """The real one is for the slow test."""
    monkeypatch.setattr(proof.pydocs, "documents", lambda: (("a", "Some text.\n"), ("b", "and\n\n\tmore of it")))


@pytest.fixture
def plant(monkeypatch):
    """Make gigatoken give a wrong token in each text with these bytes."""
    encode = fast.Encoder.encode

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
def test_every_code_point(monkeypatch):
    """All 1,112,064 in a context that tells letters, digits, white space and signs apart, and the mixtures."""
    monkeypatch.undo()
    result = proof.prove(quick=True)
    assert result.proof.strings > 1_112_064 + 50_000
    for shipped in fast.read_proofs(fast._SHIPPED):
        if shipped.versions == fast.installed_versions():
            assert result.proof.differ == shipped.differ
            assert result.code_points_that_differ == len(shipped.code_points())


def test_no_difference():
    result = prove()
    assert result.proof.differ == ()
    assert result.proof.strings > 0x400 * len(proof.CONTEXTS) + 2000


def test_a_character_that_differs_is_found_and_left_out(plant):
    plant("\u03a9".encode())
    result = prove()
    assert result.proof.differ == ("3a9",)
    assert result.code_points_that_differ == 1


def test_neighbours_that_differ_are_a_range(plant):
    plant(b"\xce")  # the first byte of U+0380 to U+03BF
    assert prove().proof.differ == ("380-3bf",)


@pytest.mark.parametrize("needle", [" q\n", "a \t\n", "\u0301\u0302"])
def test_a_difference_that_no_single_character_explains_is_no_proof(plant, needle):
    plant(needle.encode())
    with pytest.raises(ValueError, match="not proven: for .*--tokenizer tiktoken") as error:
        prove(code_points=[*range(0x80), 0x301, 0x302], mixtures=200_000)
    assert f"for {needle!a} gigatoken" in str(error.value)  # the shortest text that shows it


@pytest.mark.parametrize("needle", [b"\n", b"<|endoftext|>", b"\0\0"])
def test_a_difference_in_ascii_is_no_proof(plant, needle):
    plant(needle)
    with pytest.raises(ValueError, match="not proven"):
        prove()


def test_another_encoding_is_no_proof(monkeypatch):
    monkeypatch.setattr(proof, "MAX_DIFFER", 100)
    monkeypatch.setattr(
        fast.Encoder,
        "encode",
        lambda self, data, offsets: (np.zeros(len(offsets) - 1, np.uint32), np.arange(len(offsets))),
    )
    with pytest.raises(ValueError, match="characters and more are encoded differently"):
        prove(code_points=range(0x400, 0x800))


def test_mixtures_are_the_seed_s():
    known = "".join(map(chr, range(0x400)))
    first, again, other = (list(proof._mixtures(known, 50_000, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sum(map(len, first)) == 50_000
    assert set("".join(first[0])) == set(known)


def test_the_command_keeps_a_proof_that_build_then_takes(monkeypatch, tmp_path, plant):
    plant("\u03a9".encode())
    monkeypatch.setattr(proof, "prove", lambda quick, progress: prove(quick=quick, progress=progress))
    monkeypatch.setattr(fast, "_SHIPPED", tmp_path / "none.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tokenizer.choose_backend("auto") == "tiktoken"
    done = CliRunner().invoke(main, ["prove", "--quick"])
    assert done.exit_code == 0, done.output
    assert "nothing kept" in done.stdout
    assert tokenizer.choose_backend("auto") == "tiktoken"
    fast.keep_proof(fast.Proof("0.1", "0.2", "z80", 1, ()), fast.user_proofs())
    done = CliRunner().invoke(main, ["prove", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["differ"] == ["3a9"]
    assert facts["code_points_that_differ"] == 1
    assert facts["file"] == str(tmp_path / "cache" / "gpt2-data" / "proven.json")
    assert tokenizer.choose_backend("auto") == "gigatoken"
    assert [kept.gigatoken for kept in fast.read_proofs(fast.user_proofs())] == ["0.1", facts["gigatoken"]]
    assert fast.find_proof().code_points().tolist() == [0x3A9]


def test_a_failed_proof_keeps_nothing(monkeypatch, tmp_path, plant):
    plant(b"\n")
    monkeypatch.setattr(proof, "prove", lambda quick, progress: prove(quick=quick, progress=progress))
    done = CliRunner().invoke(main, ["prove", "--out", str(tmp_path / "proven.json")])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "not proven" in done.stderr
    assert list(tmp_path.iterdir()) == []
