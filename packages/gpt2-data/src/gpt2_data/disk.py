"""Files that appear whole or not at all, locks, free space, hashes, and the number of cores."""

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO


class Busy(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def write_whole(path: Path, temporary_folder: Path | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears as `path` whole and on the disk, or not at all.

    Args:
        temporary_folder: where the file is written, in the same file system; None: beside `path`. A killed process
            leaves files there that match *.tmp-*.
        durable: False skips fsync: after a power loss the file may hold anything, so its reader must check a hash.
    """
    # The name is random, since several machines may write at once.
    temporary = (temporary_folder or path.parent) / f"{path.name}.tmp-{secrets.token_hex(8)}"
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                sync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not name its file
        raise
    if durable:
        sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, if its file system can: some network disks refuse every fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:  # EBADF: of a folder that was opened for reading
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss, if its file system can."""
    with contextlib.suppress(PermissionError):  # one that may be written to, but not listed
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: IO[str], message: str | None, *, shared: bool = False) -> None:
    """Lock an open file for as long as it is open. If it is locked already, wait, or raise Busy with `message`.

    On a file system without locks, a warning names the folder, and the file stays unlocked.
    """
    import fcntl  # not on Windows

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if message else 0))
    except BlockingIOError:
        raise Busy(message) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _warn_of_no_lock(Path(file.name).parent, error.strerror)


@functools.cache  # said once
def _warn_of_no_lock(folder: Path, reason: str | None) -> None:
    advice = "see to it that no other process writes there"
    print(f"warning: {folder} cannot be locked ({reason}): {advice}", file=sys.stderr)


def cache_folder() -> Path:
    """Return the package's folder in the user's cache, or raise OSError if there is no home."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.startswith("~"):
        raise OSError("there is no home folder to keep the download in: set XDG_CACHE_HOME")
    return Path(cache, "gpt2-data")


def check_space(folder: Path, needed: int, option: str) -> None:
    """Raise OSError if less than `needed` bytes are free; `option` is the option that names the folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder.parent}: about {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free: "
            f"make room or choose another {option}"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cores() -> int:
    """Return how many cores this process may use: in a container or a job perhaps fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
