"""Both protocols against loops written out here, the data's traps, and every way in which a line can be broken."""

import json
import math

import numpy as np
import pytest

from gpt2_eval import evaluate_hellaswag, load_hellaswag
from gpt2_eval.report import accuracy, finite, ratio_standard_error, write_records
from gpt2_model import EOT, get_tokenizer


@pytest.fixture(scope="module")
def result(model, items_file):
    return evaluate_hellaswag(model, items_file, batch_size=8)


def log_likelihood(reference, context, continuation):
    """Sum over `continuation` given `context`, both ids."""
    return reference([*(context or [EOT]), *continuation])[-len(continuation) :].sum()


def test_karpathy_equals_a_plain_loop(result, items, reference):
    encode = get_tokenizer().encode_ordinary
    correct = {"sum": 0, "mean": 0}
    for item, record in zip(items, result.records, strict=True):
        assert (record["ind"], record["label"]) == (item["ind"], item["label"])
        endings = [encode(" " + ending) for ending in item["endings"]]
        sums = [log_likelihood(reference, encode(item["ctx"]), ids) for ids in endings]
        means = [total / len(ids) for total, ids in zip(sums, endings, strict=True)]
        assert record["karpathy"]["sum"] == pytest.approx(sums, abs=1e-4)
        assert record["karpathy"]["mean"] == pytest.approx(means, abs=1e-4)
        correct["sum"] += sums.index(max(sums)) == item["label"]
        correct["mean"] += means.index(max(means)) == item["label"]
    metrics = result.metrics["karpathy"]
    assert metrics["acc"].value == correct["sum"] / len(items)
    assert metrics["acc_norm"].value == correct["mean"] / len(items)


def test_one_protocol_loaded_items_and_a_limit(model, items_file, result):
    data = load_hellaswag(items_file)
    alone = evaluate_hellaswag(model, data, protocol="lm-eval")
    assert list(alone.metrics) == ["lm-eval"]
    assert list(alone.records[0]) == ["ind", "label", "hash", "lm-eval"]
    assert alone.metrics["lm-eval"] == result.metrics["lm-eval"]
    assert not alone.partial
    with pytest.raises(ValueError, match="unknown protocol 'nanochat'"):
        evaluate_hellaswag(model, data, protocol="nanochat")
    limited = evaluate_hellaswag(model, load_hellaswag(items_file, limit=6))
    assert (limited.items, limited.partial) == (6, True)
    assert limited.data_sha256 == result.data_sha256
    for ours, whole in zip(limited.records, result.records, strict=False):
        assert ours["karpathy"]["sum"] == pytest.approx(whole["karpathy"]["sum"], abs=1e-4)
    assert not evaluate_hellaswag(model, load_hellaswag(items_file, limit=99)).partial
    single = finite(evaluate_hellaswag(model, load_hellaswag(items_file, limit=1)).as_dict())
    parsed = json.loads(json.dumps(single), parse_constant=pytest.fail)  # JSON has no NaN
    assert parsed["karpathy"]["stderr"] is None


def test_uniform_model_ties_go_to_the_lowest_index(uniform, items_file, items):
    result = evaluate_hellaswag(uniform, items_file)
    mean = result.metrics["karpathy"]["acc_norm"]
    assert mean.ties == len(items)
    assert mean.value == np.mean([item["label"] == 0 for item in items])
    assert result.records[3]["karpathy"]["mean"] == pytest.approx([-math.log(50257)] * 4, rel=1e-6)
    # By their sum the shortest ending wins, alone.
    assert result.records[3]["karpathy"]["sum"] == pytest.approx([-n * math.log(50257) for n in (1, 2, 3, 4)])


def test_standard_errors():
    scores = [[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    estimate = accuracy(scores, [0, 0, 1, 2]).estimate()
    assert (estimate.value, estimate.ties) == (0.5, 1)
    assert estimate.stderr == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4))
    assert math.isnan(accuracy(scores[:1], [0]).estimate().stderr)
    totals, lengths = np.array([3.0, 5.0, 7.0]), np.array([2, 2, 2])
    assert ratio_standard_error(totals, lengths) == pytest.approx(np.std([1.5, 2.5, 3.5], ddof=1) / math.sqrt(3))


def test_records_appear_whole_or_not_at_all(tmp_path, result):
    path = tmp_path / "items.jsonl"
    write_records(path, result.records)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(path, [result.records[0], {"nats": math.nan}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == result.records
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("label"), "no label: the test split has none"),
        (lambda item: item.pop("ctx"), "no 'ctx'$"),
        (lambda item: item.update(label=4), "label 4 is not 0, 1, 2 or 3"),
        (lambda item: item.update(label=True), "label True is not"),
        (lambda item: item.update(label=""), "no label: the test split has none"),
        (lambda item: item.update(ind="x"), "ind 'x' is not a whole number"),
        (lambda item: item.update(ctx_b=None), "ctx_b is not text"),
        (lambda item: item.update(endings=["a", "b", "c"]), "endings is not a list of four texts"),
        (lambda item: item.update(endings=["a", "b", "c", 4]), "endings is not a list of four texts"),
        (lambda item: item.update(endings=["a", "b", "[step]", "d"]), "ending 2 is empty"),
        (lambda item: item.update(endings=["a", "b", "\ud800", "d"]), "surrogates not allowed"),
    ],
)
def test_broken_items_name_file_and_line(items, tmp_path, change, message):
    path, broken = tmp_path / "broken.jsonl", dict(items[1])
    change(broken)
    path.write_text(f"{json.dumps(items[0])}\n{json.dumps(broken)}\n")
    with pytest.raises(ValueError, match=rf"broken\.jsonl:2: .*{message}"):
        load_hellaswag(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *[(line, r"broken\.jsonl:1: not") for line in (b'{"ind": 1', b"\xff\xfe", b"[" * 100_000, b"[]", b"null")],
        (b"\n{\n{}\n{}\n", r"broken\.jsonl:2: not JSON: .* \(and 2 more of 3 records\)$"),
        (b"\n\n", "holds no items"),
        (None, "No such file"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_hellaswag(path)


def test_truncated_contexts_and_labels_as_text(model, items, tmp_path):
    path = tmp_path / "long.jsonl"
    long = items[1] | {"ctx": "word " * 300, "label": "3"}
    path.write_text(json.dumps(items[0]) + "\n" + json.dumps(long) + "\n")
    assert load_hellaswag(path).items[1].label == 3
    result = evaluate_hellaswag(model, path)
    assert result.truncated == {"karpathy": 4, "lm-eval": 0}
    assert result.as_dict()["karpathy"]["truncated"] == 4
