"""A server on this machine that stands in for the hub and the store that it redirects to, with faults on order.

    with HubServer() as hub:
        hub.add("owner/set", {"README.md": b"...", "data/train-00000.parquet": Path("a.parquet")})
        hub.faults.append(Drop(at=1000, path="train-00000"))
        subprocess.run(..., env=os.environ | hub.environment)
        assert hub.sent("train-00000") == ...

Two ports, as the hub and its store are two hosts: what is sent to one must not reach the other. Both run in
threads of this process; other processes reach them by HF_ENDPOINT.
"""

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

FIRST, SECOND = "1" * 40, "2" * 40  # commits


@dataclass
class Fault:
    """Happens to the next `times` requests whose path contains `path`, to the store or else to the hub."""

    kind: str
    path: str = ""
    times: int = 1
    store: bool = True
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    at: int = 0
    seconds: float = 60.0
    missing: int = 1


Refuse = partial(Fault, "refuse")  # answers with `status` and `headers` such as Retry-After
Drop = partial(Fault, "drop")  # closes the connection after `at` bytes of the body
Stall = partial(Fault, "stall")  # sends `at` bytes of the body, then nothing for `seconds`
Spoil = partial(Fault, "spoil")  # sends other bytes of the same number
Short = partial(Fault, "short")  # claims and sends `missing` bytes fewer: the answer itself is well-formed
NoRanges = partial(Fault, "no ranges")  # answers a request for a range with 200 and the whole file


@dataclass
class Request:
    """What was asked, and how many bytes of body were sent for it."""

    store: bool
    path: str
    range: str | None
    headers: dict[str, str]
    sent: int = 0


