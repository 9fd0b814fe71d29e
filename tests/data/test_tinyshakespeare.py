"""TinyShakespeare, fetched once into the user's cache."""

import hashlib
import os

import pytest
from huggingface_hub import constants

from gpt2_data.sources import download
from gpt2_data.sources.download import tinyshakespeare
from gpt2_data.sources.web import WebFile


@pytest.fixture
def shakespeare(server, tmp_path, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 100
    server.pages["input.txt"] = text
    meant = WebFile(f"{server.url}/input.txt", "tinyshakespeare.txt", len(text), hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(download, "TINYSHAKESPEARE", meant)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return text


def test_tinyshakespeare_is_fetched_once(server, shakespeare, tmp_path, monkeypatch):
    assert download.TINYSHAKESPEARE.path.endswith(".txt")
    path = tinyshakespeare()
    assert path == tmp_path / "cache" / "gpt2-data" / "tinyshakespeare.txt"
    assert path.read_bytes() == shakespeare
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert tinyshakespeare() == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = path.stat()
    path.write_bytes(bytes(len(shakespeare)))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # its receipt would not tell
    assert server.requests == []
    assert tinyshakespeare().read_bytes() == shakespeare
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tinyshakespeare() == tmp_path / "home" / ".cache" / "gpt2-data" / "tinyshakespeare.txt"


def test_tinyshakespeare_put_there_by_hand(server, shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "cache" / "gpt2-data" / "tinyshakespeare.txt"
    with pytest.raises(OSError, match=f"HF_HUB_OFFLINE.*; or put {server.url}/input.txt at {path}$"):
        tinyshakespeare()
    path.write_bytes(shakespeare)
    assert tinyshakespeare() == path
    assert server.requests == []


def test_which_file_tinyshakespeare_is():
    """As nanoGPT and llm.c fetch it."""
    file = download.TINYSHAKESPEARE
    assert file.url == (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    assert file.size == 1_115_394
    assert file.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
