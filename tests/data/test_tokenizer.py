"""GPT-2's encoding."""

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest

from gpt2_data import EOT, encode_documents, get_tokenizer, tokenizer


def test_known_ids():
    tokens, lengths = encode_documents(["Hello world", "", " don't\n\n"])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [EOT, 15496, 995, EOT, EOT, 836, 470, 628]
    assert lengths.tolist() == [3, 1, 4]
    assert encode_documents([])[0].tolist() == []
    tokens, _ = encode_documents(["a<|endoftext|>b"])  # text never becomes the end of text
    assert tokens.tolist() == [EOT, 64, 27, 91, 437, 1659, 5239, 91, 29, 65]


@pytest.mark.parametrize("text", ["^" * 100_000, " " * 100_000, "a" * 100_000, "\n" * 100_000, "日本" * 30_000])
def test_long_runs_end_soon(text):
    tokens, _ = encode_documents([text])
    assert get_tokenizer().decode(tokens[1:].tolist()) == text


def test_no_cut_changes_the_tokens():
    """Every place that find_cut allows, in every string of up to five signs of all kinds."""
    encode = get_tokenizer().encode_ordinary
    cuts = 0
    for length in range(2, 6):
        for signs in itertools.product("as1.' \n\t日\u3000", repeat=length):
            text = "".join(signs)
            data = text.encode()
            place = 0
            while (place := tokenizer.find_cut(data, place + 1, len(data))) >= 0:
                cuts += 1
                assert encode(data[:place].decode()) + encode(data[place:].decode()) == encode(text), text
    assert cuts > 50_000


@pytest.mark.parametrize("white", "\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000 \t\n\r\x0b\x0c")
def test_white_space_stays_together(white):
    for text, start in (f"a{white} b", 2), (f"{white} b", 0):  # 1 may be one: before ASCII white space
        data = text.encode()
        assert tokenizer.find_cut(data, start, len(data)) == -1


def test_pieces_of_a_text_have_the_tokens_of_the_whole(monkeypatch):
    rng = random.Random(1)
    signs = "ab1'.,é日\u00a0\u2028 \t\r\n\n\n "
    texts = ["".join(rng.choices(signs, k=rng.randrange(400))) for _ in range(200)]
    whole = encode_documents(texts)
    monkeypatch.setattr(tokenizer, "_PIECE", 10)
    monkeypatch.setattr(tokenizer, "_BATCH", 25)
    cuts, starts = tokenizer.cut_texts(*tokenizer.text_buffers(pa.array(texts)))
    assert len(cuts) > 5 * len(texts)
    assert len(starts) == len(texts)
    for ours, expected in zip(encode_documents(texts), whole, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_slices_and_empty_texts(type_):
    texts = ["one", "", "two words", "", "", "日本", ""]
    array = pa.array(texts, type_)
    for start, stop in itertools.combinations_with_replacement(range(len(texts) + 1), 2):
        tokens, lengths = tokenizer.encode_texts(array[start:stop])
        expected = [[EOT, *get_tokenizer().encode_ordinary(text)] for text in texts[start:stop]]
        assert tokens.tolist() == [token for document in expected for token in document]
        assert lengths.tolist() == [len(document) for document in expected]
        assert (tokens.dtype, lengths.dtype) == (np.uint16, np.int64)


def test_text_that_is_no_utf_8_is_an_error():
    offsets, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    array = pa.Array.from_buffers(pa.string(), 1, [None, offsets, data])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode_texts(array)


def test_surrogates_are_repaired_as_tiktoken_does():
    for text in ["plain", "é日🙂", "a\ud800b", "\ud83d\ude42", "\ude42\ud83d", "\ufeffx\udc00"]:
        repaired = tokenizer.repair_surrogates(text)
        assert repaired.encode("utf-8").decode() == repaired
        tokens = get_tokenizer().encode_ordinary(text)
        assert get_tokenizer().encode_ordinary(repaired) == tokens == encode_documents([text])[0].tolist()[1:]


def test_the_vocabulary_is_openai_s_and_read_where_it_lies(monkeypatch, tmp_path):
    """Nothing is copied into a cache, which may be read-only."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert len(tokenizer.token_ranks.__wrapped__()) == tokenizer.VOCAB_SIZE - 1
    monkeypatch.setitem(tokenizer.VOCABULARY_SHA256, "encoder.json", "0" * 64)
    with pytest.raises(ValueError, match=r"encoder\.json is not OpenAI's.*pip install"):
        tokenizer.token_ranks.__wrapped__()
