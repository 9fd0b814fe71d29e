"""Models from the hub: huggingface_hub as it is, against a server on this machine that stands in for the hub."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from gpt2_model import GPT, GPTConfig

COMMIT, OLDER = "a" * 40, "b" * 40
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)


class Hub(ThreadingHTTPServer):
    """Files under /owner/model/resolve/revision/name, as the hub serves them; `requests` tells what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # "owner/model" or "owner/model@commit" -> name -> content
        self.gated: set[str] = set()
        self.moved = {"gpt2": "openai-community/gpt2"}
        self.cuts: list[int | None] = []  # where the next downloads break off
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.rpartition("/")[2] for path in paths]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = COMMIT if revision == "main" else revision
        content = hub.files.get(f"{repository}@{commit}", hub.files.get(repository, {})).get(name)
        if repository in hub.moved:
            self.reply(307, {"Location": f"/{hub.moved[repository]}/resolve/{rest}"})
        elif repository in hub.gated:
            self.reply(403, {"X-Error-Code": "GatedRepo"})
        elif repository not in hub.files:
            self.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif commit not in (COMMIT, OLDER):
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif content is None:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        else:
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            cut = hub.cuts.pop(0) if hub.cuts and self.command == "GET" else None
            self.reply(206 if first else 200, headers, content[first:], cut and cut - first)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def use(url: str, monkeypatch) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def here(hub, tmp_path, monkeypatch) -> Path:
    """This process uses `hub`, and an empty cache. What was cut is kept in whole chunks, else of 10 MB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    use(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


def folder_of(model: GPT, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_bin(files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    torch.save(safetensors.torch.load(files["model.safetensors"]), tmp_path / "weights")
    return {"config.json": files["config.json"], "pytorch_model.bin": (tmp_path / "weights").read_bytes()}


def info(name: str, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    """`gpt2-model info` in a process of its own, whose environment huggingface_hub reads."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    program = "import sys; from gpt2_model.cli import main; sys.argv[0] = 'gpt2-model'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "info", name, "--json"],
        capture_output=True, text=True, timeout=120, env=inherited | {"HF_ENDPOINT": hub.url} | environment,
    )  # fmt: skip


def test_home_cache_and_offline_mode(hub, model, tmp_path) -> None:
    """Downloaded under HF_HOME, a moved name like "gpt2" too; offline then without any request."""
    hub.files["openai-community/gpt2"] = folder_of(model, tmp_path / "m")
    home = tmp_path / "home"
    first = info("gpt2", hub, HF_HOME=str(home))
    assert json.loads(first.stdout)["n_embd"] == 32, first.stderr
    assert first.stderr == ""
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]
    assert (home / "hub" / "models--gpt2" / "snapshots" / COMMIT / "model.safetensors").exists()

    hub.requests.clear()
    offline = info("gpt2", hub, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert hub.requests == []

    empty = info("gpt2-medium", hub, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    reason = "is not a local model folder, is not in Hugging Face's cache, and the hub cannot be reached"
    assert (empty.returncode, empty.stderr) == (1, f"Error: gpt2-medium {reason}\n")
    assert hub.requests == []


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, here, model, tmp_path) -> None:
    hub.files["a/b"] = folder_of(model, tmp_path / "m")
    hub.cuts = [None, 20_000]  # config.json arrives whole
    loaded = GPT.from_pretrained("a/b")
    assert torch.equal(loaded.wte.weight, model.wte.weight)
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and "model.safetensors" in path]
    assert ranges == [None, "bytes=20000-"]


def test_safetensors_are_preferred_and_a_bin_is_taken(hub, here, model, tmp_path, monkeypatch) -> None:
    files = folder_of(model, tmp_path / "m")
    hub.files["both/here"] = files | as_bin(files, tmp_path)
    hub.files["bin/alone"] = as_bin(files, tmp_path)
    for _ in range(2):  # the second time, from the cache
        assert torch.equal(GPT.from_pretrained("both/here").wte.weight, model.wte.weight)
        assert hub.downloads() == ["config.json", "model.safetensors"]
    assert torch.equal(GPT.from_pretrained("bin/alone").wte.weight, model.wte.weight)
    assert hub.downloads()[-1] == "pytorch_model.bin"
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(GPT.from_pretrained("bin/alone").wte.weight, model.wte.weight)
    assert hub.requests == []


