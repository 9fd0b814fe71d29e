"""Models from the hub: huggingface_hub as it is, against a server on this machine that stands in for the hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_server import FIRST, SECOND, Drop, HubServer, use
from huggingface_hub import constants

from gpt2_model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)


@pytest.fixture
def hub():
    with HubServer() as server:
        server.moved["gpt2"] = "openai-community/gpt2"
        yield server


def downloads(hub: HubServer) -> list[str]:
    """The names of the files that were fetched, in order."""
    paths = [request.path.partition("?")[0] for request in hub.requests if request.method == "GET"]
    return [path.rpartition("/")[2] for path in paths]


@pytest.fixture
def here(hub, tmp_path, monkeypatch) -> Path:
    """This process uses `hub`, and an empty cache. What was cut is kept in whole chunks, else of 10 MB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    use(hub, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


def folder_of(model: GPT, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def files(model, tmp_path) -> dict[str, bytes]:
    return folder_of(model, tmp_path / "m")


def as_bin(files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    torch.save(safetensors.torch.load(files["model.safetensors"]), tmp_path / "weights")
    return {"config.json": files["config.json"], "pytorch_model.bin": (tmp_path / "weights").read_bytes()}


def info(name: str, hub: HubServer, **environment: str) -> subprocess.CompletedProcess[str]:
    """`gpt2-model info` in a process of its own, whose environment huggingface_hub reads."""
    program = "import sys; from gpt2_model.cli import main; sys.argv[0] = 'gpt2-model'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "info", name, "--json"],
        capture_output=True, text=True, timeout=120, env=hub.environment | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_home_cache_and_offline_mode(hub, files, tmp_path) -> None:
    """Downloaded under HF_HOME, a moved name like "gpt2" too; offline then without any request."""
    hub.add("openai-community/gpt2", files)
    home = tmp_path / "home"
    first = info("gpt2", hub, HF_HOME=str(home))
    assert json.loads(first.stdout)["n_embd"] == 32, first.stderr
    assert first.stderr == ""
    assert sorted(downloads(hub)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert (home / "hub" / "models--gpt2" / "snapshots" / FIRST / "model.safetensors").exists()

    hub.requests.clear()
    offline = info("gpt2", hub, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert hub.requests == []

    empty = info("gpt2-medium", hub, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    reason = "is not a local model folder, is not in Hugging Face's cache, and the hub cannot be reached"
    assert (empty.returncode, empty.stderr) == (1, f"Error: gpt2-medium {reason}\n")
    assert hub.requests == []


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, here, model, files) -> None:
    hub.add("a/b", files)
    hub.faults = [Drop(path="model.safetensors", at=20_000)]
    assert torch.equal(GPT.from_pretrained("a/b").wte.weight, model.wte.weight)
    assert [request.range for request in hub.asked("model.safetensors", store=True)] == [None, "bytes=20000-"]


def test_safetensors_are_preferred_and_a_bin_is_taken(hub, here, model, files, tmp_path, monkeypatch) -> None:
    hub.add("both/here", files | as_bin(files, tmp_path))
    hub.add("bin/alone", as_bin(files, tmp_path))
    for _ in range(2):  # the second time, from the cache
        assert torch.equal(GPT.from_pretrained("both/here").wte.weight, model.wte.weight)
        assert downloads(hub) == ["config.json", "generation_config.json", "model.safetensors"]
    assert torch.equal(GPT.from_pretrained("bin/alone").wte.weight, model.wte.weight)
    assert downloads(hub)[-1] == "pytorch_model.bin"
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(GPT.from_pretrained("bin/alone").wte.weight, model.wte.weight)
    assert hub.requests == []


def test_shards_are_downloaded_as_the_index_says(hub, here, model, files) -> None:
    tensors = safetensors.torch.load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    index = {"weight_map": {name: part for part, part_names in parts.items() for name in part_names}}
    shards = {part: safetensors.torch.save({n: tensors[n] for n in inside}) for part, inside in parts.items()}
    shards["config.json"] = files["config.json"]
    hub.add("in/shards", shards | {"model.safetensors.index.json": json.dumps(index).encode()})
    assert torch.equal(GPT.from_pretrained("in/shards").wte.weight, model.wte.weight)
    index["weight_map"][names[0]] = "../../../evil.safetensors"
    hub.add("in/evil", shards | {"model.safetensors.index.json": json.dumps(index).encode()})
    hub.requests.clear()
    with pytest.raises(ValueError, match="which is not a .safetensors file beside it"):
        GPT.from_pretrained("in/evil")
    assert hub.asked("evil.safetensors") == []


def test_a_revision(hub, here, model, tmp_path) -> None:
    torch.manual_seed(1)
    other = GPT(SMALL)
    hub.add("a/b", folder_of(other, tmp_path / "old"), FIRST)
    hub.add("a/b", folder_of(model, tmp_path / "new"), SECOND)
    assert torch.equal(GPT.from_pretrained("a/b").wte.weight, model.wte.weight)
    assert torch.equal(GPT.from_pretrained(f"a/b@{FIRST}").wte.weight, other.wte.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "is neither a local model folder nor a model on the hub .*HF_TOKEN"),
        ("gated/model", "is gated: ask for access on its page on the hub, then run `hf auth login`"),
        ("a/b@v2", "is not a revision of this model on the hub"),
        ("no/weights", "on the hub lacks config.json or weights"),
        ("no/config", "on the hub lacks config.json or weights"),
        ("a b", "is neither a local model folder nor a model on the hub"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, here, files, name, message, capfd) -> None:
    hub.add("a/b", files)
    hub.add("no/weights", {"config.json": files["config.json"]})
    hub.add("no/config", {})
    hub.gated.add("gated/model")
    with pytest.raises(FileNotFoundError, match=f"{name} {message}") as caught:
        GPT.from_pretrained(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_not_there(hub, here, monkeypatch) -> None:
    hub.url = "http://127.0.0.1:9"  # nothing listens on the port of "discard"
    use(hub, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    with pytest.raises(FileNotFoundError, match="not in Hugging Face's cache, and the hub cannot be reached"):
        GPT.from_pretrained("a/b")


def test_a_download_that_never_ends(hub, here, model, files, monkeypatch) -> None:
    """After five chunks, every try is cut before another is whole; nothing half is left under the file's name."""
    hub.add("a/b", files)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    hub.faults = [Drop(at=5500), Drop(at=900, times=1000)]
    with pytest.raises(OSError, match=r"of a/b failed again and again \(.*\): try later") as caught:
        GPT.from_pretrained("a/b")
    assert "\n" not in str(caught.value)
    assert "bytes=5000-" in [request.range for request in hub.asked("model.safetensors")]
    hub.faults.clear()
    assert torch.equal(GPT.from_pretrained("a/b").wte.weight, model.wte.weight)
