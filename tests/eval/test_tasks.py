"""Tasks and corpora against loops written out here; where their files come from; broken records."""

import hashlib
import json
import math
import os
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from hellaswag_items import write_items
from hub_server import HubServer, use

from gpt2_eval import cli, load_hellaswag
from gpt2_eval.corpora import CORPORA, detokenize, evaluate_corpus, load_corpus, rows_of, split_pages, windows_of
from gpt2_eval.published import Published, find_file
from gpt2_eval.report import CorpusResult, Estimate, Perplexity, TaskResult
from gpt2_eval.tables import _figure, show_result
from gpt2_eval.tasks import TASKS, evaluate_task, load_task
from gpt2_model import EOT, get_tokenizer

PASSAGES = ["She gave the dog a bone and the cat a fish", "He never saw a counterrevolutionary", "One two three"]


def test_lambada_counts_last_words_and_last_tokens(model, tmp_path):
    """Greedy by transformers' definition: argmax at each place, given the right tokens before it."""
    file = write_items(tmp_path / "lambada.jsonl", [{"text": text} for text in PASSAGES])
    result = evaluate_task(model, load_task("lambada", file))
    nats, words, tokens = [], [], []
    for text in PASSAGES:
        ids = get_tokenizer().encode_ordinary(text)
        count = len(ids) - len(get_tokenizer().encode_ordinary(text.rpartition(" ")[0]))
        logits = model(torch.tensor([ids[:-1]]))[0][0, -count:]
        targets = torch.tensor(ids[-count:])
        nats.append(-logits.log_softmax(-1).gather(1, targets[:, None]).sum().item())
        hits = (logits.argmax(-1) == targets).tolist()
        words.append(all(hits))
        tokens.append(hits[-1])
    assert result.metrics["lm-eval"]["acc"].value == sum(words) / 3
    assert result.metrics["lm-eval"]["acc_last_token"].value == sum(tokens) / 3
    assert result.metrics["lm-eval"]["perplexity"].value == pytest.approx(math.exp(sum(nats) / 3), rel=1e-4)
    assert [record["sum"][0] for record in result.records] == pytest.approx([-x for x in nats], abs=1e-4)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_task("lambada", file, limit=0)


def test_every_token_of_a_text_is_scored_once():
    ids = list(range(100, 400))
    for stride in (1, 7, 32, 64):
        rows = windows_of(ids, 64, stride, EOT)
        assert [token for row in rows for token in row.continuation] == ids
        assert rows[0].context == [EOT]
        for row in rows[1:]:
            assert len(row.context) + len(row.continuation) == 65  # 64 inputs, the last token is none
            assert len(row.context) >= 65 - stride
    assert windows_of([], 64, 64, EOT) == []
    assert [row.continuation for row in windows_of(ids[:5], 64, 64, EOT)] == [ids[:5]]


def test_perplexity_of_a_text(model, reference, tmp_path):
    text = " ".join(PASSAGES * 9)
    (tmp_path / "ptb.test.txt").write_text(text)
    corpus = load_corpus("ptb", tmp_path / "ptb.test.txt")
    whole = evaluate_corpus(model, corpus).perplexities["raw"]
    ids = [EOT, *get_tokenizer().encode_ordinary(text)]
    nats = 0.0
    for start in range(0, len(ids) - 1, 128):  # what is short of a window at the end has the more before it
        end = min(start + 128, len(ids) - 1)
        nats -= reference(ids[max(0, end - 128) : end + 1])[start - end :].sum()
    assert whole.token == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert whole.word == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)
    assert whole.bits_per_byte == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-4)
    assert (whole.tokens, whole.words, whole.bytes) == (len(ids) - 1, len(text.split()), len(text.encode()))
    overlapping = evaluate_corpus(model, corpus, stride=16).perplexities["raw"]
    assert overlapping.tokens == whole.tokens
    assert overlapping.token != whole.token
    with pytest.raises(ValueError, match="stride must be 1 to 128"):
        evaluate_corpus(model, corpus, stride=129)


