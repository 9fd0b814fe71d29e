"""evaluate_loss against a plain loop over transformers' model, and what must not change it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2_eval import evaluate_loss
from gpt2_model import EOT, get_tokenizer


class Tokens:
    """A split of the ids that a test wants."""

    manifest = SimpleNamespace(hash="0123")
    tokenizer = None  # the ids are GPT-2's

    def __init__(self, ids):
        self.ids = np.array(ids, dtype=np.uint16)

    def tokens(self, split):
        return len(self.ids)

    def read(self, split, start, stop):
        return self.ids[start:stop]


@pytest.mark.parametrize(
    ("tokens", "seq_len", "batch_size"), [(640, 64, 3), (700, 64, 1), (700, 64, 64), (300, 128, 2), (50, 128, 3)]
)
def test_equals_a_plain_loop(model, reference, dataset, tokens, seq_len, batch_size):
    ids = dataset.read("val", 0, tokens + 1)
    windows = [-reference(ids[start : start + seq_len + 1].tolist()) for start in range(0, len(ids) - 1, seq_len)]
    result = evaluate_loss(model, dataset, tokens=tokens, seq_len=seq_len, batch_size=batch_size)
    nats = np.concatenate(windows)
    assert (result.tokens, result.tokens_requested) == (tokens, tokens)
    assert (result.sequences, result.seq_len) == (len(windows), seq_len)
    assert result.loss == pytest.approx(nats.mean(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    text = b"".join(get_tokenizer().decode_tokens_bytes([token for token in ids[1:].tolist() if token != EOT]))
    assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / len(text), rel=1e-5)
    if tokens == 640:
        means = [window.mean() for window in windows]
        assert result.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-3)
    if len(windows) == 1:
        assert math.isnan(result.stderr)


def test_small_split_is_scored_whole(model, dataset):
    result = evaluate_loss(model, dataset)
    assert result.tokens == dataset.tokens("val") - 1
    assert result.tokens_requested == 10_485_760
    assert result.seq_len == 128


def test_uniform_model(uniform, dataset):
    result = evaluate_loss(uniform, dataset, tokens=500)
    assert result.loss == pytest.approx(math.log(50257), rel=1e-6)
    assert result.perplexity == pytest.approx(50257, rel=1e-4)
    assert result.stderr == pytest.approx(0, abs=1e-6)
    assert math.isnan(evaluate_loss(uniform, Tokens([EOT] * 9)).bits_per_byte)  # there is no text


def test_autocast_is_close(model, dataset):
    exact = evaluate_loss(model, dataset, tokens=256)
    rounded = evaluate_loss(model, dataset, tokens=256, autocast_dtype=torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, abs=0.05)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1], {}, "has 1 tokens: there is nothing to predict"),
        ([], {}, "has 0 tokens"),
        ([1, 50257], {}, "token id 50257 in the data is beyond the vocabulary of 50257"),
        ([1, 2], {"seq_len": 129}, "seq_len must be 1 to 128"),
        ([1, 2], {"seq_len": 0}, "seq_len must be 1 to 128"),
        ([1, 2], {"tokens": 0}, "tokens must be at least 1"),
        ([1, 2], {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_user_errors(uniform, ids, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_loss(uniform, Tokens(ids), **options)
