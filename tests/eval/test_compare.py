"""`compare`: paired differences against the plain formulas, and files that do not belong together."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from hellaswag_items import write_items

from gpt2_eval import evaluate_hellaswag, evaluate_loss
from gpt2_eval.cli import main
from gpt2_eval.compare import Comparison, compare_files, mcnemar, verdict
from gpt2_eval.report import write_records


def task_records(right):
    """Items of two choices, of which those that are named are answered rightly."""
    return [{"item": i, "label": 0, "sum": [0.0, -1.0 if i in right else 1.0]} for i in range(100)]


def test_accuracy(tmp_path):
    a = write_items(tmp_path / "a.jsonl", task_records(range(40)))
    b = write_items(tmp_path / "b.jsonl", task_records(range(10, 65)))
    items, metrics = compare_files(a, b)
    assert items == 100
    acc = metrics["acc"]
    assert (acc.a, acc.b, acc.changed, acc.only_a, acc.only_b) == (0.40, 0.55, 35, 10, 25)
    assert acc.difference == pytest.approx(0.15)
    differences = np.array([-1] * 10 + [0] * 30 + [1] * 25 + [0] * 35)
    assert acc.stderr == pytest.approx(differences.std(ddof=1) / 10)
    assert acc.stderr < math.sqrt(0.40 * 0.60 / 100 + 0.55 * 0.45 / 100)
    assert acc.p == pytest.approx(2 * sum(math.comb(35, k) for k in range(11)) / 2**35)


def test_changed_answers_need_not_be_right(tmp_path):
    """What bf16 does to a model is not seen where one wrong answer replaces another."""
    sums = [[0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [3.0, 1.0, 2.0]]
    a, b = (
        write_items(tmp_path / name, [{"item": i, "label": 0, "sum": one[::step]} for i, one in enumerate(sums)])
        for name, step in (("a", 1), ("b", -1))
    )
    acc = compare_files(a, b)[1]["acc"]
    assert (acc.changed, acc.only_a, acc.only_b) == (2, 1, 1)  # 1 -> 1, 2 -> 0 and 0 -> 2


def test_verdict():
    """Chance explains 10 against 25 items in 1.7 % of cases, 10 against 20 in 9.9 %; of losses, less is better."""
    better, same = (Comparison(0.4, 0.5, 0.1, 0.06, p=mcnemar(10, only_b)) for only_b in (25, 20))
    assert verdict({"acc": better}) == "B is better than A by acc (at a level of 5 %)."
    assert verdict({"acc": same}).startswith("No significant difference")
    assert verdict({"acc": better, "acc_norm": same}).startswith(
        "B is better than A by acc; the others show no significant difference"
    )
    worse, close = (Comparison(2.0, 2.1, 0.1, stderr) for stderr in (0.05, 0.06))
    assert verdict({"loss": worse}).startswith("A is better than B by loss")
    assert verdict({"loss": close, "x": Comparison(1, 2, 1, math.nan)}).startswith("No significant difference")
    assert verdict({"acc": better, "nats": worse}).startswith("A is better by nats, B by acc")


def test_mcnemar():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 1) == 1.0
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(1000, 1100) == pytest.approx(0.0308, rel=0.01)  # the normal approximation: z = 99 / sqrt(2100)
    assert 0 <= mcnemar(2000, 8000) < 1e-300


def test_hellaswag_and_loss(model, items_file, dataset, tmp_path):
    other = type(model)(model.config).eval()
    results = [evaluate_hellaswag(one, items_file) for one in (model, other)]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, result in zip(paths, results, strict=True):
        write_records(path, result.records)
    _, metrics = compare_files(*paths)
    assert list(metrics) == [
        "karpathy acc", "karpathy acc_norm", "lm-eval acc", "lm-eval acc_norm", "lm-eval acc_bytes",
    ]  # fmt: skip
    for name, one in metrics.items():
        protocol, metric = name.split()
        assert one.a == pytest.approx(results[0].metrics[protocol][metric].value)
        assert one.b == pytest.approx(results[1].metrics[protocol][metric].value)

    losses = [evaluate_loss(one, dataset, tokens=500, seq_len=64) for one in (model, other)]
    for path, result in zip(paths, losses, strict=True):
        write_records(path, result.records)
    items, metrics = compare_files(*paths)
    assert items == 8
    assert metrics["loss"].difference == pytest.approx(losses[1].loss - losses[0].loss)
    assert metrics["loss"].p is None
    done = CliRunner().invoke(main, ["compare", *map(str, paths)])
    assert done.exit_code == 0, done.output
    assert f"{losses[0].loss:.4f}" in done.stdout
    document = json.loads(CliRunner().invoke(main, ["compare", *map(str, paths), "--json"]).stdout)
    assert document["verdict"] in done.stdout
    assert document["loss"]["difference"] == pytest.approx(metrics["loss"].difference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:-1], "has 100 items and .* 99: these are not the same"),
        (lambda records: [records[1], records[0], *records[2:]], "item 1 of .* is not item 1 of"),
        (lambda records: [{**records[0], "label": 1}, *records[1:]], "item 1 of .* is not item 1 of"),
        # The same numbers and labels, another text.
        (lambda records: [*records[:7], {**records[7], "hash": "07"}, *records[8:]], "item 8 of .* is not item 8"),
        (lambda records: [{"ind": 0, "label": 0, "karpathy": {}}], "these are not the same items"),
        (
            lambda records: [*records[:50], {"item": 50, "label": 0}, *records[51:]],
            "one kind of record throughout",
        ),
        (lambda records: [{"item": i, "label": 0} for i in range(100)], "is not a file that gpt2-eval --out"),
        (lambda records: [], "holds no items"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, change, message):
    records = task_records(range(40))
    a, b = write_items(tmp_path / "a.jsonl", records), write_items(tmp_path / "b.jsonl", change(records))
    with pytest.raises(ValueError, match=message):
        compare_files(a, b)
    with pytest.raises(FileNotFoundError, match="No such file"):
        compare_files(a, tmp_path / "c.jsonl")
