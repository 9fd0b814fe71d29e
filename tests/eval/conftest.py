"""A small random GPT-2 with the real vocabulary, HellaSwag items of our own, and a dataset of a few shards."""

import json
import os
import sys

import pytest
import torch

from gpt2_data import BuildConfig, build, open_dataset
from gpt2_model import GPT, GPTConfig

# Each is there for a trap: WikiHow's tags, a tag at the end, brackets that are no tag, three blanks, characters
# of several bytes, capitalising ctx_b (which also lowers the rest), U+2028 inside a string, empty texts.
TEXTS = [
    (
        "Personal Care and Style",
        "[header] How to tie a scarf [title] Fold it once. [step] Lay it flat [substeps]",
        "",
        ["[substeps] Many people fold it.", "Fold [not too tight] here.", "Throw it  away.", "[title] Eat it."],
    ),
    (
        "Removing ice from car",
        "Then, the man writes over the snow.",
        "then He Scrapes",
        [", the ice away.", "with a café spoon — naïvely.", "his dog.", "   three blanks"],
    ),
    (
        "Cooking",
        "A pot of 味噌汁 boils [next] on the stove.",
        "a woman",
        ["adds 豆腐 to it.", "adds tofu.", "leaves, humming 🎵.", "sings"],
    ),
    (
        "Playing",
        "A line\u2028separator stands here.",
        "",
        ["one", "one two", "one two three", "one two three four"],
    ),
    ("", "", "", ["Nothing came before.", "So what?", "It's fine.", "They'll see."]),
]


def make_items(count):
    items = []
    for ind in range(count):
        activity, ctx_a, ctx_b, endings = TEXTS[ind % len(TEXTS)]
        ctx_a += f" And it was take {ind}." * (ind // len(TEXTS))
        context = f"{ctx_a} {ctx_b}".strip()
        items.append(
            {"ind": 7 * ind, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": context}
            | {"endings": endings, "label": ind % 4, "split": "val", "source_id": f"own~{ind}"}
        )
    return items


def write_items(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def items():
    return make_items(17)


@pytest.fixture(scope="session")
def items_file(items, tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("hellaswag") / "items.jsonl", items)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128)).eval()
    with torch.no_grad():
        model.wte.weight.mul_(8)  # spread the logits: as initialised, every token is about as likely
    return model


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(model_folder):
    """Ids -> log p of each but the first: transformers' GPT-2, one text at a time, without any shortcut."""
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(model_folder).eval()

    def log_probs(ids):
        batch = torch.tensor([ids])
        with torch.no_grad():
            table = theirs(batch[:, :-1]).logits[0].log_softmax(-1)
        return table.gather(1, batch[0, 1:, None])[:, 0].double().numpy()

    return log_probs


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Document {i} says: café, 豆腐, and {i * i} more words. " * (1 + i % 5) for i in range(40)]
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    out = folder / "built"
    build(BuildConfig(sources=(str(source),), out=out, shard_size=300, val_tokens=1000, workers=1, order="source"))
    return out


@pytest.fixture
def dataset(dataset_folder):
    return open_dataset(dataset_folder)


class Uniform(torch.nn.Module):
    """All tokens equally likely, everywhere."""

    config = GPTConfig(n_layer=1, n_head=1, n_embd=1, block_size=128)

    def hidden(self, tokens, layout=None):
        return torch.zeros(*tokens.shape, 1)

    head_weight = torch.zeros(config.vocab_size, 1)


@pytest.fixture
def uniform():
    return Uniform()


@pytest.fixture(scope="session")
def environment():
    """Of a real process: modules are found as this one finds them, and one thread, as torchrun sets it."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