def test_pages_of_wikitext():
    text = " \n = A = \n \n One .\n = = B = = \n Two .\n = C = D = \n Three .\n = E =F\n"
    assert "".join(split_pages(text)) == text[2:]
    assert [page.splitlines()[0] for page in split_pages(text)] == [" = A = ", " = C = D = "]
    # A blank that precedes 's goes too, be it a quotation: the harness' numbers are on such a text.
    assert detokenize("1 @,@ 000 @-@ year ( old ) ' s ' \" q \" .") == "1,000-year (old)'s' \"q\" ."


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("lambada", {}, "no 'text'"),
        ("lambada", {"text": None}, "not a record of this task"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c"}, "no 'label'"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, "label -1 is not one of the 2 choices"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": " ", "label": 0}, "a continuation is empty"),
        ("arc-easy", {"question": "a", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "'B'"),
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "has no _"),
        ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}, "no ''"),
        ("boolq", {"passage": "a", "question": "b", "label": "yes"}, "not a record of this task"),
    ],
)  # fmt: skip
def test_broken_records_name_file_and_line(tmp_path, name, record, message):
    file = write_items(tmp_path / "records.jsonl", [record])
    with pytest.raises(ValueError, match=rf"records\.jsonl:1: .*{message}"):
        load_task(name, file)


def test_files_that_hold_no_text(tmp_path):
    for name, content, message in (
        ("c.txt", b" \n", "holds no text"), ("d.txt", b"\xff", "not UTF-8"), ("e.jsonl", b"{}", "no 'sentence'"),
        ("f.parquet", b"PAR1", "not a readable Parquet"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus("ptb", tmp_path / name)


ROWS = [
    "",
    " = Robert Boulter = \n",
    "",
    " He acted\u2028in 2000 . \n",
    "",
    "",
    " = = Career = = \n",
    "",
    " The Bill . \n",
]
RAW = "".join(row or " \n" for row in ROWS)
PTB = ["no it was n't black monday", "but N points"]


def forms_of(raw, rows, name, folder):
    """The files in which a corpus is published and passed on: raw, of Windows, rows as Parquet and as JSONL."""
    (folder / "wiki.test.raw").write_bytes(raw.encode())
    (folder / "windows.txt").write_bytes(b"\xef\xbb\xbf" + raw.encode().replace(b"\n", b"\r\n"))
    records = [{name: row} for row in rows]
    pq.write_table(pa.Table.from_pylist(records), folder / "test.parquet")
    write_items(folder / "rows.jsonl", records)
    write_items(folder / "bare.jsonl", [{name: row.removesuffix("\n")} for row in rows])
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "raw", "rows", "field"),
    [("wikitext2", RAW, ROWS, "text"), ("wikitext103", RAW, ROWS, "text"),
     ("ptb", "".join(f" {row} \n" for row in PTB), PTB, "sentence")],
)  # fmt: skip
def test_a_corpus_is_one_text_whatever_form_its_file_has(tmp_path, name, raw, rows, field):
    """WikiText-2: three texts under one name, since the hub's rows have "" where the file has a blank line."""
    files = forms_of(raw, rows, field, tmp_path)
    assert len(files) == 5
    assert {load_corpus(name, file).text for file in files} == {raw}


def test_the_protocol_of_transformers_page_joins_the_hub_s_rows(model, tmp_path):
    """WikiText-2: transformers' page on perplexity scores "\\n\\n".join(rows), which is 287,644 tokens."""
    for file in forms_of(RAW, ROWS, "text", tmp_path):
        assert rows_of(load_corpus("wikitext2", file)) == ROWS
    expected = len(get_tokenizer().encode_ordinary("\n\n".join(ROWS)))
    result = evaluate_corpus(model, load_corpus("wikitext2", tmp_path / "rows.jsonl"), protocol="hf-page")
    assert {name: one.tokens for name, one in result.perplexities.items()} == {"hf-page": expected}
    assert CORPORA["wikitext2"].tokens == CORPORA["wikitext103"].tokens
    assert CORPORA["wikitext2"].tokens == {"raw": 286_221, "lm-eval": 272_082, "hf-page": 287_644}


@pytest.mark.skipif("GPT2_WIKITEXT" not in os.environ, reason="GPT2_WIKITEXT names no wiki.test.raw")
def test_the_published_wikitext_has_the_published_tokens():
    """WikiText-2: 286,221 tokens of the raw file and 287,644 of transformers' page."""
    corpus, count = load_corpus("wikitext2", os.environ["GPT2_WIKITEXT"]), get_tokenizer().encode_ordinary
    assert corpus.doubt == ""
    texts = {"raw": [corpus.text], "hf-page": ["\n\n".join(rows_of(corpus))]}
    texts["lm-eval"] = [detokenize(page) for page in split_pages(corpus.text)]
    assert {name: sum(len(count(text)) for text in one) for name, one in texts.items()} == CORPORA[
        "wikitext2"
    ].tokens


