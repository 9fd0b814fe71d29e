"""Zero-shot tasks beside HellaSwag. Each is a small function from a record to a question; one engine scores all.

Prompts, metrics and files are those of lm-evaluation-harness 0.4.13 (lm_eval/tasks), whose numbers they equal.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from gpt2_eval.models import LanguageModel, encoder_of, joint
from gpt2_eval.progress import speaking
from gpt2_eval.published import Fields, Published, find_file, read_items, short_hash
from gpt2_eval.report import Estimate, TaskResult, columns_of, perplexity_of
from gpt2_eval.scoring import ScoringOptions, count_truncated, score_items


@dataclass(frozen=True)
class Question:
    """An item of a task, as text."""

    rows: list[tuple[str, str]]  # context and continuation of each choice; one row if there is no choice
    label: int  # index of the right choice
    choices: list[str]  # the texts by whose length acc_norm divides; empty if there is no acc_norm


def _piqa(record: dict[str, Any]) -> Question:
    context = f"Question: {record['goal']}\nAnswer:"
    return _choose(context, [record["sol1"], record["sol2"]], int(record["label"]))


def _arc(record: dict[str, Any]) -> Question:
    return _one_of(f"Question: {record['question']}\nAnswer:", record)


def _openbookqa(record: dict[str, Any]) -> Question:
    return _one_of(record["question_stem"], record)


def _one_of(context: str, record: dict[str, Any]) -> Question:
    texts, labels = record["choices"]["text"], record["choices"]["label"]
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices.text and {len(labels)} choices.label")
    return _choose(context, texts, labels.index(record["answerKey"].lstrip()))


def _copa(record: dict[str, Any]) -> Question:
    """A word replaces the premise's full stop. Two blanks precede a choice, as in the harness."""
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    choices = [" " + text[0].lower() + text[1:] for text in (record["choice1"], record["choice2"])]
    return _choose(f"{record['premise'].strip()[:-1]} {word}", choices, int(record["label"]), by_length=False)


def _boolq(record: dict[str, Any]) -> Question:
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _choose(context, ["no", "yes"], int(record["label"]), by_length=False)


def _winogrande(record: dict[str, Any]) -> Question:
    """The contexts differ in the name that fills the blank; what follows it is scored (Trinh and Le 2018)."""
    before, blank, after = record["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no _")
    label = {"1": 0, "2": 1}[record["answer"]]
    rows = [(before + record[name], f" {after.strip()}") for name in ("option1", "option2")]
    return Question(rows, label, [])


def _lambada(record: dict[str, Any]) -> Question:
    """The last word, given all before it."""
    context, _, word = record["text"].rpartition(" ")
    return Question([(context, f" {word}")], 0, [])


def _choose(context: str, choices: Sequence[str], label: int, *, by_length: bool = True) -> Question:
    return Question([(context, f" {choice}") for choice in choices], label, list(choices) if by_length else [])


@dataclass(frozen=True)
class Task:
    """How a task asks, and where its file is published."""

    question: Callable[[dict[str, Any]], Question]  # may raise any error if the record is not of this task
    file: Published
    # The model's size -> our nearest metric -> the figure in Table 3 of the paper (Radford et al. 2019).
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


