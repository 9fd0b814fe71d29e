"""score_items against a plain loop over transformers' model, and what must not change its results."""

import re

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_eval import Interrupted, Row, RowScore, evaluate_hellaswag, evaluate_loss, score_items
from gpt2_eval.packing import fill_lines, lay_out, pack
from gpt2_eval.ranks import gather_records
from gpt2_eval.resume import remove_scores
from gpt2_eval.scoring import CPU_HEAD_BLOCK, count_truncated, plan_batches, token_scores
from gpt2_model import EOT


def logprobs(scored):
    return np.array([row.logprob for item in scored for row in item])


def score_rows(model, rows, **options):
    """Log-likelihoods of rows that are items of their own."""
    return logprobs(score_items(model, [[row] for row in rows], **options))


@pytest.fixture(scope="module")
def cases():
    """Rows that begin alike by their contexts, further, or not at all; one ends where another goes on."""
    draw = np.random.default_rng(3)

    def ids(size):
        return draw.integers(50257, size=size).tolist()

    shared = [ids(size) for size in (50, 7, 1, 0, 120)]
    cases = [[Row(context, ids(size)) for size in (3, 9, 1, 12)] for context in shared]
    cases.append([Row([*shared[0], *ids(size)], [9, 8, 7]) for size in (4, 2)])  # as WinoGrande has it
    cases.append([Row(shared[0], [5, 6, *ids(3)]), Row(shared[0], [5, 6, *ids(7)])])
    cases.append([Row(shared[1], [1, 2, 3]), Row(shared[1], [1, 2]), Row(shared[1], [1, 2, 3])])
    cases.append([Row(ids(5), ids(3)), Row(ids(8), ids(2))])
    cases.append([Row(ids(9), ids(4))])
    cases.append([Row(ids(130), ids(3)), Row(ids(3), ids(100))])  # the first is cut
    cases += [[Row(ids(400), ids(3))], [Row(ids(2), ids(128))], [Row(ids(127), ids(2))]]  # two of these, too
    return cases


@pytest.fixture(scope="module")
def rows(cases):
    return [row for item in cases for row in item]


@pytest.fixture(scope="module")
def scores(reference, rows):
    """No batch, no padding, no shortcut: the last 129 ids of a row, of which the continuation's are summed."""
    ids = [[*(row.context or [EOT]), *row.continuation][-129:] for row in rows]
    pairs = zip(ids, rows, strict=True)
    return np.array([reference(all_ids)[-len(row.continuation) :].sum() for all_ids, row in pairs])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, None])
