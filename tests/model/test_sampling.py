import numpy as np
import pytest
import torch
import transformers

from gpt2_model.sampling import Sampling, penalize, sample, uniforms


def frequencies(logits, **options) -> np.ndarray:
    count = 20_000
    uniform = torch.from_numpy(uniforms(0, 0, count))
    drawn = sample(torch.tensor([logits]).expand(count, -1), uniform, Sampling(**{"top_k": None, **options}))
    return np.bincount(drawn.numpy(), minlength=len(logits)) / count


def test_truncation_keeps_what_it_should() -> None:
    logits = [0.0, 3.0, 1.0, 2.0]  # probabilities 0.03, 0.64, 0.09, 0.24
    assert (frequencies(logits, top_k=2) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.6) > 0).tolist() == [False, True, False, False]
    assert (frequencies(logits, top_p=0.7) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, min_p=0.1) > 0).tolist() == [False, True, True, True]
    assert frequencies(logits, temperature=0).tolist() == [0, 1, 0, 0]
    assert frequencies(logits, temperature=1e-30).tolist() == [0, 1, 0, 0]


def test_exactly_k_stay_of_equal_ones() -> None:
    assert (frequencies([1.0] * 6, top_k=4) > 0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_fp32(dtype) -> None:
    """A bf16 cumulative sum over 50,257 equal tokens would never get beyond the first 256."""
    drawn = sample(
        torch.zeros(200, 50257, dtype=dtype), torch.linspace(0, 0.999, 200), Sampling(top_k=None, top_p=0.999)
    )
    np.testing.assert_allclose(np.sort(drawn.numpy()) / 50257, np.linspace(0, 0.999, 200), atol=0.01)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert set(sample(logits.expand(3, -1), edges, Sampling(top_k=None)).tolist()) <= {1, 3}


def test_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(3, 40)
    ids = torch.randint(0, 40, (3, 12))
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    torch.testing.assert_close(penalize(logits, seen, 1.7), expected)


ALL = {"top_k": 20, "top_p": 0.7, "min_p": 0.05}


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, ALL])
def test_the_distribution_is_that_of_transformers(options) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 60)
    scores = logits / 0.9
    for name, value in options.items():
        warper = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}[name]
        scores = getattr(transformers, warper)(value)(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    actual = frequencies(logits[0].tolist(), temperature=0.9, **options)
    np.testing.assert_allclose(actual, expected, atol=0.015)
    assert ((actual > 0) <= (expected > 0)).all()


def test_a_rows_numbers_are_its_own() -> None:
    assert not np.array_equal(uniforms(0, 0, 8), uniforms(0, 1, 8))
    assert not np.array_equal(uniforms(0, 0, 8), uniforms(1, 0, 8))
    np.testing.assert_array_equal(uniforms(5, 3, 20)[:8], uniforms(5, 3, 8))
