"""An evaluation that is told to stop ends on every rank, with no number at all, and leaves everything usable."""

import subprocess
import sys

import numpy as np
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


RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
from gpt2_data import open_dataset
from gpt2_eval import Interrupted, Row, evaluate_hellaswag, evaluate_loss, score_items
from gpt2_model import GPT

rank, store, model, items, data = int(sys.argv[1]), *sys.argv[2:]
where = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
dist.init_process_group("gloo", **where, timeout=timedelta(seconds=30))
model, dataset = GPT.from_pretrained(model), open_dataset(data)
items_of_rows = [[Row([1, 2], [token])] for token in range(3, 23)]
for told in (0, 1, None):  # the rank that is told to stop, at its second batch; the other goes on to its end
    for evaluate in (
        lambda stop: sum(row.logprob for [row] in score_items(model, items_of_rows, batch_size=4, stop=stop)),
        lambda stop: evaluate_hellaswag(model, items, batch_size=4, stop=stop).metrics["karpathy"]["acc"].value,
        lambda stop: evaluate_loss(model, dataset, seq_len=64, batch_size=2, stop=stop).loss,
    ):
        asked = []
        try:
            print(evaluate(lambda: asked.append(1) or (rank == told and len(asked) == 2)))
        except Interrupted:
            print("interrupted after", len(asked))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_stop_when_one_is_told_to(
    model, model_folder, items_file, dataset_folder, dataset, environment, tmp_path
):
    """Neither hangs, neither has a number, and the next evaluation of the same ranks is whole and right."""
    paths = [str(path) for path in (tmp_path / "store", model_folder, items_file, dataset_folder)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *paths],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        results = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [errors for _, errors in results]
    lines = [output.splitlines() for output, _ in results]
    assert all(line.startswith("interrupted after") for output in lines for line in output[:6])
    for told in (0, 1):  # the one told at its second batch; the other only learned of it at the end
        assert [line.split()[-1] for line in lines[told][3 * told : 3 * told + 3]] == ["2"] * 3
        assert all(int(line.split()[-1]) > 2 for line in lines[1 - told][3 * told + 1 : 3 * told + 3])
    assert lines[0][6:] == lines[1][6:]
    expected = [
        sum(row.logprob for [row] in score_items(model, ITEMS, batch_size=4)),
        evaluate_hellaswag(model, items_file, batch_size=4).metrics["karpathy"]["acc"].value,
        evaluate_loss(model, dataset, seq_len=64, batch_size=2).loss,
    ]
    np.testing.assert_allclose([float(line) for line in lines[0][6:]], expected, rtol=1e-6)
