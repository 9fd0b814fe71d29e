"""A server on this machine that stands in for the hub and the store that it redirects to, with faults on order.

Two ports, as the hub and its store are two hosts: what is sent to one must not reach the other. Other processes
reach them by HF_ENDPOINT.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from huggingface_hub import constants

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


Refuse = partial(Fault, "refuse")  # answers with `status` and `headers` such as Retry-After
Drop = partial(Fault, "drop")  # closes the connection after `at` bytes of the body
Stall = partial(Fault, "stall")  # sends `at` bytes of the body, then nothing for a minute
Spoil = partial(Fault, "spoil")  # sends other bytes of the same number
Short = partial(Fault, "short")  # claims and sends a byte less: the answer itself is well-formed
NoRanges = partial(Fault, "no ranges")  # answers a request for a range with 200 and the whole file


@dataclass
class Request:
    """What was asked, and how many bytes of body were sent for it."""

    method: str
    store: bool
    path: str
    range: str | None
    headers: dict[str, str]
    sent: int = 0


class HubServer:
    """Repositories of datasets or models, and a log of what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> commit -> path -> content
        self.main: dict[str, str] = {}  # repo -> commit
        self.moved: dict[str, str] = {}  # repo -> its name now
        self.gated: set[str] = set()
        self.private: set[str] = set()  # 401 without the token "secret"
        self.pages: dict[str, bytes] = {}  # plain files under other paths, without a redirect
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.link_seconds = 3600.0  # how long a signed link is good
        self.bytes_a_second: float | None = None  # of each answer of the store
        self.chunk = 65536
        self.stopping = threading.Event()
        self._servers = [_Server(self, store) for store in (False, True)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self, repo: str, files: dict[str, bytes | Path], commit: str = FIRST, configs: list[object] | None = None
    ) -> None:
        """Put files, and a card that has these configs, into a repository's commit, which becomes `main`."""
        contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}
        if configs is not None:
            contents["README.md"] = f"---\n{json.dumps({'configs': configs})}\n---\n# A dataset".encode()
        self.repos.setdefault(repo, {}).setdefault(commit, {}).update(contents)
        self.main[repo] = commit

    def start(self, code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """A Python process that talks to this hub."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=self.environment | environment,
        )  # fmt: skip

    def asked(self, path: str = "", store: bool | None = None) -> list[Request]:
        """The requests whose path contains `path`, in order."""
        return [r for r in self.requests if path in r.path and store in (None, r.store)]

    def sent(self, path: str) -> int:
        """Bytes of the file that were sent in all."""
        return sum(request.sent for request in self.asked(path, store=True))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, store: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.store = hub, store

    def handle_error(self, *_) -> None:
        pass  # clients are killed here on purpose


_ROUTE = re.compile(r"(?:api/)?(?:datasets/)?([^/]+(?:/[^/]+)?)(?:/(revision|tree|resolve)/(.*))?")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Request(self.command, self.server.store, self.path, headers.get("range"), headers)
        if self.path != "/api/agent-harnesses":  # huggingface_hub's own, for its User-Agent
            hub.requests.append(self.asked)
        path, _, query = urllib.parse.unquote(self.path).strip("/").partition("?")
        faults = (f for f in hub.faults if f.times and f.store == self.server.store and f.path in path)
        self.fault = next(faults, Fault(""))
        self.fault.times -= 1
        if self.fault.kind == "refuse":
            self.answer(self.fault.status, **self.fault.headers)
        elif self.server.store:
            owner, repo, commit, name = path.removeprefix("cdn/").split("/", 3)
            if float(query.removeprefix("Signature=")) > time.monotonic():
                self.send_file(hub.repos[f"{owner}/{repo}"][commit][name])
            else:
                self.answer(403)
        elif path in hub.pages:
            self.send_file(hub.pages[path])
        elif (match := _ROUTE.fullmatch(path)) and (match[2] or path.startswith("api/")):
            self.answer_repo(match[1], match[2], match[3] or "main", "recursive=True" in query)
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

    def answer_repo(self, repo: str, verb: str | None, tail: str, recursive: bool) -> None:
        """REPO[/revision/REV], for `datasets` REPO/tree/REV[/FOLDER], or REPO/resolve/REV/FILE."""
        hub, (revision, _, folder) = self.hub, tail.partition("/")
        commit = hub.main.get(repo) if revision == "main" else revision
        allowed = self.headers.get("Authorization") == "Bearer secret"
        if repo in hub.moved:
            self.answer(307, Location=f"/{hub.moved[repo]}/{verb}/{tail}")
        elif repo in hub.gated and not allowed:
            self.answer(401, **{"X-Error-Code": "GatedRepo"})
        elif repo not in hub.repos or (repo in hub.private and not allowed):
            self.answer(401, **{"X-Error-Code": "RepoNotFound"})
        elif (files := hub.repos[repo].get(commit)) is None:
            self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
        elif verb == "resolve":
            self.resolve(repo, commit, folder, files)
        elif verb == "tree":
            paths = {Path(name): _entry(name, files[name]) for name in sorted(files)}
            folders = sorted({path for name in paths for path in name.parents})
            paths |= {path: {"type": "directory", "path": str(path), "size": 0, "oid": ""} for path in folders}
            base = Path(folder)
            inside = [path for path in paths if path.parent == base or (recursive and base in path.parents)]
            self.answer(200, json.dumps([paths[path] for path in inside if path != base]).encode())
        else:
            card = files.get("README.md", b"").decode().split("---\n")
            answer = {"id": repo, "sha": commit, "private": False, "tags": []}
            answer |= {"siblings": [_entry(name, files[name]) for name in sorted(files)]}
            answer |= {"cardData": yaml.safe_load(card[1]) if len(card) > 2 else None}
            self.answer(200, json.dumps(answer).encode())

    def resolve(self, repo: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        """Send large files by a signed link to the store, small ones from here."""
        if name not in files:
            self.answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif "lfs" not in _entry(name, files[name]):
            self.send_file(files[name], **{"X-Repo-Commit": commit})
        else:
            etag = f'"{_sha256(files[name])}"'
            link = f"{self.hub.store_url}/cdn/{urllib.parse.quote(f'{repo}/{commit}/{name}')}"
            headers = {"Location": f"{link}?Signature={time.monotonic() + self.hub.link_seconds}", "ETag": etag}
            headers |= {"X-Repo-Commit": commit, "X-Linked-Size": str(len(files[name])), "X-Linked-ETag": etag}
            self.answer(302, **headers)

    def send_file(self, content: bytes, **headers: str) -> None:
        """The file or a range of it, with the fault that was ordered."""
        size, etag, kind = len(content), f'"{_sha256(content)}"', self.fault.kind
        first, last, status = 0, size - 1, 200
        if self.asked.range and kind != "no ranges":
            start, _, stop = self.asked.range.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(stop or last), last), 206
            if first >= size:
                self.answer(416, **{"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        body = content[first : last + 1 - (kind == "short")]
        body = bytes(len(body)) if kind == "spoil" else body
        self.answer(status, **headers | {"Accept-Ranges": "bytes", "ETag": etag, "Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        until = min(self.fault.at, len(body)) if kind in ("drop", "stall") else len(body)
        for start in range(0, until, self.hub.chunk):
            chunk = body[start : min(start + self.hub.chunk, until)]
            self.wfile.write(chunk)
            self.asked.sent += len(chunk)
            if self.hub.bytes_a_second is not None:
                time.sleep(len(chunk) / self.hub.bytes_a_second)
        if until < len(body):
            self.hub.stopping.wait(60 if kind == "stall" else 0)
            self.close_connection = True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    """A file as the API lists it, in a tree or among a dataset's siblings; README is not in LFS."""
    entry = {"type": "file", "path": path, "rfilename": path, "size": len(content), "oid": "0" * 40}
    if not path.endswith((".md", ".json")):
        sha256 = _sha256(content)
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 135}
    return entry


def use(hub: HubServer, monkeypatch) -> None:
    """Make this process talk to `hub`; huggingface_hub has read the environment when it was imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def until(condition, process: subprocess.Popen | None = None) -> None:
    """Wait for a condition, as long as the process lives."""
    end = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
