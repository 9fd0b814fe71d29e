"""Files of gigabytes to disk: resumed across processes, checked, and there whole or not at all.

NAME.part grows, is checked against the size and the SHA-256 that the hub lists, and becomes NAME; NAME.json is the
receipt by which a rerun knows the file without hashing it again; NAME.lock keeps other processes and boxes away.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt2_data import disk
from gpt2_data.sources import hub, web
from gpt2_data.sources.web import WebFile

TRIES = 3  # downloads from the first byte, of a file that arrives wrong or cannot be resumed

Progress = Callable[[int], object]  # is called with the bytes of the file that are on the disk


class _Stopped(Exception):
    """The caller wants no more files."""


def fetch(source: str, folder: Path, *, name: str | None = None, sha256: str | None = None) -> Path:
    """Download a file, unless it is there already, and return its path.

    The file is there whole and checked, or not at all. A download that broke resumes, in another process too.

    Args:
        source: an address (https://...), or hf:REPO[@REVISION][:CONFIG[:SPLIT]], a split that is a single file.
        folder: where the file is kept; it is created if need be.
        name: of the file in `folder`. By default the last part of the address, or OWNER--REPO/PATH of the hub.
        sha256: in hex. A file of that name and hash is taken without asking the network. By default it is the
            hub's own; of another address only the size is checked then.

    Raises:
        ValueError: the source is malformed, or the hub has no such config or split, or several files.
        OSError: refused, not reached (given up after half a minute) or wrong content, in one line.
    """
    on_hub = hub.parse(source)
    if on_hub is None:
        match = re.fullmatch(r"https?://[^?]+/([^/?]+)(?:\?.*)?", source)
        if match is None:
            raise ValueError(f"{source!r}: write the address of a file (https://...) or hf:REPO[:CONFIG[:SPLIT]]")
        name = name or match[1]
    if name and sha256 is not None and (folder / name).is_file():
        if disk.sha256(folder / name) == sha256:
            return folder / name
        _receipt(folder / name).unlink(missing_ok=True)  # it may not tell that the file is damaged
    if on_hub is None:
        assert name is not None
        file = WebFile(source, name, web.insist(source, lambda: _size_of(source)), sha256)
    else:
        files = hub.list_files(on_hub).files
        if len(files) != 1:
            raise ValueError(f"{source} has {len(files)} files on the hub, not one")
        name = name or f"{on_hub.repo.replace('/', '--')}/{files[0].path}"
        file = dataclasses.replace(files[0], path=name, sha256=sha256 or files[0].sha256)
    return download_file(file, folder)


def _size_of(url: str) -> int:
    with web.get(url, 0, 1) as (_, size):
        if size is None:
            raise OSError(f"{url}: the server does not say how long the file is")
        return size


def download_file(file: WebFile, folder: Path, progress: Progress | None = None) -> Path:
    """Have the file at folder / file.path, downloading what is missing; several processes may ask at once.

    Raises:
        OSError: refused (at once), not reached or rate-limited for web.PATIENCE seconds, wrong content TRIES
            times, or no room (what is there is kept).
    """
    path = folder / file.path
    if is_done(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:  # it stays, since to delete it races
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_done(path, file):  # by another process meanwhile
            return path
        digest = file.sha256
        if digest is None or not path.exists() or disk.sha256(path) != digest:
            part = path.with_name(path.name + ".part")
            digest = _download(file, part, progress)
            part.replace(path)
            disk.sync_folder(path.parent)
        receipt = {"size": file.size, "sha256": digest, "mtime_ns": path.stat().st_mtime_ns, "url": file.url}
        with disk.write_whole(_receipt(path)) as out:
            out.write((json.dumps(receipt) + "\n").encode())
    return path


def is_done(path: Path, file: WebFile) -> bool:
    """True if the file is there, by its size and its receipt."""
    try:
        status, receipt = path.stat(), json.loads(_receipt(path).read_text())
    except (OSError, ValueError):
        return False
    expected: dict[str, object] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    expected |= {"url": file.url} if file.sha256 is None else {"sha256": file.sha256}
    return isinstance(receipt, dict) and expected.items() <= receipt.items() and status.st_size == file.size


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _download(file: WebFile, part: Path, progress: Progress | None) -> str:
    """Complete the part and return its SHA-256."""
    for _ in range(TRIES):
        try:
            web.insist(file.url, lambda: _receive(file, part, progress), lambda: part.stat().st_size)
            with part.open("rb") as complete:
                os.fsync(complete.fileno())
                digest = hashlib.file_digest(complete, "sha256").hexdigest()
            if file.sha256 in (None, digest):
                return digest
            problem = f"{file.url}: SHA-256 is {digest}, should be {file.sha256}"
        except web.Wrong as wrong:
            problem = str(wrong)
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(part)  # a failing write does not say where
            raise
        part.unlink()
    raise OSError(f"{problem}; given up after {TRIES} downloads")


def _receive(file: WebFile, part: Path, progress: Progress | None) -> None:
    """Append to the part what is missing of the file. Raises web.Again or OSError."""
    # Without a SHA-256 nothing could tell what the part begins with.
    with part.open("ab" if file.sha256 else "wb") as out:
        size = out.tell()
        if size == file.size:
            return
        with web.get(file.url, size) as (blocks, total):  # by a new link to the store, for links expire
            if total not in (None, file.size):
                raise web.Wrong(f"{file.url}: the file has {total:,} bytes, should have {file.size:,}")
            for block in blocks:
                size += len(block)
                if size > file.size:
                    raise web.Wrong(f"{file.url}: the file has more than {file.size:,} bytes")
                out.write(block)
                if progress is not None:
                    progress(size)
    if size < file.size:
        raise web.Again(f"the connection closed after {size:,} of {file.size:,} bytes")


class Downloader:
    """Fetches files, each into its folder, in order in a background thread, while the caller works on others.

    Args:
        ahead: the number of files that may be there and not released; None: all.
        delete: True deletes a file that is released.

    Attributes:
        bytes_done: on the disk; what an earlier run had fetched counts as soon as it is seen.
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
        # A daemon, since a server that is silent must not hold up the end of the program.
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def ready(self, path: Path) -> bool:
        """True if the file is there. Raises the thread's OSError if it never will be."""
        arrived = path in self._arrived
        if self._error is not None and not arrived:
            raise self._error
        return arrived

    def release(self, path: Path) -> None:
        """Take note that a file is done with."""
        if self.delete:
            _receipt(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._room.release()

    def __enter__(self) -> "Downloader":
        return self

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
                raise _Stopped

        try:
            for path, (file, folder) in self.files.items():
                self._room.acquire()
                note(0)
                download_file(file, folder, note)
                complete += file.size
                self._arrived.add(path)
                note(0)
        except _Stopped:
            return
        except BaseException as error:  # the caller's thread raises it
            self._error = error


TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tinyshakespeare() -> Path:
    """Return TinyShakespeare in the user's cache, downloaded once and checked each time. Raises OSError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-data"
    path = cache / "tinyshakespeare.txt"
    try:
        return fetch(TINYSHAKESPEARE, cache, name=path.name, sha256=TINYSHAKESPEARE_SHA256)
    except OSError as error:
        raise OSError(f"{error}; or put {TINYSHAKESPEARE} at {path}") from error
