"""Files of gigabytes to disk: resumed across processes, checked, and there whole or not at all.

NAME.part grows, is checked against the size and the SHA-256 that the hub lists, and becomes NAME; NAME.json is the
receipt by which a rerun knows the file without hashing it again; NAME.lock keeps other processes and boxes away.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gpt2_data.disk import sync_folder as fsync_folder
from gpt2_data.disk import write_whole as atomic
from gpt2_data.sources import web
from gpt2_data.sources.hub import HubFile
from gpt2_data.sources.web import WebFile

TRIES = 3  # downloads from the first byte, of a file that arrives wrong or cannot be resumed
SECONDS_BETWEEN_LOOKS = 0.2  # at a lock that another holds

Progress = Callable[[int, int], object]  # (bytes on disk, bytes of the file)


class _Wrong(Exception):
    """What the server sends is not the file."""


def fetch(
    file: HubFile | WebFile,
    folder: Path,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    unreachable: float | None = None,
) -> Path:
    """Have the file at folder / file.path, downloading what is missing; several processes may ask at once.

    Raises OSError in one line: refused (at once), not reached or rate-limited for web.PATIENCE seconds, wrong
    content TRIES times over, no room (what is there is kept). Raises web.Stopped once `stop` is set.
    `unreachable`: seconds to try a server that does not answer at all, if not web.PATIENCE.
    """
    path = folder / file.path
    if is_done(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = web.Patience(file.url, stop, unreachable)
    with _locked(path.with_name(path.name + ".lock"), patience):
        if is_done(path, file):  # by another process meanwhile
            return path
        if path.exists() and path.stat().st_size == file.size and _hash(path, patience) == file.sha256:
            _write_receipt(path, file, file.sha256)  # killed before the receipt, or put there by hand
            return path
        digest = _download(file, path.with_name(path.name + ".part"), progress, patience)
        path.with_name(path.name + ".part").replace(path)
        fsync_folder(path.parent)
        _write_receipt(path, file, digest)
    return path


def is_done(path: Path, file: HubFile | WebFile) -> bool:
    """Whether the file is there, by its size and its receipt."""
    try:
        found, receipt = path.stat(), json.loads(_receipt(path).read_text())
    except (OSError, ValueError):
        return False
    here = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
    meant = (
        {"size": file.size, "url": file.url} if file.sha256 is None else {"size": file.size, "sha256": file.sha256}
    )
    return isinstance(receipt, dict) and (here | meant).items() <= receipt.items() and found.st_size == file.size


def remove(path: Path) -> None:
    """Delete a fetched file and its receipt, if they are there."""
    _receipt(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_receipt(path: Path, file: HubFile | WebFile, digest: str) -> None:
    found = path.stat()
    receipt = {"size": found.st_size, "sha256": digest, "mtime_ns": found.st_mtime_ns, "url": file.url}
    with atomic(_receipt(path), path.parent) as out:
        out.write((json.dumps(receipt) + "\n").encode())


def _hash(path: Path, patience: web.Patience) -> str:
    with path.open("rb") as file:
        return _hash_of(file, patience).hexdigest()


def _hash_of(file: BinaryIO, patience: web.Patience) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while block := file.read(2**20):
        patience.check()
        digest.update(block)
    return digest


@contextlib.contextmanager
def _locked(lock: Path, patience: web.Patience) -> Iterator[None]:
    """Alone with a file; the lock goes with the process, however it ends. NAME.lock stays: to delete it races."""
    with lock.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                patience.check()
                patience.stop.wait(SECONDS_BETWEEN_LOOKS)
        patience.progress()  # another's time is not ours
        yield


def _download(file: HubFile | WebFile, part: Path, progress: Progress | None, patience: web.Patience) -> str:
    """Complete `part`; its SHA-256. Raises OSError, naming the part where the disk is the trouble."""
    link = web.Link(file.url)
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            patience.wait(web.Again(problem))
        try:
            with part.open("ab+") as out:
                digest = _receive(file, link, out, progress, patience)
                out.flush()
                os.fsync(out.fileno())
            if file.sha256 in (None, digest):
                return digest
            problem = f"SHA-256 is {digest}, should be {file.sha256}"
        except _Wrong as wrong:
            problem = str(wrong)
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(part)  # a failing write does not say where
            raise
        part.unlink()
    raise OSError(f"{file.url}: given up after {TRIES} downloads: {problem}")


def _receive(
    file: HubFile | WebFile, link: web.Link, out: BinaryIO, progress: Progress | None, patience: web.Patience
) -> str:
    """Append to `out` what is missing of the file; the SHA-256 of the whole.

    What a part began with is believed only as far as the SHA-256 can tell in the end; without one, each process
    starts anew, and the ETag tells whether the file is still the same. Raises _Wrong, OSError or Stopped.
    """
    out.seek(0)
    if file.sha256 is None or os.fstat(out.fileno()).st_size > file.size:
        out.truncate(0)
    digest = _hash_of(out, patience)
    have, etag = out.tell(), None
    while have < file.size:
        patience.check()
        try:
            with link.open(have, etag=etag) as response:
                size = web.total_size(response)
                if size not in (None, file.size):
                    raise _Wrong(f"the file has {size:,} bytes, should have {file.size:,}")
                if response.status_code == 416 or (have and web.range_start(response) != have):
                    raise _Wrong(f"the server does not go on at byte {have:,} of {file.size:,}")
                if file.sha256 is None:  # else the hash tells, and stores do not always agree on an ETag
                    etag = web.strong_etag(response)
                for block in web.blocks(response, file.url):
                    patience.check()
                    if have + len(block) > file.size:
                        raise _Wrong(f"the file has more than the {file.size:,} bytes that it should have")
                    out.write(block)
                    digest.update(block)
                    have += len(block)
                    patience.progress()
                    if progress is not None:
                        progress(have, file.size)
            if have < file.size:
                raise web.Again(f"the connection closed after {have:,} of {file.size:,} bytes")
        except web.Again as again:
            patience.wait(again)
    return digest.hexdigest()


class Downloader:
    """Fetches files in order in a background thread, while the caller works on those that are there.

    No more than `ahead` files are finished and not yet released (None: no limit). With `delete`, release deletes.

        with Downloader([(file, folder) for file in listing.files], ahead=2, delete=True) as downloader:
            while not downloader.ready(path): ...      # raises what stopped the thread
            ...
            downloader.release(path)
    """

    def __init__(
        self, files: Sequence[tuple[HubFile | WebFile, Path]], ahead: int | None = None, delete: bool = False
    ) -> None:
        self.files, self.ahead, self.delete = list(files), ahead, delete
        self.paths = [folder / file.path for file, folder in files]
        self.bytes_total = sum(file.size for file, _ in files)
        self._finished: set[Path] = set()
        self._released: set[Path] = set()
        self._complete = self._current = 0  # bytes of the files that are done, and of the one being fetched
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    @property
    def bytes_done(self) -> int:
        """Of bytes_total; what an earlier run had fetched counts as soon as it is found."""
        return self._complete + self._current

    def ready(self, path: Path) -> bool:
        """Whether the file is there. Raises the thread's OSError if it never will be."""
        if path in self._finished:
            return True
        if self._error is not None:
            raise self._error
        return False

    def release(self, path: Path) -> None:
        """The caller is done with the file: room for another."""
        assert path in self._finished, path
        if self.delete:
            remove(path)
        with self._changed:
            self._released.add(path)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop soon; the part that is half there stays, to be resumed by the next one."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        # A thread that waits for a silent server ends with its read's timeout, without writing anything more.
        self._thread.join(2.0)

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _room(self) -> bool:
        return self._stop.is_set() or self.ahead is None or len(self._finished - self._released) < self.ahead

    def _run(self) -> None:
        try:
            for file, folder in self.files:
                with self._changed:
                    self._changed.wait_for(self._room)
                if self._stop.is_set():
                    return
                path = fetch(file, folder, self._note, self._stop)
                with self._changed:
                    self._complete, self._current = self._complete + file.size, 0
                    self._finished.add(path)
                    self._changed.notify_all()
        except web.Stopped:
            pass
        except BaseException as error:  # the caller's thread raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _note(self, done: int, _: int) -> None:
        self._current = done


TINYSHAKESPEARE = WebFile(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinyshakespeare.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def tinyshakespeare() -> Path:
    """TinyShakespeare, downloaded once into the user's cache and checked each time. Raises OSError in one line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-data"
    path = cache / TINYSHAKESPEARE.path
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() == TINYSHAKESPEARE.sha256:
            return path
        remove(path)
    try:
        return fetch(TINYSHAKESPEARE, cache, unreachable=web.UNREACHABLE)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{error}; or put {TINYSHAKESPEARE.url} at {path}") from error
