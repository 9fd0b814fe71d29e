"""lm-evaluation-harness itself, offline, on the same random weights and the same items: the same numbers.

The harness runs once, on all tasks, through transformers; and once more with our model in it, by the bridge.
"""

import os
from pathlib import Path

import pytest
from hellaswag_items import make_items, write_items

from gpt2_eval import evaluate_hellaswag
from gpt2_eval.corpora import evaluate_corpus, load_corpus, split_pages
from gpt2_eval.tasks import evaluate_task, load_task
from gpt2_model import GPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the harness' own, and those of what it imports
]

RECORDS = {
    "lambada": [
        {"text": "He said that it was cold and that he would rather stay at home by the fire with his dog"},
        {"text": "She had never seen a counterrevolutionary"},
        {"text": "“Why?” asked the naïve boy, and the café owner said: ask your mother, Émile"},
    ],
    "piqa": [
        {"goal": "How do I ready a cage?", "sol1": "Provide bedding.", "sol2": "Provide water.", "label": 0},
        {"goal": "dry wet hair ", "sol1": " with a towel", "sol2": "naïvely, with 豆腐", "label": 1},
    ],
    "copa": [
        {"premise": "He fell. ", "choice1": "He slid.", "choice2": "It rained.", "question": "cause", "label": 0},
        {"premise": "It rained.", "choice1": "She ran.", "choice2": "They ate.", "question": "effect", "label": 1},
    ],
    "boolq": [
        {"passage": "Cats are animals. " * 9, "question": "are cats animals", "label": 1},
        {"passage": "Iron is a metal.", "question": "is iron a gas", "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann asked Mia, but _ did not answer.", "option1": "Ann", "option2": "Mia", "answer": "2"},
        {"sentence": "It does not fit since the _ is big", "option1": "cup", "option2": "box", "answer": "1"},
    ],
    "arc_easy": [
        {"question": "Which is a gas?", "answerKey": "B",
         "choices": {"text": ["iron", "air", "wood"], "label": ["A", "B", "C"]}},
        {"question": "2 + 2?", "answerKey": "4",
         "choices": {"text": ["1", "two", "3", "4", "five"], "label": list("12345")}},
    ],
    "openbookqa": [
        {"question_stem": "The sun is", "answerKey": " A",
         "choices": {"text": ["a star", "wet", "a dog", "old"], "label": list("ABCD")}},
        {"question_stem": "Frogs", "answerKey": "B",
         "choices": {"text": ["fly", "jump", "sing well", "read"], "label": list("ABCD")}},
    ],
}  # fmt: skip
FILES = {
    "hellaswag": "hellaswag/hellaswag", "lambada": "lambada/lambada_openai", "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy", "openbookqa": "openbookqa/openbookqa", "copa": "super_glue/copa/default",
    "boolq": "super_glue/boolq/default", "winogrande": "winogrande/default", "wikitext": "wikitext/wikitext",
}  # fmt: skip
WIKITEXT = "\n".join(
    [
        " ", " = Robert <unk> = ", " ",
        " Robert was an actor ( born 1 @,@ 970 ) . He 's well @-@ known : \" a star \" ; 3 @.@ 5 ° N of London .",
        " ", " = = Career = = ", " ", " In 2000 he played ' the man ' [ sic ] .", " ",
        " = Homarus gammarus = ", " ", " The lobster { common } is a species' own . What ? Yes !",
        " It is large and it is blue and it lives in the sea near the coast of Norway ." * 9,
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    pages = [{"page": page} for page in split_pages(WIKITEXT)]
    for name, records in (RECORDS | {"hellaswag": make_items(15), "wikitext": pages}).items():
        write_items(folder / f"{name}.jsonl", records)
    (folder / "wiki.test.raw").write_text(WIKITEXT)
    return folder


@pytest.fixture(scope="module")
def harness(files, tmp_path_factory):
    """A model of the harness' -> its results of all tasks."""
    # Its bootstrap forks processes, one of which slept for ever on a lock that a thread of ours had held.
    os.environ["DISABLE_MULTIPROC"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    nothing_listed = TaskManager(include_defaults=False)  # to list its thousands of tasks takes it ten seconds

    def run(model, names=("hellaswag", *RECORDS, "wikitext")):
        tasks = [
            {
                **load_yaml(folder / f"{FILES[name]}.yaml"),
                "dataset_path": "json", "dataset_name": None,
                "training_split": None, "validation_split": None, "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(files / f"{name}.jsonl")}},
            }
            for name in names
        ]  # fmt: skip
        ran = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=nothing_listed, bootstrap_iters=2)
        keys = {name: task["task"] for name, task in zip(names, tasks, strict=True)}
        return {name: (ran["results"][key], ran["samples"][key]) for name, key in keys.items()}

    return run


@pytest.fixture(scope="module")
def model(tiny_hf_folder):
    return GPT.from_pretrained(tiny_hf_folder)


@pytest.fixture(scope="module")
def theirs(harness, model, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)  # with GPT-2's tokenizer as transformers reads it
    return harness(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3))


def ordered(samples):
    return sorted(samples, key=lambda sample: sample["doc_id"])


def responses(samples):
    """Log-likelihoods of the choices of each item, in the file's order."""
    return [[response[0][0] for response in sample["resps"]] for sample in ordered(samples)]


def test_hellaswag(model, files, theirs):
    figures, samples = theirs["hellaswag"]
    result = evaluate_hellaswag(model, files / "hellaswag.jsonl", protocol="lm-eval")
    for record, expected, sample in zip(result.records, responses(samples), ordered(samples), strict=True):
        sums, choices = record["lm-eval"]["sum"], sample["doc"]["choices"]
        assert sums == pytest.approx(expected, abs=1e-3)
        by_char = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        by_byte = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
        assert record["lm-eval"]["char"] == pytest.approx(by_char)
        assert record["lm-eval"]["byte"] == pytest.approx(by_byte)
    metrics = result.metrics["lm-eval"]
    assert metrics["acc"].value == figures["acc,none"]
    assert metrics["acc_norm"].value == figures["acc_norm,none"]
    assert metrics["acc_norm"].stderr == pytest.approx(figures["acc_norm_stderr,none"])


@pytest.mark.parametrize("name", RECORDS)
def test_task(model, files, theirs, name):
    figures, samples = theirs[name]
    result = evaluate_task(model, load_task(name.replace("_", "-"), files / f"{name}.jsonl"))
    for record, expected in zip(result.records, responses(samples), strict=True):
        assert record["sum"] == pytest.approx(expected, abs=1e-3)
    metrics = result.metrics["lm-eval"]
    for metric in ("acc", "acc_norm", "perplexity"):
        if f"{metric},none" in figures:
            assert metrics[metric].value == pytest.approx(figures[f"{metric},none"], rel=1e-4)
    assert ("acc_norm,none" in figures) == ("acc_norm" in metrics)


def test_wikitext(model, files, theirs):
    figures, _ = theirs["wikitext"]
    ours = evaluate_corpus(model, load_corpus("wikitext2", files / "wiki.test.raw")).perplexities["lm-eval"]
    assert ours.word == pytest.approx(figures["word_perplexity,none"], rel=1e-4)
    assert ours.byte == pytest.approx(figures["byte_perplexity,none"], rel=1e-4)
    assert ours.bits_per_byte == pytest.approx(figures["bits_per_byte,none"], rel=1e-4)


def test_our_model_in_the_harness(model, harness, theirs):
    from gpt2_eval.lm_eval_bridge import GPT2LM

    ours = harness(GPT2LM(model), ("lambada", "copa", "wikitext"))
    for name, (figures, _) in ours.items():
        numbers = {metric: value for metric, value in figures.items() if isinstance(value, float)}
        assert len(numbers) >= 2
        expected = {metric: theirs[name][0][metric] for metric in numbers}
        assert numbers == pytest.approx(expected, rel=1e-3, nan_ok=True)