def test_equals_transformers_row_by_row_in_any_order(model, cases, rows, scores, batch_size):
    scored = score_items(model, cases, batch_size=batch_size)
    assert [len(item) for item in scored] == [len(item) for item in cases]
    np.testing.assert_allclose(logprobs(scored), scores, rtol=0, atol=2e-4)
    order = np.random.default_rng(1).permutation(len(rows))
    alone = score_rows(model, [rows[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(alone, scores[order], rtol=0, atol=1e-4)


def test_a_shared_prefix_stands_once(cases):
    rows = cases[0]
    [packed] = pack(rows, 10, 128, share=True)
    assert len(packed.tokens) == 50 + (3 + 9 + 1 + 12 - 4)
    assert packed.rows == [10, 11, 12, 13]
    assert [len(scored) for scored in packed.scored] == [3, 9, 1, 12]
    # The last id of the context predicts the first of each continuation.
    assert {scored[0] for scored in packed.scored} == {49}
    for row, scored in zip(rows, packed.scored, strict=True):
        assert [packed.tokens[place] for place in scored[1:]] == row.continuation[:-1]
        assert [packed.positions[place] for place in scored] == list(range(49, 49 + len(row.continuation)))
    assert len(pack(rows, 0, 128, share=False)) == 4
    further = cases[6]
    assert len(pack(further, 0, 128, share=True)[0].tokens) == 50 + 2 + (3 - 1) + (7 - 1)


def test_lines_hold_every_pack_once_and_are_full(cases):
    packs = sorted((pack(item, 0, 128, share=True)[0] for item in cases * 20), key=lambda p: -len(p.tokens))
    lines = fill_lines(packs, 256)
    assert sum(map(len, lines)) == len(packs)
    assert all(sum(len(part.tokens) for part in line) <= 256 for line in lines)
    assert len(lines) <= 1.05 * sum(len(part.tokens) for part in packs) / 256 + 1
    batch = lay_out(lines[:2], 4, 256)
    assert batch.tokens.shape == (4, 256)
    assert not batch.causal
    seen = batch.layout(torch.device("cpu")).mask[:, 0]
    assert seen.diagonal(dim1=1, dim2=2).all()  # a query that sees nothing would be NaN
    assert not seen.triu(1).any()


def test_half_of_the_positions_of_hellaswag_s_shape(model):
    """Context 50 and endings of 29 ids, four of them: 167 inputs for 4 x 78."""
    cases = [[Row(list(range(50)), [i, j] * 14 + [7]) for j in range(4)] for i in range(100)]
    assert sum(batch.tokens.size for batch in plan_batches(model, cases)) < 0.54 * 100 * 4 * 78


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
def test_compiled_equals_plain_and_compiles_once(model, cases, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("gpt2_eval.scoring.CPU_BATCH_TOKENS", 1024)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chosen in (cases, cases[3:], cases * 2):
            plain = score_items(model, chosen)
            compiled = score_items(model, chosen, compile=True)
            np.testing.assert_allclose(logprobs(compiled), logprobs(plain), rtol=0, atol=2e-4)


def test_greedy(model, model_folder):
    reference = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    prompt = torch.tensor([[10, 20, 30]])
    ids = reference.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=EOT)[0, 3:].tolist()
    wrong = (ids[-1] + 1) % 50257
    continuations = [ids, [*ids[:-1], wrong], [wrong, ids[1]], ids[:1]]
    [scored] = score_items(model, [[Row([10, 20, 30], ids) for ids in continuations]])
    assert [score.greedy for score in scored] == [True, False, False, True]
    assert [scored[i].last_greedy for i in (0, 1, 3)] == [True, False, True]


class Counted:
    """A model whose forward passes are counted, and which may fail at one."""

    def __init__(self, model, fail_at=None):
        self.model, self.calls, self.fail_at = model, 0, fail_at

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, *arguments):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.model.hidden(*arguments)


def test_scores_of_a_killed_call_are_not_computed_again(model, cases, tmp_path):
    out = tmp_path / "items.jsonl"
    options = {"batch_size": 2, "resume": out}
    whole = Counted(model)
    expected = score_items(whole, cases, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        score_items(Counted(model, fail_at=4), cases, **options)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b'{"3": [-1.0, fal')  # a line that the kill cut
    second = Counted(model)
    assert score_items(second, cases, **options) == expected  # to the bit
    assert second.calls == whole.calls - 3
    stopped = Counted(model)
    with pytest.raises(Interrupted):
        score_items(stopped, cases, **options, stop=lambda: True)
    third = Counted(model)
    assert score_items(third, cases, **options) == expected
    assert third.calls == 0
    remove_scores(out)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_something_else_are_not_used(model, cases, tmp_path):
    out = tmp_path / "items.jsonl"
    score_items(model, cases, resume=out)
    for changed, chosen, dtype in (
        (model, cases[1:], None), (model, cases, torch.bfloat16), (other_weights(model), cases, None),
    ):  # fmt: skip
        counted = Counted(changed)
        score_items(counted, chosen, resume=out, autocast_dtype=dtype)
        assert counted.calls > 0


def other_weights(model):
    changed = type(model)(model.config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    return changed


def test_rows_that_are_truncated_are_counted(rows):
    assert count_truncated([rows], 128) == 4  # not the last, which needs 128 inputs: its final token is none
    assert count_truncated([[Row([], [1] * 128)]], 128) == 0


def test_progress_in_a_log(model, cases, capsys, monkeypatch, tmp_path):
    """Where there is no terminal: lines with the time left, and how many rows were scored before."""
    monkeypatch.setattr("gpt2_eval.progress.SECONDS", 0.001)
    options = {"batch_size": 3, "progress": True, "resume": tmp_path / "out"}
    score_items(model, cases, **options)
    assert re.search(r"scoring rows: 1 of \d batches, \d\d:\d\d left\n", capsys.readouterr().err)
    score_items(model, cases, **options)
    assert re.match(r"(\d+) of \1 rows were scored before\n", capsys.readouterr().err)


def test_no_items_and_no_rows(model):
    assert score_items(model, []) == []
    empty, [one] = score_items(model, [[], [Row([1], [2])]])
    assert (empty, type(one)) == ([], RowScore)


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back(model, rows, training):
    model.train(training)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # an autocast around the call does not reach in
            inside = score_rows(model, rows[:4])
        assert model.training is training
        with pytest.raises(Interrupted):
            score_rows(model, rows, stop=lambda: True)
        assert model.training is training
    finally:
        model.eval()
    np.testing.assert_array_equal(inside, score_rows(model, rows[:4]))


def test_training_continues_after_scoring_under_the_same_autocast(model, rows, dataset):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_rows(model, rows[:4], autocast_dtype=torch.bfloat16)
        evaluate_loss(model, dataset, tokens=64, autocast_dtype=torch.bfloat16)
        _, loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
        loss.backward()
    model.zero_grad()


def test_bf16_is_close(model, rows, scores):
    rounded = score_rows(model, rows, autocast_dtype=torch.bfloat16)
    assert not np.array_equal(rounded, scores)
    np.testing.assert_allclose(rounded, scores, rtol=0.02)


def test_head_in_pieces(model, monkeypatch):
    monkeypatch.setattr("gpt2_eval.scoring.CPU_HEAD_BLOCK", (64, CPU_HEAD_BLOCK[1]))
    positions = 64 + 3
    hidden, targets = 30 * torch.randn(positions, 64), torch.randint(50257, (positions,))
    with torch.inference_mode():
        logits = model.head(hidden)
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        best = logits.argmax(-1)
        for states, weight in ((hidden, model.head_weight), (logits, None)):
            log_probs, greedy = token_scores(states.clone(), weight, targets)
            torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-4)
            assert greedy.sum() == (best == targets).sum()
            assert token_scores(states.clone(), weight, best)[1].all()


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


def test_nan_is_an_error(uniform, dataset):
    uniform.head_weight = torch.full((50257, 1), float("nan"))
    with pytest.raises(ValueError, match="2 of 2 rows have a log-likelihood of NaN"):
        score_rows(uniform, [Row([1], [2]), Row([1], [3])])
    with pytest.raises(ValueError, match="3 of 3 windows have a log-likelihood of NaN"):
        evaluate_loss(uniform, dataset, tokens=300)


@pytest.mark.parametrize("mine", [{0: 1.0}, {0: 1.0, 1: 2.0, 3: 4.0}])
def test_gathering_notices_gaps(mine):
    with pytest.raises(RuntimeError, match="each once"):
        gather_records(mine, 3)


@pytest.fixture(params=["rows", "hellaswag", "loss"])
def evaluate(request, model, cases, items_file, dataset):
    """Each of the three, in more than three batches."""
    if request.param == "rows":
        return lambda **options: score_items(model, cases[:5] * 2, batch_size=2, **options)
    if request.param == "hellaswag":
        return lambda **options: evaluate_hellaswag(model, items_file, batch_size=8, **options).records
    return lambda **options: evaluate_loss(model, dataset, seq_len=64, batch_size=2, **options).loss


def test_stops_before_the_batch_that_it_was_asked_at_and_resumes(evaluate, model, monkeypatch, tmp_path):
    batches, hidden = [], type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda *args: batches.append(1) or hidden(*args))
    whole = evaluate()
    total = len(batches)
    assert total > 3
    asked = []
    for wanted in (0, 2, total - 1):
        out = tmp_path / str(wanted)
        batches.clear()
        asked.clear()
        with pytest.raises(Interrupted, match="stopped before it finished"):
            evaluate(stop=lambda wanted=wanted: asked.append(1) or len(asked) > wanted, resume=out)
        assert (len(batches), len(asked)) == (wanted, wanted + 1)
        assert evaluate(resume=out) == whole  # to the bit
        assert len(batches) == total
    asked.clear()
    assert evaluate(stop=lambda: bool(asked.append(1))) == whole
    assert len(asked) == total
