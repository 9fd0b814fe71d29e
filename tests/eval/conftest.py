"""A small random GPT-2 with the real vocabulary, HellaSwag items of our own, and a dataset of a few shards."""

import json
import os
import sys

import pytest
import torch
from hellaswag_items import make_items, write_items

from gpt2_data import BuildConfig, build, open_dataset
from gpt2_model import GPT, GPTConfig


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

    def hidden(self, tokens):
        return torch.zeros(*tokens.shape, 1)

    head_weight = torch.zeros(config.vocab_size, 1)


@pytest.fixture
def uniform():
    return Uniform()


@pytest.fixture(scope="session")
def environment():
    """Of a real process: modules are found as this one finds them, and one thread, as torchrun sets it."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
