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

from gpt2_data.disk import Busy, lock, sync_folder, write_whole
from gpt2_data.disk import sha256 as sha256_of
from gpt2_data.sources import hub, web
from gpt2_data.sources.web import WebFile

TRIES = 3  # downloads from the first byte, of a file that arrives wrong or cannot be resumed

Progress = Callable[[int, int], object]  # (bytes on disk, bytes of the file)


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
    if on_hub is None and not source.startswith(("http://", "https://")):
        raise ValueError(f"{source!r}: write an address (https://...) or hf:REPO[:CONFIG[:SPLIT]]")
    place = name or ("" if on_hub is not None else source.partition("?")[0].rpartition("/")[2])
    if place and sha256 is not None:
        path = folder / place
        if path.is_file() and sha256_of(path) == sha256:
            return path
    if on_hub is not None:
        files = hub.list_files(on_hub).files
        if len(files) != 1:
            raise ValueError(f"{source} has {len(files)} files on the hub, not one")
        place = place or f"{on_hub.repo.replace('/', '--')}/{files[0].path}"
        file = dataclasses.replace(files[0], path=place, sha256=sha256 or files[0].sha256)
    elif place:
        file = WebFile(source, place, web.size_of(source), sha256)
    else:
        raise ValueError(f"{source}: this address names no file: give its name")
    return download_file(file, folder, unreachable=web.UNREACHABLE)


def download_file(
    file: WebFile,
    folder: Path,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    unreachable: float | None = None,
) -> Path:
    """Have the file at folder / file.path, downloading what is missing; several processes may ask at once.

    Args:
        unreachable: seconds to try a server that does not answer, if not web.PATIENCE.

    Raises:
        OSError: refused (at once), not reached or rate-limited for web.PATIENCE seconds, wrong content TRIES
            times, or no room (what is there is kept).
        web.Stopped: `stop` is set.
    """
    path = folder / file.path
    if is_done(path, file):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    patience = web.Patience(file.url, stop, unreachable)
    with _locked(path.with_name(path.name + ".lock"), patience):
        if is_done(path, file):  # by another process meanwhile
            return path
        if path.exists() and path.stat().st_size == file.size and sha256_of(path) == file.sha256:
            _write_receipt(path, file, file.sha256)  # killed before the receipt, or put there by hand
            return path
        part = path.with_name(path.name + ".part")
        digest = _download(file, part, progress, patience)
        part.replace(path)
        sync_folder(path.parent)
        _write_receipt(path, file, digest)
    return path


def is_done(path: Path, file: WebFile) -> bool:
    """True if the file is there, by its size and its receipt."""
    try:
        status, receipt = path.stat(), json.loads(_receipt(path).read_text())
    except (OSError, ValueError):
        return False
    expected: dict[str, object] = {"size": file.size, "mtime_ns": status.st_mtime_ns}
    expected |= {"url": file.url} if file.sha256 is None else {"sha256": file.sha256}
    return isinstance(receipt, dict) and expected.items() <= receipt.items() and status.st_size == file.size


