"""Small sources, and datasets made of them."""

import json
import random
from pathlib import Path

import pytest
from hub_server import HubServer, use

from gpt2_data import BuildConfig, build
from gpt2_data.sources import download


@pytest.fixture
def texts():
    """Documents of many lengths, with all that is awkward in text."""
    rng = random.Random(7)
    code = "\n\n  def f(x):\n\treturn x"
    words = ["the", "<|endoftext|>", "naïve", "日本語", code, "🙂", "don't", "1234", "\x00", "\r\n"]
    return [" ".join(rng.choice(words) for _ in range(rng.choice([1, 3, 10, 40, 200]))) for _ in range(120)]


@pytest.fixture
def write_jsonl(tmp_path):
    """Write documents as .jsonl files, some lines a file; returns their folder."""

    def write(documents, files=1, folder="source"):
        target = tmp_path / folder
        target.mkdir()
        for i in range(files):
            lines = [json.dumps({"text": text}) + "\n" for text in documents[i::files]]
            (target / f"{i:03d}.jsonl").write_text("".join(lines), encoding="utf-8")
        return target

    return write


@pytest.fixture
def make(tmp_path, write_jsonl):
    """Build a dataset of the documents given; returns its folder."""
    count = 0

    def make(documents, **options) -> Path:
        nonlocal count
        count += 1
        source = write_jsonl(documents, folder=f"source{count}")
        out = tmp_path / f"dataset{count}"
        defaults = {"val_tokens": 0, "workers": 1, "order": "source"}
        build(BuildConfig([source / "*.jsonl"], out, **(defaults | options)))
        return out

    return make


@pytest.fixture
def files_of():
    """The bytes of a dataset's files, but for the history of who built it."""

    def files_of(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.jsonl"}

    return files_of


@pytest.fixture
def server(monkeypatch):
    """A hub that this process talks to, with short waits between tries."""
    with HubServer() as server:
        use(server, monkeypatch)
        monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
        yield server


@pytest.fixture
def folder(tmp_path):
    """Write files given as {name: bytes}; returns their folder."""

    def folder(files):
        target = tmp_path / "foreign"
        target.mkdir(exist_ok=True)
        for name, data in files.items():
            (target / name).write_bytes(data)
        return target

    return folder
