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
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

FIRST, SECOND = "1" * 40, "2" * 40  # commits


@dataclass
class Fault:
    """Happens to the next `times` requests whose path contains `path`, to the store or else to the hub."""

    path: str = ""
    times: int = 1
    store: bool = True
    method: str = "GET"


@dataclass
class Refuse(Fault):
    """Answers with a status, and headers such as Retry-After."""

    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Drop(Fault):
    """Closes the connection after `at` bytes of the body."""

    at: int = 0


@dataclass
class Stall(Fault):
    """Sends `at` bytes of the body, then nothing for `seconds`."""

    at: int = 0
    seconds: float = 60.0


@dataclass
class Spoil(Fault):
    """Sends other bytes of the same number."""


@dataclass
class Short(Fault):
    """Claims and sends `missing` bytes fewer than were asked for: the answer itself is well-formed."""

    missing: int = 1


@dataclass
class NoRanges(Fault):
    """Answers a request for a range with 200 and the whole file."""


@dataclass
class Request:
    """What was asked, and how many bytes of body were sent for it."""

    store: bool
    method: str
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
        self._hub, self._store = _Server(self, False), _Server(self, True)
        self.url, self.store_url = (f"http://127.0.0.1:{s.server_port}" for s in (self._hub, self._store))
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def __enter__(self) -> "HubServer":
        servers = (self._hub, self._store)
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True) for s in servers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server, thread in zip((self._hub, self._store), self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def add(self, repo: str, files: dict[str, bytes | Path], commit: str = FIRST) -> None:
        """Put files into a repository's commit, which becomes `main`. A Path is read from the disk when served."""
        self.repos.setdefault(repo, {}).setdefault(commit, {}).update(files)
        self.main[repo] = commit

    def asked(self, path: str = "", store: bool | None = None, method: str = "GET") -> list[Request]:
        """The requests whose path contains `path`, in order."""
        return [r for r in self.requests if path in r.path and r.method == method and store in (None, r.store)]

    def sent(self, path: str) -> int:
        """Bytes of the file that were sent in all."""
        return sum(request.sent for request in self.asked(path, store=True))

    # What follows is for the handlers.

    def fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                meant = fault.store == request.store and fault.method == request.method
                if fault.times and meant and fault.path in urllib.parse.unquote(request.path):
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
            with content.open("rb") as file:
                self._hashes[content] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[content]

    def entry(self, path: str, content: bytes | Path) -> dict[str, object]:
        """A file as the API lists it: what is in git (README and the like) has no LFS pointer."""
        size = _size(content)
        found: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": "0" * 40}
        if not path.endswith((".md", ".json")):
            found["lfs"] = {"oid": self.sha256(content), "size": size, "pointerSize": 135}
        return found

    def sibling(self, path: str, content: bytes | Path) -> dict[str, object]:
        """The same as the description of a whole dataset lists it (?blobs=True)."""
        entry = self.entry(path, content)
        lfs = (
            {"sha256": self.sha256(content), "size": entry["size"], "pointerSize": 135} if "lfs" in entry else None
        )
        return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"], "lfs": lfs}


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
        length = int(self.headers.get("Content-Length") or 0)
        self.form = urllib.parse.parse_qs(self.rfile.read(length).decode()) if length else {}
        self.asked = Request(
            self.server.store,
            self.command,
            self.path,
            self.headers.get("Range"),
            {k.lower(): v for k, v in self.headers.items()},
        )
        if self.path != "/api/agent-harnesses":  # huggingface_hub's own, for its User-Agent
            hub.requests.append(self.asked)
        self.fault = hub.fault(self.asked)
        if isinstance(self.fault, Refuse):
            self.refuse(self.fault.status, **self.fault.headers)
            return
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path).strip("/")
        if self.server.store:
            if not hub.signature_holds(query):
                self.refuse(403)
            else:
                repo, _, rest = path.removeprefix("cdn/").partition("@")
                commit, _, name = rest.partition("/")
                self.send_file(hub.repos[repo][commit][name])
        elif path in hub.pages:
            self.send_file(hub.pages[path])
        elif path.startswith("api/datasets/"):
            self.answer_api(path.removeprefix("api/datasets/"))
        elif path.startswith("datasets/") and "/resolve/" in path:
            self.resolve(path.removeprefix("datasets/"))
        else:
            self.refuse(404)

    do_HEAD = do_POST = do_GET

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit, or None after the refusal was sent."""
        hub = self.server.hub
        allowed = self.headers.get("Authorization") == "Bearer secret"
        if repo in hub.gated and not allowed:
            self.refuse(401, **{"X-Error-Code": "GatedRepo"})
        elif repo not in hub.repos or (repo in hub.private and not allowed):
            self.refuse(401, **{"X-Error-Code": "RepoNotFound"})
        else:
            commit = hub.main[repo] if revision == "main" else revision
            if commit in hub.repos[repo]:
                return commit
            self.refuse(404, **{"X-Error-Code": "RevisionNotFound"})
        return None

    def answer_api(self, rest: str) -> None:
        """REPO[/revision/REV], REPO/paths-info/REV and REPO/tree/REV[/FOLDER]."""
        hub = self.server.hub
        verb = next((v for v in ("revision", "paths-info", "tree") if f"/{v}/" in rest), None)
        repo, _, tail = rest.partition(f"/{verb}/") if verb else (rest, "", "main")
        revision, _, folder = tail.partition("/")
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        files = hub.repos[repo][commit]
        if verb == "paths-info":
            self.send_json([hub.entry(p, files[p]) if p in files else _folder(p) for p in self.form["paths"]])
        elif verb == "tree":
            self.send_json(list(self.tree(files, folder.rstrip("/"), "recursive=True" in self.path)))
        else:
            card = bytes(files.get("README.md", b"")).decode().split("---\n")
            siblings = [hub.sibling(path, files[path]) for path in sorted(files)]
            info = {"_id": "0", "id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self.send_json(info | {"cardData": yaml.safe_load(card[1]) if len(card) > 2 else None})

    def tree(self, files: dict[str, bytes | Path], folder: str, recursive: bool) -> Iterator[dict[str, object]]:
        base = f"{folder}/" if folder else ""
        seen = set()
        for path in sorted(files):
            if not path.startswith(base):
                continue
            parts = path.removeprefix(base).split("/")
            for i in range(1, len(parts)):
                above = base + "/".join(parts[:i])
                if above not in seen and (recursive or i == 1):
                    seen.add(above)
                    yield _folder(above)
            if recursive or len(parts) == 1:
                yield self.server.hub.entry(path, files[path])

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
            self.refuse(404, **{"X-Error-Code": "EntryNotFound"})
        elif "lfs" not in hub.entry(name, content):
            self.send_file(content, **{"X-Repo-Commit": commit})
        else:
            sha256 = hub.sha256(content)
            self.send_response(302)
            self.send_header("Location", hub.sign(f"{repo}@{commit}/{name}"))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Size", str(_size(content)))
            self.send_header("X-Linked-ETag", f'"{sha256}"')
            self.send_header("ETag", f'"{sha256}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_json(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, content: bytes | Path, **headers: str) -> None:
        """The file or a range of it, with the fault that was ordered."""
        fault, size = self.fault, _size(content)
        etag = f'"{self.server.hub.sha256(content)}"'
        first, last = 0, size - 1
        asked = None if isinstance(fault, NoRanges) else self.asked.range
        if asked and self.headers.get("If-Range", etag) == etag:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or last), last)
            if first >= size:
                self.refuse(416, **{"Content-Range": f"bytes */{size}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        length = last + 1 - first - (fault.missing if isinstance(fault, Short) else 0)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(content, first, length)

    def send_body(self, content: bytes | Path, first: int, length: int) -> None:
        hub, fault, sent = self.server.hub, self.fault, 0
        with _opened(content) as read:
            while sent < length:
                count = min(hub.chunk, length - sent)
                if isinstance(fault, Drop | Stall):
                    count = min(count, fault.at - sent)
                    if count <= 0:
                        if isinstance(fault, Stall):
                            hub.stopping.wait(fault.seconds)
                        self.close_connection = True
                        return
                data = read(first + sent, count)
                self.wfile.write(bytes(len(data)) if isinstance(fault, Spoil) else data)
                sent += count
                self.asked.sent = sent
                if hub.bytes_a_second is not None:
                    time.sleep(count / hub.bytes_a_second)


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


@contextmanager
def _opened(content: bytes | Path):
    """A function (first, count) -> bytes."""
    if isinstance(content, bytes):
        yield lambda first, count: content[first : first + count]
        return
    with content.open("rb") as file:

        def read(first: int, count: int) -> bytes:
            file.seek(first)
            return file.read(count)

        yield read


def use(hub: HubServer, monkeypatch) -> None:
    """Make this process talk to `hub`; huggingface_hub has read the environment when it was imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
