"""Invariant 5, same text, and the sampling options."""

import numpy as np
import pytest
import torch

from gpt2_model import EOT, GPT, GPTConfig, KVCache, generate, get_tokenizer
from gpt2_model.sampling import sample, uniforms

PROMPTS = [
    "Hello, I'm",
    "The quick brown fox jumped over the",
    "One",
    "A",
    "In the year 2026",
    "x = [",
    "It",
    "We are",
]


@pytest.fixture(scope="module")
def model(tiny_hf_folder):
    return GPT.from_pretrained(tiny_hf_folder)


def test_a_row_does_not_depend_on_the_rows_beside_it(model) -> None:
    def rows_of(prompts, num_samples=1):
        return [row.tokens for row in generate(model, prompts, num_samples=num_samples, max_new_tokens=24, seed=7)]

    whole = rows_of(PROMPTS)
    assert len({tuple(tokens) for tokens in whole}) == 8
    for size in (1, 3):  # the first rows keep their numbers, in a smaller batch
        assert rows_of(PROMPTS[:size]) == whole[:size]
    assert rows_of(PROMPTS[:2], 4)[4:] == rows_of([*PROMPTS[:1] * 4, *PROMPTS[1:2] * 4])[4:]


def test_cached_steps_give_the_logits_of_the_whole_sequence(model) -> None:
    tokens = torch.randint(0, 50257, (3, 30))
    with torch.inference_mode():
        expected = model(tokens)[0]
        cache = KVCache(model, batch=3, capacity=30)
        parts = [model.head(model.hidden(part, cache)) for part in (tokens[:, :11], tokens[:, 11:17])]
        parts += [model.head(model.hidden(tokens[:, t : t + 1], cache)) for t in range(17, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)


def test_same_seed_same_text_other_seed_other_text(model) -> None:
    texts = [generate(model, ["Once"], max_new_tokens=16, seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_rows_are_numbered_by_prompt_then_sample(model) -> None:
    rows = generate(model, ["a", "b"], num_samples=3, max_new_tokens=4)
    assert [(row.row, row.prompt) for row in rows] == [(0, "a"), (1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "b")]
    assert all(row.finish_reason == "length" and len(row.tokens) == 4 for row in rows)
    assert all(row.text == get_tokenizer().decode(row.tokens) for row in rows)


def test_rows_end_where_the_context_ends(model) -> None:
    long, short = [5] * 120, [5] * 10  # of 128
    rows = generate(model, [long, short], max_new_tokens=200, temperature=0.5)
    assert [len(row.tokens) for row in rows] == [8, 118]
    assert [row.finish_reason for row in rows] == ["length", "length"]


def test_end_of_text_ends_a_row_and_leaves_the_others(model) -> None:
    """With a bias towards <|endoftext|>, rows leave the batch at different steps."""
    original = model.head

    def head(hidden):
        logits = original(hidden)
        logits[..., EOT] += 9.0
        return logits

    model.head = head
    try:
        together = generate(model, PROMPTS, max_new_tokens=40, seed=3)
        alone = [generate(model, PROMPTS[:1], max_new_tokens=40, seed=3)[0]]
    finally:
        del model.head
    assert "stop" in {row.finish_reason for row in together}
    assert len({len(row.tokens) for row in together}) > 2
    assert all(EOT not in row.tokens for row in together)
    assert alone[0].tokens == together[0].tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or a positive number, not -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"min_p": 2.0}, "min_p must lie between 0 and 1"),
        ({"seed": -1}, "seed must lie between 0"),
        ({"num_samples": 0}, "num_samples 0 and max_new_tokens 64 must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_nonsense_options_are_refused(model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, ["a"], **options)


def test_nonsense_prompts_are_refused(model) -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, ["fine", ""])
    with pytest.raises(ValueError, match="a prompt of 128 tokens leaves no room in the model's context of 128"):
        generate(model, [[1] * 128])
    with pytest.raises(ValueError, match="token id 50257; the model's vocabulary ends at 50256"):
        generate(model, [[50257]])
    assert generate(model, []) == []


def frequencies(logits, **options) -> np.ndarray:
    count = 20_000
    defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    uniform = torch.from_numpy(uniforms(0, 0, count))
    drawn = sample(torch.tensor([logits]).expand(count, -1), uniform, **{**defaults, **options})
    return np.bincount(drawn.numpy(), minlength=len(logits)) / count


def test_sampling_follows_the_distribution() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    expected = torch.softmax(torch.tensor(logits), 0).numpy()
    np.testing.assert_allclose(frequencies(logits), expected, atol=0.01)
    hot = torch.softmax(torch.tensor(logits) / 2, 0).numpy()
    np.testing.assert_allclose(frequencies(logits, temperature=2.0), hot, atol=0.01)


def test_truncation_keeps_what_it_should() -> None:
    logits = [0.0, 3.0, 1.0, 2.0]  # probabilities 0.03, 0.64, 0.09, 0.24
    assert (frequencies(logits, top_k=2) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.6) > 0).tolist() == [False, True, False, False]
    assert (frequencies(logits, top_p=0.7) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, min_p=0.1) > 0).tolist() == [False, True, True, True]
    assert frequencies(logits, temperature=0).tolist() == [0, 1, 0, 0]
    assert frequencies(logits, temperature=1e-30).tolist() == [0, 1, 0, 0]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24])
    drawn = sample(logits.expand(3, -1), edges, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0)
    assert set(drawn.tolist()) <= {1, 3}


def test_model_with_its_own_vocabulary() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=300, block_size=16))
    row = generate(model, [[1, 2, 3]], max_new_tokens=5)[0]
    assert len(row.tokens) == 5
    assert max(row.tokens) < 300
