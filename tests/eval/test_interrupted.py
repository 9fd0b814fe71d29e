"""An evaluation that is told to stop ends before its next batch, without a number; test_ranks.py has the ranks."""

import pytest

from gpt2_eval import Interrupted, Row, evaluate_hellaswag, evaluate_loss, score_items

ITEMS = [[Row([1, 2], [token])] for token in range(3, 23)]


@pytest.fixture(params=["rows", "hellaswag", "loss"])
def evaluate(request, model, items_file, dataset):
    """Each of the three, in more than three batches."""
    if request.param == "rows":
        return lambda **options: score_items(model, ITEMS, batch_size=4, **options)
    if request.param == "hellaswag":
        return lambda **options: evaluate_hellaswag(model, items_file, batch_size=8, **options).records
    return lambda **options: evaluate_loss(model, dataset, seq_len=64, batch_size=2, **options).loss


def test_stops_before_the_batch_that_it_was_asked_at(evaluate, model, monkeypatch):
    batches = []
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda *args: batches.append(1) or hidden(*args))
    whole = evaluate()
    assert len(batches) > 3
    asked = []
    for wanted in (0, 2, len(batches) - 1):
        done = len(batches)
        asked.clear()
        with pytest.raises(Interrupted, match="told to stop"):
            evaluate(stop=lambda wanted=wanted: asked.append(1) or len(asked) > wanted)
        assert len(batches) - done == wanted
        assert len(asked) == wanted + 1
        del batches[done:]
    asked.clear()
    assert evaluate(stop=lambda: bool(asked.append(1))) == whole
    assert len(asked) == len(batches) // 2


def test_mode_comes_back(model):
    model.train()
    try:
        with pytest.raises(Interrupted):
            score_items(model, ITEMS, stop=lambda: True)
        assert model.training
    finally:
        model.eval()
