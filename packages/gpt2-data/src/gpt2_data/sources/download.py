"""Download large files: resumed across processes, checked, and there whole or not at all.

NAME.part grows, is checked against the size and the SHA-256 that the hub lists, and becomes NAME; NAME.json is the
receipt by which a rerun knows the file without hashing it again; NAME.lock excludes other processes and machines.

The HTTP client is huggingface_hub's: proxies, certificates, redirects and HF_HUB_OFFLINE are its business. Its own
`http_get` and `http_backoff` (2.4.0) would sleep for as long as a Retry-After says, even a day.
"""

import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from gpt2_data import disk

T = TypeVar("T")
Progress = Callable[[int], object]  # is called with the bytes of the file that are on the disk
TRIES = 3  # downloads from the first byte, of a file that arrives wrong or cannot be resumed
PATIENCE = 900.0  # seconds of trying without a byte of progress; the hub's rate limits last 300 seconds
UNREACHABLE = 30.0  # the same, while a person waits, for a server that has not answered yet
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time, with jitter
READ_TIMEOUT = 30.0  # seconds without a byte, then the connection counts as lost
LOGIN = "log in by `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class WebFile:
    """A file at an address: `path` is where it belongs in a folder, `sha256` is in hex, or None if not known."""

    url: str
    path: str
    size: int
    sha256: str | None


class Wrong(OSError):
    """What the server sends is not what it should be."""