def test_shards_are_downloaded_as_the_index_says(hub, here, model, tmp_path) -> None:
    files = folder_of(model, tmp_path / "m")
    tensors = safetensors.torch.load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    index = {"weight_map": {name: part for part, part_names in parts.items() for name in part_names}}
    hub.files["in/shards"] = {
        "config.json": files["config.json"],
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{part: safetensors.torch.save({n: tensors[n] for n in inside}) for part, inside in parts.items()},
    }
    assert torch.equal(GPT.from_pretrained("in/shards").wte.weight, model.wte.weight)
    index["weight_map"][names[0]] = "../../../evil.safetensors"
    hub.files["in/evil"] = hub.files["in/shards"] | {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.requests.clear()
    with pytest.raises(ValueError, match="which is not a .safetensors file beside it"):
        GPT.from_pretrained("in/evil")
    assert not any("evil.safetensors" in path for _, path, _ in hub.requests)


def test_a_revision(hub, here, model, tmp_path) -> None:
    torch.manual_seed(1)
    other = GPT(SMALL)
    hub.files["a/b"] = folder_of(model, tmp_path / "new")
    hub.files[f"a/b@{OLDER}"] = folder_of(other, tmp_path / "old")
    assert torch.equal(GPT.from_pretrained("a/b").wte.weight, model.wte.weight)
    assert torch.equal(GPT.from_pretrained(f"a/b@{OLDER}").wte.weight, other.wte.weight)


MISSING = {
    "unknown": ("no/such", "no/such is neither a local model folder nor a model on the hub .*HF_TOKEN"),
    "gated": ("gated/model", "gated/model is gated: ask for access on its page on the hub, then `hf auth login`"),
    "revision": ("a/b@v2", "a/b@v2 is not a revision of this model on the hub"),
    "no_weights": ("no/weights", "no/weights on the hub lacks config.json or weights"),
    "no_config": ("no/config", "no/config on the hub lacks config.json or weights"),
    "no_name": ("a b", "a b is neither a local model folder nor a model on the hub"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "message"), MISSING.values(), ids=MISSING.keys())
def test_what_the_hub_does_not_give_is_one_line(hub, here, model, tmp_path, name, message, capfd) -> None:
    files = folder_of(model, tmp_path / "m")
    hub.files |= {"a/b": files, "no/weights": {"config.json": files["config.json"]}, "no/config": {}}
    hub.gated.add("gated/model")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        GPT.from_pretrained(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_is_not_there(here, monkeypatch) -> None:
    use("http://127.0.0.1:9", monkeypatch)  # nothing listens on the port of "discard"
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    with pytest.raises(FileNotFoundError, match="not in Hugging Face's cache, and the hub cannot be reached"):
        GPT.from_pretrained("a/b")


def test_a_download_that_never_ends(hub, here, model, tmp_path, monkeypatch) -> None:
    """After five chunks, every try is cut before another is whole; nothing half is left under the file's name."""
    hub.files["a/b"] = folder_of(model, tmp_path / "m")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    hub.cuts = [None, 5500] + [5900] * 1000
    with pytest.raises(
        OSError, match=r"the download of a/b broke off again and again \(.*\): try later"
    ) as caught:
        GPT.from_pretrained("a/b")
    assert "\n" not in str(caught.value)
    assert ("GET", f"/a/b/resolve/{COMMIT}/model.safetensors", "bytes=5000-") in hub.requests
    hub.cuts.clear()
    assert torch.equal(GPT.from_pretrained("a/b").wte.weight, model.wte.weight)
