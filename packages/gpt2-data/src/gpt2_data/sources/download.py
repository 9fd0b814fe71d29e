"""Files of gigabytes to disk: resumed across processes, checked, and there whole or not at all.

NAME.part grows, is checked against the size and the SHA-256 that the hub lists, and becomes NAME; NAME.json is the
receipt by which a rerun knows the file without hashing it again; NAME.lock keeps other processes and boxes away.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

import httpx2

from gpt2_data.disk import Busy, lock, sync_folder, write_whole
from gpt2_data.disk import sha256 as sha256_of
from gpt2_data.sources import hub, web
from gpt2_data.sources.web import WebFile

TRIES = 3  # downloads from the first byte, of a file that arrives wrong or cannot be resumed

Progress = Callable[[int], object]  # is called with the bytes of the file that are on the disk


class _Wrong(Exception):
    """What the server sends is not the file."""


def fetch(source: str, folder: Path, *, name: str | None = None, sha256: str | None = None) -> Path:
    """Download a file, unless it is there already, and return its path.

    A download that broke resumes where it was, in another process too. The file is there whole and checked, or not
    at all; several processes that ask at once fetch it once.

    Args:
        source: an address (https://...), or a split of a dataset on the Hugging Face hub that is a single file, as
            hf:REPO[@REVISION][:CONFIG[:SPLIT]].
        folder: where the file is kept; it is created if need be.
        name: of the file in `folder`. By default the last part of the address, or OWNER--REPO/PATH of the hub.
        sha256: of the file, in hex. A file of that name and hash is taken without asking the network. Without it
            the hub's own hash is checked; of another address only the size can be.

    Raises:
        ValueError: the source is malformed, or the hub has no such dataset, config or split, or several files.
        OSError: refused, not reached (given up after half a minute) or wrong content, in one line.
    """
    on_hub = hub.parse(source)
    if on_hub is None:
        if not source.startswith(("http://", "https://")):
            raise ValueError(f"{source!r}: write an address (https://...) or hf:REPO[:CONFIG[:SPLIT]]")
        name = name or source.partition("?")[0].rpartition("/")[2]
        if not name:
            raise ValueError(f"{source}: this address names no file: give its name")
    if name and sha256 is not None and (folder / name).is_file():
        if sha256_of(folder / name) == sha256:
            return folder / name
        _receipt(folder / name).unlink(missing_ok=True)  # it may not tell that the file is damaged
    if on_hub is None:
        assert name is not None
        file = WebFile(source, name, _size_of(source), sha256)
    else:
        files = hub.list_files(on_hub).files
        if len(files) != 1:
            raise ValueError(f"{source} has {len(files)} files on the hub, not one")
        name = name or f"{on_hub.repo.replace('/', '--')}/{files[0].path}"
        file = dataclasses.replace(files[0], path=name, sha256=sha256 or files[0].sha256)
    return download_file(file, folder)


def _size_of(url: str) -> int:
    def ask() -> int:
        with web.get(url, {"Range": "bytes=0-0"}) as response:
            if (size := web.span(response)[1]) is None:
                raise OSError(f"{url}: the server does not say how long the file is")
            return size

    return web.Patience(url).call(ask)


def download_file(
    file: WebFile, folder: Path, progress: Progress | None = None, stop: threading.Event | None = None
) -> Path:
    """Have the file at folder / file.path, downloading what is missing; several processes may ask at once.

    Raises:
        OSError: refused (at once), not reached or rate-limited for web.PATIENCE seconds, wrong content TRIES
            times, or no room (what is there is kept).
        web.Stopped: `stop` is set.
    """
    path = folder / file.path
    if is_done(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = web.Patience(file.url, stop)
    with _locked(path.with_name(path.name + ".lock"), patience):
        if is_done(path, file):  # by another process meanwhile
            return path
        digest = file.sha256
        if digest is None or not path.exists() or sha256_of(path) != digest:
            part = path.with_name(path.name + ".part")
            digest = _download(file, part, progress, patience)
            part.replace(path)
            sync_folder(path.parent)
        receipt = {"size": file.size, "sha256": digest, "mtime_ns": path.stat().st_mtime_ns, "url": file.url}
        with write_whole(_receipt(path)) as out:
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


@contextlib.contextmanager
def _locked(path: Path, patience: web.Patience) -> Iterator[None]:
    """Wait for the lock of a file. NAME.lock stays, since to delete it races."""
    with path.open("a") as file:
        while True:
            patience.progress()  # another's time is not ours
            try:
                lock(file, f"{path} is locked")
                break
            except Busy:
                patience.stop.wait(0.2)
        yield


def _download(file: WebFile, part: Path, progress: Progress | None, patience: web.Patience) -> str:
    """Complete `part` and return its SHA-256. Raises OSError, naming the part where the disk is the trouble."""
    for remaining in reversed(range(TRIES)):
        try:
            with part.open("ab+") as out:
                return _receive(file, out, progress, patience)
        except _Wrong as wrong:
            part.unlink()
            if not remaining:
                raise OSError(f"{file.url}: given up after {TRIES} downloads: {wrong}") from None
            patience.wait(web.Again(str(wrong)))
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(part)  # a failing write does not say where
            raise
    raise AssertionError


def _receive(file: WebFile, out: BinaryIO, progress: Progress | None, patience: web.Patience) -> str:
    """Append to `out` what is missing of the file, and return the SHA-256 of the whole.

    What a part began with is believed only as far as the SHA-256 can tell in the end; without one, each process
    starts anew, and the ETag tells whether the file is still the same. Raises _Wrong, OSError or Stopped.
    """
    out.seek(0)
    if file.sha256 is None or os.fstat(out.fileno()).st_size > file.size:
        out.truncate(0)
    digest = hashlib.sha256()
    while block := out.read(2**20):
        digest.update(block)
        patience.progress()
    size, headers = out.tell(), dict[str, str]()

    def receive_more() -> None:
        nonlocal size
        if size:  # each time by a new link to the store, for links expire
            headers["Range"] = f"bytes={size}-"
        with web.get(file.url, headers) as response:
            _check_answer(response, file, size)
            tag = response.headers.get("ETag", "")
            if file.sha256 is None and tag.startswith('"'):  # a strong one stands for these very bytes
                headers["If-Range"] = tag
            for block in response.iter_raw():  # a size here would hold back, and lose, what came before a break
                if size + len(block) > file.size:
                    raise _Wrong(f"the file has more than the {file.size:,} bytes that it should have")
                out.write(block)
                digest.update(block)
                size += len(block)
                patience.progress()
                if progress is not None:
                    progress(size)
        if size < file.size:
            raise web.Again(f"the connection closed after {size:,} of {file.size:,} bytes")

    if size < file.size:
        patience.call(receive_more)
    out.flush()
    os.fsync(out.fileno())
    if file.sha256 not in (None, digest.hexdigest()):
        raise _Wrong(f"SHA-256 is {digest.hexdigest()}, should be {file.sha256}")
    return digest.hexdigest()


def _check_answer(response: httpx2.Response, file: WebFile, size: int) -> None:
    """Raise _Wrong unless the response is the file's bytes from `size` on."""
    first, total = web.span(response)
    if total not in (None, file.size):
        raise _Wrong(f"the file has {total:,} bytes, should have {file.size:,}")
    if response.status_code == 416 or first != size:
        raise _Wrong(f"the server does not resume at byte {size:,} of {file.size:,}")


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
        self._arrived: dict[Path, Future[None]] = {path: Future() for path in self.files}
        self._room = threading.Semaphore(len(files) if ahead is None else ahead)
        self._stop = threading.Event()
        # A daemon, since a server that is silent must not hold up the end of the program.
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    def ready(self, path: Path) -> bool:
        """True if the file is there. Raises the thread's OSError if it never will be."""
        arrived = self._arrived[path]
        return arrived.done() and arrived.result() is None

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
        self._thread.join(2.0)

    def _run(self) -> None:
        complete = 0

        def note(size: int) -> None:
            self.bytes_done = complete + size

        try:
            for path, (file, folder) in self.files.items():
                self._room.acquire()
                if self._stop.is_set():
                    return
                download_file(file, folder, note, self._stop)
                complete += file.size
                note(0)
                self._arrived[path].set_result(None)
        except web.Stopped:
            return
        except BaseException as error:  # the caller's thread raises it
            for arrived in self._arrived.values():
                if not arrived.done():
                    arrived.set_exception(error)


TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tinyshakespeare() -> Path:
    """Return TinyShakespeare in the user's cache, downloaded once and checked each time. Raises OSError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-data"
    path = cache / "tinyshakespeare.txt"
    try:
        return fetch(TINYSHAKESPEARE, cache, name=path.name, sha256=TINYSHAKESPEARE_SHA256)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{error}; or put {TINYSHAKESPEARE} at {path}") from error