def test_published_figures_stand_beside_the_published_file_alone(tmp_path, monkeypatch, capsys):
    """walk.md 7: any text was scored under the name of WikiText-2."""
    one = Perplexity(2.0, 2.0, 2.0, 1.0, 0.7, 0.1, tokens=9, words=9, bytes=9)
    for protocol, tokens, doubt, expected in (
        ("hf-page", 287_644, "", ["29.41", "hf-page: 287,644 tokens, as published"]),
        ("raw", 286_221, "", ["raw: 286,221 tokens, as published"]),
        ("raw", 9, "Not the published file", ["(not the published file)", "raw: 9 tokens; GPT-2's of the pub"]),
        ("hf-page", 287_644, "Not the published file", ["(not the published file)"]),
    ):
        scored = {protocol: replace(one, tokens=tokens)}
        show_result(CorpusResult("wikitext2", "0" * 64, doubt, 1024, scored, 1.0), "124M", "cpu")
        table = capsys.readouterr().out
        assert all(text in table for text in expected), table
        assert ("29.41" in table, "as published" in table) == ("29.41" in expected, not doubt)
    for name, task in TASKS.items():
        accuracy = {"lm-eval": {"acc": Estimate(0.5, 0.1, 0)}}
        for total, sha256, published in ((task.file.items, task.file.sha256, True), (7, "0" * 64, False)):
            doubt = task.file.doubt(sha256 or "0" * 64, total, own=False)
            result = TaskResult(name, total, total, "0" * 64, doubt, accuracy, {"lm-eval": 0}, 1.0, [])
            show_result(result, "124M", "cpu")
            table = capsys.readouterr().out
            assert result.as_dict()["published_file"] is published
            assert ("not the published file" in table) is not published
            assert ("paper" in table) == (published and name == "lambada")
    assert "Not known to be" in TASKS["copa"].file.doubt("0" * 64, 100, own=True)


