"""A folder with small versions of what the pages' commands use: datasets, a model, runs, test items."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hellaswag_items import make_items, write_items

from gpt2_data import BuildConfig, build
from gpt2_eval.cli import main as gpt2_eval
from gpt2_model import GPT, GPTConfig

COMMIT = "0" * 40


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Create what no command changes: `model`, `dataset`, `hub`, and items in HellaSwag's format."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32)).save_pretrained(folder / "model")
    texts = folder / "texts"
    texts.mkdir()
    lines = [
        json.dumps({"text": f"Document {i}. " + "What a day it was. " * 150, "body": f"{i}"}) for i in range(60)
    ]
    (texts / "all.jsonl").write_text("\n".join(lines))
    with gzip.open(texts / "all.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    pq.write_table(pa.table({"text": [f"Text {number}. " * 50 for number in range(200)]}), texts / "all.parquet")
    for out, limit in (("dataset", None), ("other", 50)):
        options = {"sources": (str(texts / "all.jsonl"),), "val_tokens": 12_000, "workers": 1, "limit_docs": limit}
        build(BuildConfig(out=folder / out, **options))
    write_items(folder / "hellaswag_val.jsonl", make_items(3))
    scored = f"hellaswag -m {folder}/model --data {folder}/hellaswag_val.jsonl --out {folder}/items"
    CliRunner().invoke(gpt2_eval, scored.split(), catch_exceptions=False)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        cached = folder / "hub" / f"models--{name}"
        shutil.copytree(folder / "model", cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.fixture
def sandbox(prepared, tmp_path, monkeypatch, request):
    """Create a working directory for one page, linked to `prepared`, with the hub's models in a cache."""
    for name in ("data/fineweb-edu", "data/web", "data/books", "DATA"):
        link = tmp_path / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(prepared / ("other" if name == "data/books" else "dataset"))
    for name in ("model", "texts", "hellaswag_val.jsonl"):
        (tmp_path / name).symlink_to(prepared / name)
    (tmp_path / "random").symlink_to(prepared / "model")
    for name in ("runs/a", "runs/b", "runs/124M"):
        (tmp_path / name).mkdir(parents=True)
        row = {"step": 1, "tokens": 64, "loss": 10.8, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / name / "config.toml").write_text("[model]\nn_layer = 12\nn_embd = 768\n")
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(prepared / "items", tmp_path / name)
    if "data.md" not in request.node.name:
        (tmp_path / "data/mine").symlink_to(prepared / "dataset")
    (tmp_path / "beginning.txt").write_text("Once upon a time")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(prepared / "hub"))
    return tmp_path