class Again(Exception):
    """A try failed, but another may succeed. `after`: seconds the server asks to wait; `reached`: it answered."""

    def __init__(self, problem: str, after: float | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.after, self.reached = after, reached


def download_file(
    file: WebFile, folder: Path, progress: Progress = lambda size: None, unreachable: float | None = None
) -> Path:
    """Download what is missing of folder / file.path and return the path; several processes may call at once.

    Raises OSError if the server refuses, is not reached for `unreachable` seconds, sends no byte for PATIENCE
    seconds or a wrong file TRIES times, or the disk is full; what arrived is kept.
    """
    path = folder / file.path
    if is_done(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:  # it stays, since deleting it would be a race
        disk.lock(lock, None)
        if is_done(path, file):  # by another process meanwhile
            return path
        digest = file.sha256
        if digest is None or not path.exists() or disk.sha256(path) != digest:
            part = path.with_name(path.name + ".part")
            digest = _download(file, part, progress, unreachable)
            part.replace(path)
            disk.sync_folder(path.parent)
        receipt = {"size": file.size, "sha256": digest, "mtime_ns": path.stat().st_mtime_ns, "url": file.url}
        with disk.write_whole(path.with_name(path.name + ".json")) as out:
            out.write((json.dumps(receipt) + "\n").encode())
    return path


def is_done(path: Path, file: WebFile) -> bool:
    """True if its size and its receipt show that the file is there."""
    try:
        status, receipt = path.stat(), json.loads(path.with_name(path.name + ".json").read_text())
    except (OSError, ValueError):
        return False
    expected: dict[str, object] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    expected |= {"url": file.url} if file.sha256 is None else {"sha256": file.sha256}
    return isinstance(receipt, dict) and expected.items() <= receipt.items() and status.st_size == file.size


def _download(file: WebFile, part: Path, progress: Progress, unreachable: float | None) -> str:
    """Complete the part and return its SHA-256."""
    for _ in range(TRIES):
        try:
            insist(file.url, lambda: _receive(file, part, progress), lambda: part.stat().st_size, unreachable)
            with part.open("rb") as complete:
                disk.sync(complete.fileno())
                digest = hashlib.file_digest(complete, "sha256").hexdigest()
            if file.sha256 in (None, digest):
                return digest
            problem = f"{file.url}: SHA-256 is {digest}, should be {file.sha256}"
        except Wrong as wrong:
            problem = str(wrong)
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(part)  # a failing write does not say where
            raise
        part.unlink()
    raise OSError(f"{problem}; given up after {TRIES} downloads")


def _receive(file: WebFile, part: Path, progress: Progress) -> None:
    """Append the file's missing bytes to the part. Raises Again or OSError."""
    # Without a SHA-256, nothing could show that the part's bytes are right.
    with part.open("ab" if file.sha256 else "wb") as out:
        size = out.tell()
        if size == file.size:
            return
        with get(file.url, size) as (blocks, total):  # through a new link to the store, since links expire
            if total not in (None, file.size):
                raise Wrong(f"{file.url}: the file has {total:,} bytes, should have {file.size:,}")
            for block in blocks:
                size += len(block)
                if size > file.size:
                    raise Wrong(f"{file.url}: the file has more than {file.size:,} bytes")
                out.write(block)
                progress(size)
    if size < file.size:
        raise Again(f"the connection closed after {size:,} of {file.size:,} bytes")


class Downloader(contextlib.AbstractContextManager["Downloader"]):
    """Fetches files, each into its folder, in order in a background thread, while the caller works on others.

    At most `ahead` fetched files wait for their release (None: all of them). `delete` deletes released files.
    """

    def __init__(
        self, files: Sequence[tuple[WebFile, Path]], ahead: int | None = None, delete: bool = False
    ) -> None:
        self.delete = delete
        self.files = {folder / file.path: (file, folder) for file, folder in files}
        self.bytes_done, self.bytes_total = 0, sum(file.size for file, _ in files)
        self._arrived = set[Path]()
        self._error: BaseException | None = None
        self._room = threading.Semaphore(len(files) if ahead is None else ahead)
        self._stop = threading.Event()
        # A daemon, since a silent server must not delay the end of the program.
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def ready(self, path: Path) -> bool:
        """True if the file is there. Raises the thread's OSError if it never will be."""
        arrived = path in self._arrived
        if self._error is not None and not arrived:
            raise self._error
        return arrived

    def release(self, path: Path) -> None:
        """Record that the caller has finished with a file."""
        if self.delete:
            path.with_name(path.name + ".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._room.release()

    def __exit__(self, *_: object) -> None:
        """Stop fetching; what has arrived of a file is kept, and the next download resumes there."""
        self._stop.set()
        self._room.release()
        self._thread.join(1.0)

    def _run(self) -> None:
        complete = 0

        def note(size: int) -> None:
            self.bytes_done = complete + size
            if self._stop.is_set():
                raise CancelledError

        try:
            for path, (file, folder) in self.files.items():
                self._room.acquire()
                note(0)
                download_file(file, folder, note, PATIENCE)  # a build of hours outlasts a network's outage
                complete += file.size
                self._arrived.add(path)
                note(0)
        except CancelledError:
            return
        except BaseException as error:  # the caller's thread raises it
            self._error = error


def insist(
    what: str, function: Callable[[], T], size: Callable[[], int] = lambda: 0, unreachable: float | None = None
) -> T:
    """Call the function until it does not raise Again, and return its result. Raise OSError if patience runs out.

    Patience starts anew whenever `size()`, the bytes that have arrived, has grown. Errors name `what`.
    """
    since, tries, answered, largest = time.monotonic(), 0, False, 0
    while True:
        try:
            return function()
        except Again as again:
            if size() > largest:
                since, tries, largest = time.monotonic(), 0, size()
            tries += 1
            answered |= again.reached
            delay = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
            delay = delay if again.after is None else again.after
            passed = time.monotonic() - since
            if passed + delay > (PATIENCE if answered else unreachable or UNREACHABLE):
                gave_up = f"gave up at try {tries} after {passed:.0f} seconds"
                raise OSError(f"{what}: {again}; {gave_up}: run the same command again later") from again
        time.sleep(delay)


@contextlib.contextmanager
def get(url: str, start: int, stop: int | None = None) -> Iterator[tuple[Iterator[bytes], int | None]]:
    """Request bytes [start, stop) of a file; yield them in blocks, and the file's size, None if unknown.

    Raises Wrong if the server does not send that range, another OSError, or Again.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    # The user's token goes to the hub alone; the client removes it when a redirect leaves the host.
    token = None if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2] else False
    headers = build_hf_headers(token=token, library_name="gpt2-data")
    headers |= {"Range": f"bytes={start}-{'' if stop is None else stop - 1}", "Accept-Encoding": "identity"}
    with transport(url), get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT) as response:
        if response.status_code != 416:
            hf_raise_for_status(response)
        if response.status_code == 200:
            first, total = "0", response.headers.get("Content-Length", "*")
        else:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            first, total = span.groups() if span else ("", "*")
        if first != str(start):
            raise Wrong(f"{url}: the server cannot send the file from byte {start:,} on")
        # Not iter_raw(size): it would buffer, and lose, what came before the connection broke.
        yield response.iter_raw(), None if total == "*" else int(total)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file. Raises OSError in one line."""

    def read() -> bytes:
        with get(url, start, stop) as (blocks, _):
            data = b"".join(blocks)
        if len(data) != stop - start:
            raise Again(f"the server sent {len(data):,} bytes of {stop - start:,}")
        return data

    return insist(url, read) if stop > start else b""


@contextlib.contextmanager
def transport(what: str) -> Iterator[None]:
    """Turn what the client raises into Again or an OSError of one line, without the signature of a link."""
    from huggingface_hub import errors
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    reasons = {  # the first match counts; the hub treats a private dataset like a missing one
        errors.GatedRepoError: f"gated: ask for access on the dataset's page, then {LOGIN}",
        errors.RepositoryNotFoundError: f"no such dataset; if it is private, {LOGIN}",
        errors.RevisionNotFoundError: "no such revision",
    }
    denied = f"not allowed: {LOGIN}, with an account that has access"
    statuses = {401: denied, 403: denied, 404: "no such file"}
    try:
        yield
    except errors.HfHubHTTPError as error:
        response, status = error.response, error.response.status_code
        if status in (408, 425, 429, 500, 502, 503, 504):
            limit, after = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
            seconds = float(after) if after.isdecimal() else None
            if limit is not None and limit.remaining == 0:
                seconds = limit.reset_in_seconds + 1.0
            asks = "" if seconds is None else f" and asks to wait {seconds:.0f} seconds"
            raise Again(f"{response.url.netloc.decode()} answers with HTTP {status}{asks}", seconds) from None
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), "")
        raise OSError(f"{what}: {reason or statuses.get(status, 'refused')} (HTTP {status})") from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise OSError(f"{what}: this address cannot be downloaded: {error}") from error
    except httpx2.RequestError as error:
        reached = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
        problem = "the connection broke" if reached else "cannot be reached"
        why = " ".join(str(error).split()) or type(error).__name__
        raise Again(f"{error.request.url.netloc.decode()}: {problem}: {why}", reached=reached) from error