GOOD = {
    "lambada": {"text": "a b"},
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
    "arc-easy": {"question": "a", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "winogrande": {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "1"},
    "openbookqa": {"question_stem": "a", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
    "copa": {"premise": "a.", "choice1": "b", "choice2": "c", "question": "cause", "label": "0"},
    "boolq": {"passage": "a", "question": "b", "label": 0},
}


WRONG = [None, 1.5, True, [], {}, [1], "\ud800", ["a", None], {"text": "ab", "label": "AB"}, {"text": 1}]


@pytest.mark.parametrize("name", [*GOOD, "hellaswag", "wikitext2"])
def test_a_record_of_any_other_shape_is_refused_by_file_line_and_fields(name, items, tmp_path):
    """llm-foundry's JSONL of ARC: "list indices must be integers or slices, not str"."""
    good = GOOD | {"hellaswag": items[0], "wikitext2": {"text": " a \n"}}
    load = {"hellaswag": load_hellaswag, "wikitext2": partial(load_corpus, name)}.get(
        name, partial(load_task, name)
    )
    load(write_items(tmp_path / "good.jsonl", [good[name]]))
    wrong = [[], "text", 7, None, [good[name]], {"query": "a", "choices": ["a", "b"], "gold": 1}, {}]
    for key in good[name].keys() - {"split", "source_id", "ind"}:
        for value in WRONG:
            wrong.append(good[name] | {key: value})
        wrong.append({other: value for other, value in good[name].items() if other != key})
    for record in wrong:
        (tmp_path / "bad.jsonl").write_text(json.dumps(good[name]) + "\r\n" + json.dumps(record) + "\r\n")
        with pytest.raises(ValueError, match=r"bad\.jsonl:2: not a record of this task") as error:
            load(tmp_path / "bad.jsonl")
        assert all(key in str(error.value) for key in good[name].keys() - {"split", "source_id"}), error.value
        assert len(str(error.value)) < 600
    write_items(tmp_path / "foundry.jsonl", [{"query": "a", "choices": ["a", "b"], "gold": 1}])
    with pytest.raises(ValueError, match=r"\(here: query, choices, gold\)"):
        load(tmp_path / "foundry.jsonl")


def test_a_byte_order_mark_is_no_text_and_a_git_lfs_pointer_no_file(tmp_path):
    """continue #11876: files of Windows editors; transformers #27923: git-lfs pointers in a file's place."""
    file = tmp_path / "lambada.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a b"}).encode() + b"\r\n")
    assert load_task("lambada", file).questions[0].rows == [("a", " b")]
    for name in ("pointer.jsonl", "pointer.parquet", "pointer.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        for load in (partial(load_task, "piqa"), partial(load_corpus, "ptb"), load_hellaswag):
            with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer .*git lfs pull"):
                load(tmp_path / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with HubServer() as server:
        use(server, monkeypatch)
        yield server


def test_a_file_of_the_hub_is_fetched_once(hub, tmp_path):
    record = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B", "id": "1"}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "test.parquet")
    configs = [{"config_name": "ARC-Easy", "data_files": [{"split": "test", "path": "ARC-Easy/test-*"}]}]
    hub.add("allenai/ai2_arc", {
        "README.md": f"---\n{yaml.dump({'configs': configs})}---\n".encode(),
        "ARC-Easy/test-00000-of-00001.parquet": tmp_path / "test.parquet",
    })  # fmt: skip
    loaded = load_task("arc-easy")
    assert loaded.questions[0].rows == [("Question: q\nAnswer:", " a"), ("Question: q\nAnswer:", " b")]
    assert loaded.questions[0].label == 1
    assert loaded.sha256 == hashlib.sha256((tmp_path / "test.parquet").read_bytes()).hexdigest()
    sent = hub.sent("test-00000")
    assert load_task("arc-easy").sha256 == loaded.sha256
    assert hub.sent("test-00000") == sent


def test_a_file_of_the_web_is_checked_and_fetched_once(hub, monkeypatch):
    content = json.dumps({"text": "a b"}).encode() + b"\n"
    hub.pages["lambada.jsonl"] = content
    digest = hashlib.sha256(content).hexdigest()
    file = Published(f"{hub.url}/lambada.jsonl", digest)
    assert find_file(file)[1] == digest
    asked = len(hub.requests)
    path, _ = find_file(file)
    assert len(hub.requests) == asked
    path.write_bytes(content[:-1] + b" ")  # damaged on the disk
    assert find_file(file)[0].read_bytes() == content
    with pytest.raises(OSError, match=r"SHA-256 is .*\. Or download http.*jsonl yourself and give it as --data$"):
        find_file(Published(f"{hub.url}/lambada.jsonl", "0" * 64))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"[^.;]\. Or download hf:baber/piqa::validation yourself"):
        load_task("piqa")


def run(*words):
    return CliRunner().invoke(cli.main, ["task", *map(str, words)])


def test_the_command_on_items(model_folder, tmp_path):
    file = write_items(tmp_path / "lambada.jsonl", [{"text": text} for text in PASSAGES])
    out = tmp_path / "out.jsonl"
    done = run("lambada", "-m", model_folder, "--data", file, "--out", out)
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:4]] == [
        ["lm-eval", metric] for metric in ("acc", "acc_last_token", "perplexity")
    ]
    assert "Not the published file (SHA-256" in done.stdout
    assert len(out.read_text().splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir() if "rows" in path.name] == []
    ours = json.loads(run("lambada", "-m", model_folder, "--data", file, "--json").stdout)
    theirs = json.loads(run("lambada", "--hf", model_folder, "--data", file, "--json").stdout)
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert (theirs["acc"], theirs["published_file"]) == (ours["acc"], False)
    partial = run("lambada", "-m", model_folder, "--data", file, "--limit", 2)
    assert "PARTIAL: the first 2 of 3 items" in partial.stdout


def test_the_command_on_a_text_says_that_it_is_another(model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text(" ".join(PASSAGES))
    words = ("wikitext2", "-m", model_folder, "--data", tmp_path / "mine.txt", "--stride", 64)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "bits per byte" in done.stdout
    assert "Not the published file (SHA-256" in done.stdout
    assert json.loads(run(*words, "--json").stdout)["published_file"] is False


def test_names_and_figures_of_the_tables():
    assert (*TASKS, *CORPORA) == cli.TASK_NAMES
    figures = [_figure(value, ".3f") for value in (1.5, 999_999, 1_553_000, 2e9, 1e24, math.nan)]
    assert figures == ["1.500", "999999.000", "1.55M", "2.00B", "1e+24", "n/a"]