ONE_OF: Fields = {"choices.text": list, "choices.label": list, "answerKey": str}
FIELDS: Mapping[str, Fields] = {
    "lambada": {"text": str},
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "arc-easy": {"question": str, **ONE_OF},
    "arc-challenge": {"question": str, **ONE_OF},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "openbookqa": {"question_stem": str, **ONE_OF},
    "copa": {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int},
    "boolq": {"passage": str, "question": str, "label": int},
}
LAMBADA = Published(
    "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    5153,
)
TASKS = {
    "lambada": Task(_lambada, LAMBADA, {
        "124M": {"perplexity": 35.13, "acc_last_token": 0.4599},
        "350M": {"perplexity": 15.60, "acc_last_token": 0.5548},
        "774M": {"perplexity": 10.87, "acc_last_token": 0.6012},
        "1558M": {"perplexity": 8.63, "acc_last_token": 0.6324},
    }),
    "piqa": Task(_piqa, Published("hf:baber/piqa::validation", items=1838)),
    "arc-easy": Task(_arc, Published("hf:allenai/ai2_arc:ARC-Easy:test", items=2376)),
    "arc-challenge": Task(_arc, Published("hf:allenai/ai2_arc:ARC-Challenge:test", items=1172)),
    "winogrande": Task(_winogrande, Published("hf:allenai/winogrande:winogrande_xl:validation", items=1267)),
    "openbookqa": Task(_openbookqa, Published("hf:allenai/openbookqa:main:test", items=500)),
    "copa": Task(_copa, Published("hf:aps/super_glue:copa:validation", items=100)),
    "boolq": Task(_boolq, Published("hf:aps/super_glue:boolq:validation", items=3270)),
}  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """The questions of a file; `total` and `sha256` are of the whole file."""

    task: str
    questions: list[Question]
    total: int
    sha256: str
    doubt: str = ""  # why it is not the published file


def load_task(name: str, path: str | Path | None = None, *, limit: int | None = None) -> Questions:
    """Read and check a task's file, or its first `limit` records; without a path, the published file.

    Raises:
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: records are not of this task.
    """
    task = TASKS[name]
    file, sha256 = find_file(task.file, path)

    def parse(record: dict[str, Any]) -> Question:
        question = task.question(record)
        if not 0 <= question.label < len(question.rows):
            raise ValueError(f"label {question.label} is not one of the {len(question.rows)} choices")
        if not all(continuation.strip() for _, continuation in question.rows):
            raise ValueError("a continuation is empty")
        return question

    questions, total = read_items(file, parse, limit, FIELDS[name])
    return Questions(name, questions, total, sha256, task.file.doubt(sha256, total, path is not None))


def evaluate_task(model: LanguageModel, data: Questions, **options: Unpack[ScoringOptions]) -> TaskResult:
    """Score a task's questions; options and errors are those of `score_items`.

    A choice is measured by acc (highest sum of log-probabilities) and, where the choices' lengths may differ,
    acc_norm (highest sum per character) and acc_bytes; a single continuation by acc (all its tokens are the
    likeliest), acc_last_token (its last one is), and perplexity per continuation.
    """
    start = time.perf_counter()
    encoder = encoder_of(model)
    with speaking(f"tokenizing {data.task}") if options.get("progress") else nullcontext():
        items = [[joint(encoder, *row) for row in question.rows] for question in data.questions]
    scored = score_items(model, items, **options)
    records = []
    for number, (question, rows) in enumerate(zip(data.questions, scored, strict=True)):
        hash, sums = short_hash(data.task, question.rows), [row.logprob for row in rows]
        record = dict[str, Any](item=number, label=question.label, hash=hash, sum=sums)
        if len(rows) == 1:
            record |= {"greedy": rows[0].greedy, "last_greedy": rows[0].last_greedy}
        if question.choices:
            record["chars"] = [len(choice) for choice in question.choices]
            record["bytes"] = [len(choice.encode()) for choice in question.choices]
        records.append(record)
    metrics = {name: column.estimate() for name, column in columns_of(records).items()}
    if nats := metrics.pop("nats", None):
        perplexity = perplexity_of(nats.value)
        # To first order, its error is that of the mean times the perplexity (the delta method).
        metrics["perplexity"] = Estimate(perplexity, perplexity * nats.stderr)
    return TaskResult(
        task=data.task,
        items=len(items),
        total=data.total,
        data_sha256=data.sha256,
        doubt=data.doubt,
        metrics={"lm-eval": metrics},
        truncated={"lm-eval": count_truncated(items, model.config.block_size)},
        seconds=time.perf_counter() - start,
        records=records,
    )