class HubServer:
    """Repositories of datasets, and a log of what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes | Path]]] = {}  # repo -> commit -> path -> content
        self.main: dict[str, str] = {}  # repo -> commit
        self.gated: set[str] = set()
        self.private: set[str] = set()  # 401 without the token "secret"
        self.pages: dict[str, bytes] = {}  # plain files under other paths, without a redirect
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.link_seconds = 3600.0  # how long a signed link is good
        self.bytes_a_second: float | None = None  # of each answer of the store
        self.chunk = 65536
        self.stopping = threading.Event()
        self._signed: dict[str, float] = {}
        self._hashes: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._servers = [_Server(self, False), _Server(self, True)]
        self.url, self.store_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, files: dict[str, bytes | Path], commit: str = FIRST) -> None:
        """Put files into a repository's commit, which becomes `main`. A Path is read from the disk when served."""
        self.repos.setdefault(repo, {}).setdefault(commit, {}).update(files)
        self.main[repo] = commit

    def asked(self, path: str = "", store: bool | None = None) -> list[Request]:
        """The requests whose path contains `path`, in order."""
        return [r for r in self.requests if path in r.path and store in (None, r.store)]

    def sent(self, path: str) -> int:
        """Bytes of the file that were sent in all."""
        return sum(request.sent for request in self.asked(path, store=True))

    # What follows is for the handlers.

    def fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if (
                    fault.times
                    and fault.store == request.store
                    and fault.path in urllib.parse.unquote(request.path)
                ):
                    fault.times -= 1
                    return fault
        return None

    def sign(self, path: str) -> str:
        with self._lock:
            key = f"key{len(self._signed)}"
            self._signed[key] = time.monotonic() + self.link_seconds
        return f"{self.store_url}/cdn/{urllib.parse.quote(path)}?Signature={key}"

    def signature_holds(self, query: str) -> bool:
        return self._signed.get(query.removeprefix("Signature="), 0.0) > time.monotonic()

    def sha256(self, content: bytes | Path) -> str:
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest()
        if content not in self._hashes:
            self._hashes[content] = hashlib.sha256(content.read_bytes()).hexdigest()
        return self._hashes[content]

    def entry(self, path: str, content: bytes | Path) -> dict[str, object]:
        """A file as the API lists it, in a tree or among a dataset's siblings; README is not in LFS."""
        size, sha256 = _size(content), self.sha256(content)
        entry = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": "0" * 40}
        if not path.endswith((".md", ".json")):
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 135}
        return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, store: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.store = hub, store

    def handle_error(self, *_) -> None:
        pass  # clients are killed here on purpose


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Request(self.server.store, self.path, headers.get("range"), headers)
        if self.path != "/api/agent-harnesses":  # huggingface_hub's own, for its User-Agent
            hub.requests.append(self.asked)
        self.fault = hub.fault(self.asked)
        if self.fault is not None and self.fault.kind == "refuse":
            self.answer(self.fault.status, **self.fault.headers)
            return
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path).strip("/")
        if self.server.store:
            repo, _, rest = path.removeprefix("cdn/").partition("@")
            commit, _, name = rest.partition("/")
            if hub.signature_holds(query):
                self.send_file(hub.repos[repo][commit][name])
            else:
                self.answer(403)
        elif path in hub.pages:
            self.send_file(hub.pages[path])
        elif path.startswith("api/datasets/"):
            self.answer_api(path.removeprefix("api/datasets/"))
        elif path.startswith("datasets/") and "/resolve/" in path:
            self.resolve(path.removeprefix("datasets/"))
        else:
            self.answer(404)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit, or None after the refusal was sent."""
        hub = self.server.hub
        allowed = self.headers.get("Authorization") == "Bearer secret"
        if repo in hub.gated and not allowed:
            self.answer(401, **{"X-Error-Code": "GatedRepo"})
        elif repo not in hub.repos or (repo in hub.private and not allowed):
            self.answer(401, **{"X-Error-Code": "RepoNotFound"})
        else:
            commit = hub.main[repo] if revision == "main" else revision
            if commit in hub.repos[repo]:
                return commit
            self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
        return None

    def answer_api(self, rest: str) -> None:
        """REPO[/revision/REV], and for `datasets` REPO/tree/REV[/FOLDER]."""
        hub = self.server.hub
        verb = next((v for v in ("revision", "tree") if f"/{v}/" in rest), None)
        repo, _, tail = rest.partition(f"/{verb}/") if verb else (rest, "", "main")
        revision, _, folder = tail.partition("/")
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        files = hub.repos[repo][commit]
        if verb == "tree":
            answer = list(self.tree(files, folder.rstrip("/"), "recursive=True" in self.path))
        else:
            card = bytes(files.get("README.md", b"")).decode().split("---\n")
            answer = {"_id": "0", "id": repo, "sha": commit, "private": False, "tags": []}
            answer["siblings"] = [hub.entry(path, files[path]) for path in sorted(files)]
            answer["cardData"] = yaml.safe_load(card[1]) if len(card) > 2 else None
        self.answer(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    def tree(self, files: dict[str, bytes | Path], folder: str, recursive: bool) -> Iterator[dict[str, object]]:
        base = f"{folder}/" if folder else ""
        folders = set()
        for path in sorted(path for path in files if path.startswith(base)):
            parts = path.removeprefix(base).split("/")
            folders |= {base + "/".join(parts[:i]) for i in range(1, len(parts)) if recursive or i == 1}
            if recursive or len(parts) == 1:
                yield self.server.hub.entry(path, files[path])
        yield from map(_folder, sorted(folders))

    def resolve(self, rest: str) -> None:
        """REPO/resolve/REV/PATH: large files by a signed link to the store, small ones from here."""
        hub = self.server.hub
        repo, _, tail = rest.partition("/resolve/")
        revision, _, name = tail.partition("/")
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        content = hub.repos[repo][commit].get(name)
        if content is None:
            self.answer(404, **{"X-Error-Code": "EntryNotFound"})
        elif "lfs" not in hub.entry(name, content):
            self.send_file(content, **{"X-Repo-Commit": commit})
        else:
            etag = f'"{hub.sha256(content)}"'
            headers = {"Location": hub.sign(f"{repo}@{commit}/{name}"), "X-Repo-Commit": commit, "ETag": etag}
            self.answer(302, **headers, **{"X-Linked-Size": str(_size(content)), "X-Linked-ETag": etag})

    def send_file(self, content: bytes | Path, **headers: str) -> None:
        """The file or a range of it, with the fault that was ordered."""
        size, etag = _size(content), f'"{self.server.hub.sha256(content)}"'
        first, last, status = 0, size - 1, 200
        kind = self.fault.kind if self.fault is not None else ""
        if self.asked.range and kind != "no ranges" and self.headers.get("If-Range", etag) == etag:
            start, _, stop = self.asked.range.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(stop or last), last), 206
            if first >= size:
                self.answer(416, **{"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        length = last + 1 - first - (self.fault.missing if self.fault is not None and kind == "short" else 0)
        headers |= {"Accept-Ranges": "bytes", "ETag": etag, "Content-Length": str(length)}
        self.answer(status, **headers)
        if self.command != "HEAD":
            self.send_body(content, first, length)

    def send_body(self, content: bytes | Path, first: int, length: int) -> None:
        hub, fault = self.server.hub, self.fault
        data = content if isinstance(content, bytes) else content.read_bytes()
        while self.asked.sent < length:
            count = min(hub.chunk, length - self.asked.sent)
            if fault is not None and fault.kind in ("drop", "stall"):
                count = min(count, fault.at - self.asked.sent)
                if count <= 0:
                    hub.stopping.wait(fault.seconds if fault.kind == "stall" else 0)
                    self.close_connection = True
                    return
            start = first + self.asked.sent
            spoiled = fault is not None and fault.kind == "spoil"
            self.wfile.write(bytes(count) if spoiled else data[start : start + count])
            self.asked.sent += count
            if hub.bytes_a_second is not None:
                time.sleep(count / hub.bytes_a_second)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def use(hub: HubServer, monkeypatch) -> None:
    """Make this process talk to `hub`; huggingface_hub has read the environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
