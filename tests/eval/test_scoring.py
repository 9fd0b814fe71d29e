"""score_rows against a plain loop over transformers' model, and what must not change its results."""

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_eval import Row, score_rows
from gpt2_eval.scoring import CPU_HEAD_POSITIONS, count_truncated, gather_records, token_log_probs
from gpt2_model import EOT


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    return [
        Row(
            generator.integers(50257, size=context).tolist(), generator.integers(50257, size=continuation).tolist()
        )
        for context, continuation in generator.integers((0, 1), (60, 40), size=(30, 2))
    ]


def scored_one_by_one(reference, rows, block_size):
    """No batch, no padding, no shortcut: log-softmax over all of a row, then the continuation's tokens summed."""
    sums = []
    for row in rows:
        ids = torch.tensor([[*(row.context or [EOT]), *row.continuation]])[:, -(block_size + 1) :]
        with torch.no_grad():
            log_probs = reference(ids[:, :-1]).logits.log_softmax(-1)
        taken = log_probs[0].gather(1, ids[0, 1:, None])[:, 0]
        sums.append(taken[-len(row.continuation) :].sum().item())
    return np.array(sums)


@pytest.fixture(scope="module")
def scores(model, rows):
    return score_rows(model, rows, batch_size=17)


def test_equals_transformers_row_by_row(model_folder, rows, scores):
    reference = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    expected = scored_one_by_one(reference, rows, 128)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_left_truncation_equals_transformers(model, model_folder):
    rows = [Row(list(range(1000, 1400)), [5, 6, 7]), Row([1, 2], list(range(128))), Row(list(range(127)), [3, 4])]
    reference = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    np.testing.assert_allclose(score_rows(model, rows), scored_one_by_one(reference, rows, 128), rtol=0, atol=2e-4)
    assert count_truncated(rows, 128) == 2  # the last needs 128 inputs: its final token is none
    assert count_truncated([Row([], [1] * 128)], 128) == 0


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_batch_size_changes_nothing(model, rows, scores, batch_size):
    np.testing.assert_allclose(score_rows(model, rows, batch_size=batch_size), scores, rtol=0, atol=1e-4)


def test_order_of_rows_changes_nothing(model, rows, scores):
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = score_rows(model, [rows[i] for i in order])
    np.testing.assert_allclose(shuffled, scores[order], rtol=0, atol=1e-4)


def test_empty_context_is_eot(model):
    empty, eot = score_rows(model, [Row([], [40, 41]), Row([EOT], [40, 41])])
    assert empty == pytest.approx(eot, abs=1e-5)


def test_no_rows(model):
    assert score_rows(model, []).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back(model, rows, training):
    model.train(training)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # an autocast around the call does not reach in
            inside = score_rows(model, rows[:4])
        assert model.training is training
    finally:
        model.eval()
    np.testing.assert_array_equal(inside, score_rows(model, rows[:4]))


def test_training_goes_on_after_scoring_under_the_same_autocast(model, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_rows(model, rows[:4], autocast_dtype=torch.bfloat16)
        _, loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        loss.backward()
    model.zero_grad()


def test_bf16_is_close(model, rows, scores):
    rounded = score_rows(model, rows, autocast_dtype=torch.bfloat16)
    assert not np.array_equal(rounded, scores)
    np.testing.assert_allclose(rounded, scores, rtol=0.02)


def test_head_in_pieces(model):
    hidden, targets = (
        torch.randn(CPU_HEAD_POSITIONS * 2 + 3, 64),
        torch.randint(50257, (CPU_HEAD_POSITIONS * 2 + 3,)),
    )
    with torch.inference_mode():
        expected = model.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(token_log_probs(model, hidden, targets), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([1], []), "row 0: a continuation of 0 tokens"),
        (Row([1], [2] * 129), "row 0: a continuation of 129 tokens"),
        (Row([1], [50257]), "row 0 has a token id beyond the model's vocabulary of 50257"),
    ],
)
def test_rows_that_cannot_be_scored(model, row, message):
    with pytest.raises(ValueError, match=message):
        score_rows(model, [row])


def test_nan_is_an_error(uniform):
    uniform.head = lambda hidden: torch.full((*hidden.shape[:-1], 50257), float("nan"))
    with pytest.raises(ValueError, match="2 of 2 rows have a log-likelihood of NaN"):
        score_rows(uniform, [Row([1], [2]), Row([1], [3])])


@pytest.mark.parametrize("mine", [{0: 1.0}, {0: 1.0, 1: 2.0, 3: 4.0}])
def test_gathering_notices_gaps(mine):
    with pytest.raises(RuntimeError, match="each once"):
        gather_records(mine, 3)
