"""GPT-2's encoding."""

import random

import numpy as np
import pytest

from gpt2_data import EOT, encode_documents, get_tokenizer, tokenizer


def test_known_ids():
    tokens, lengths = encode_documents(["Hello world", "", " don't\n\n"])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [EOT, 15496, 995, EOT, EOT, 836, 470, 628]
    assert lengths.tolist() == [3, 1, 4]
    assert encode_documents([])[0].tolist() == []


def test_text_never_becomes_the_end_of_text():
    tokens, _ = encode_documents(["a<|endoftext|>b"])
    assert tokens.tolist()[1:] == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
    assert EOT not in tokens[1:]


def test_lone_surrogates_are_replaced():
    tokens, lengths = encode_documents(["a\ud800b", "\ud83d\ude42"])
    encoding = get_tokenizer()
    assert encoding.decode(tokens[1 : lengths[0]].tolist()) == "a\ufffdb"
    assert encoding.decode(tokens[lengths[0] + 1 :].tolist()) == "🙂"  # two halves of one character


@pytest.mark.parametrize("text", ["^" * 100_000, " " * 100_000, "a" * 100_000, "\n" * 100_000, "日本" * 30_000])
def test_long_runs_end_soon(text):
    tokens, _ = encode_documents([text])
    assert get_tokenizer().decode(tokens[1:].tolist()) == text


def test_pieces_of_a_text_have_the_tokens_of_the_whole():
    rng = random.Random(1)
    encoding = get_tokenizer()
    for _ in range(200):
        text = "".join(rng.choice("ab1'.,é日\u00a0\u2028 \t\r\n\n\n ") for _ in range(rng.randrange(400)))
        pieces = list(tokenizer.split_text(text, size=10))
        assert "".join(pieces) == text
        assert [t for piece in pieces for t in encoding.encode_ordinary(piece)] == encoding.encode_ordinary(text)
    assert len(list(tokenizer.split_text("word\n" * 100, size=10))) > 20


def test_an_altered_vocabulary_is_refused(monkeypatch):
    monkeypatch.setitem(tokenizer.VOCABULARY_SHA256, "encoder.json", "0" * 64)
    with pytest.raises(ValueError, match=r"encoder\.json is not OpenAI's.*pip install"):
        get_tokenizer.__wrapped__()


def test_both_files_of_the_vocabulary_are_openai_s():
    assert len(tokenizer._vocabulary_file("encoder.json")) == 1042301
    assert len(tokenizer._vocabulary_file("vocab.bpe")) == 456318
