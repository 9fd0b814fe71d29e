"""Files that appear whole or not at all, locks, free space, hashes, and the number of cores."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
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
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not name its file
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[str], message: str, *, shared: bool = False) -> None:
    """Lock an open file without waiting, for as long as it is open. Raises Busy if it is locked already."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(message) from None


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