def remove(path: Path) -> None:
    """Delete a fetched file and its receipt, if they are there."""
    _receipt(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _receipt(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_receipt(path: Path, file: WebFile, digest: str) -> None:
    receipt = {"size": file.size, "sha256": digest, "mtime_ns": path.stat().st_mtime_ns, "url": file.url}
    with write_whole(_receipt(path)) as out:
        out.write((json.dumps(receipt) + "\n").encode())


def _hash_rest(file: BinaryIO, patience: web.Patience) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while block := file.read(2**20):
        patience.check()
        digest.update(block)
    return digest


@contextlib.contextmanager
def _locked(path: Path, patience: web.Patience) -> Iterator[None]:
    """Lock a file; the lock goes with the process, however it ends. NAME.lock stays, since to delete it races."""
    with path.open("a") as file:
        while True:
            try:
                lock(file, f"{path} is locked")
                break
            except Busy:
                patience.check()
                patience.stop.wait(0.2)
        patience.progress()  # another's time is not ours
        yield


def _download(file: WebFile, part: Path, progress: Progress | None, patience: web.Patience) -> str:
    """Complete `part` and return its SHA-256. Raises OSError, naming the part where the disk is the trouble."""
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
    file: WebFile, link: web.Link, out: BinaryIO, progress: Progress | None, patience: web.Patience
) -> str:
    """Append to `out` what is missing of the file, and return the SHA-256 of the whole.

    What a part began with is believed only as far as the SHA-256 can tell in the end; without one, each process
    starts anew, and the ETag tells whether the file is still the same. Raises _Wrong, OSError or Stopped.
    """
    out.seek(0)
    if file.sha256 is None or os.fstat(out.fileno()).st_size > file.size:
        out.truncate(0)
    digest = _hash_rest(out, patience)
    size, etag = out.tell(), None

    def receive_more() -> None:
        nonlocal size, etag
        patience.check()
        with link.open(size, etag=etag) as response:
            first, total = web.span(response)
            if total not in (None, file.size):
                raise _Wrong(f"the file has {total:,} bytes, should have {file.size:,}")
            if response.status_code == 416 or first != size:
                raise _Wrong(f"the server does not go on at byte {size:,} of {file.size:,}")
            tag = response.headers.get("ETag", "")
            if file.sha256 is None and tag.startswith('"'):  # a strong one stands for these very bytes
                etag = tag
            for block in web.blocks(response):
                patience.check()
                if size + len(block) > file.size:
                    raise _Wrong(f"the file has more than the {file.size:,} bytes that it should have")
                out.write(block)
                digest.update(block)
                size += len(block)
                patience.progress()
                if progress is not None:
                    progress(size, file.size)
        if size < file.size:
            raise web.Again(f"the connection closed after {size:,} of {file.size:,} bytes")

    if size < file.size:
        patience.call(receive_more)
    return digest.hexdigest()


class Downloader:
    """Fetches files in order in a background thread, while the caller works on those that are there.

    Args:
        files: each with its folder.
        ahead: how many files may be there that are not released; None: all.
        delete: True deletes a file that is released.

        with Downloader([(file, folder) for file in listing.files], ahead=2, delete=True) as downloader:
            while not downloader.ready(path): ...      # raises what stopped the thread
            ...
            downloader.release(path)
    """

    def __init__(
        self, files: Sequence[tuple[WebFile, Path]], ahead: int | None = None, delete: bool = False
    ) -> None:
        self.delete = delete
        self.files = {folder / file.path: (file, folder) for file, folder in files}
        self.bytes_total = sum(file.size for file, _ in files)
        self._complete = self._current = 0  # bytes of the files that are done, and of the one being fetched
        self._arrived: dict[Path, Future[None]] = {path: Future() for path in self.files}
        self._room = threading.Semaphore(len(files) if ahead is None else ahead)
        self._stop = threading.Event()
        # A daemon, since a server that is silent must not hold up the end of the program.
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)
        self._thread.start()

    @property
    def bytes_done(self) -> int:
        """The bytes that are on the disk; what an earlier run had fetched counts as soon as it is seen."""
        return self._complete + self._current

    def ready(self, path: Path) -> bool:
        """True if the file is there. Raises the thread's OSError if it never will be."""
        arrived = self._arrived[path]
        if arrived.done():
            arrived.result()
        return arrived.done()

    def release(self, path: Path) -> None:
        """Take note that a file is done with."""
        if self.delete:
            remove(path)
        self._room.release()

    def close(self) -> None:
        """Stop fetching; what has arrived of a file is kept, and the next download resumes there."""
        self._stop.set()
        self._room.release()
        self._thread.join(2.0)

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        for path, (file, folder) in self.files.items():
            self._room.acquire()
            if self._stop.is_set():
                return
            try:
                download_file(file, folder, self._note, self._stop)
            except web.Stopped:
                return
            except BaseException as error:  # the caller's thread raises it
                for arrived in self._arrived.values():
                    if not arrived.done():
                        arrived.set_exception(error)
                return
            self._complete, self._current = self._complete + file.size, 0
            self._arrived[path].set_result(None)

    def _note(self, done: int, _: int) -> None:
        self._current = done


TINYSHAKESPEARE = WebFile(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "tinyshakespeare.txt",
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def tinyshakespeare() -> Path:
    """Have TinyShakespeare in the user's cache, downloaded once and checked each time. Raises OSError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-data"
    path = cache / TINYSHAKESPEARE.path
    if path.exists():
        if sha256_of(path) == TINYSHAKESPEARE.sha256:
            return path
        remove(path)
    try:
        return download_file(TINYSHAKESPEARE, cache, unreachable=web.UNREACHABLE)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{error}; or put {TINYSHAKESPEARE.url} at {path}") from error
