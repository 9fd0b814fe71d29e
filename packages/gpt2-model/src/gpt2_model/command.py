"""What the commands of gpt2-model, gpt2-eval and gpt2-train share.

torch and other slow modules are imported only where they are used: `--help` must be quick.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, TextIO, TypeVar

import click

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")


class UserPath(click.Path):
    """A path in which ~ is the home folder: no shell expands the one in --out=~/run."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class UserFile(click.File):
    """A file to read, or - for standard input; ~ is the home folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value) if isinstance(value, str) else value, param, ctx)


# A path that may also be a hub name: a shell completes it, and the command checks it later.
PATH = UserPath(readable=False)
# A git-lfs pointer, which stands in a file's place, begins like this; the second spelling is an older one.
LFS_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Size(click.ParamType[int]):
    """A whole number of at least `minimum`, also written as 64k, 10M, 1.5B (decimal) or 10Mi (binary)."""

    name = "size"

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from fractions import Fraction

        text = str(value).strip().replace("_", "").replace(",", "").lower()
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmb]|[kmg]i)?", text)
        count = Fraction(match[1]) * _SUFFIXES[match[2] or ""] if match else Fraction(1, 2)
        if count.denominator != 1:
            self.fail(f"{value!r} is not a whole number such as 1000, 64k, 10M or 1.5B", param, ctx)
        if count < self.minimum:
            self.fail(f"{value!r} is too small: the smallest is {self.minimum}", param, ctx)
        return int(count)


def format_size(number: int) -> str:
    """Return a number as a person would type it: 500000 is "500k", 524288 is "512Ki", 1024 is "1024"."""
    for suffix, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3), ("Mi", 2**20), ("Ki", 2**10)):
        if number >= 10_000 and number % factor == 0:
            return f"{number // factor}{suffix}"
    return str(number)


def out_of_memory(error: BaseException) -> bool:
    """True if memory ran out: a GPU's, a Mac's (MPS), or this machine's, as torch or Python report it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in ("backend out of memory", "DefaultCPUAllocator"))


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())


def user_errors(memory_advice: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command: ValueError, OSError and a lack of memory become one line and exit status 1.

    With `--debug` they keep their traceback, as our own bugs always do. Ctrl-C ends with exit status 130.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @wraps(command)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except BrokenPipeError:  # `| head` has seen enough: click ends quietly
                raise
            except KeyboardInterrupt:
                click.echo(err=True)  # the shell's prompt begins a line of its own
                raise SystemExit(130) from None
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                message = f"out of memory: {memory_advice}" if out_of_memory(error) else one_line(error)
                ours = not out_of_memory(error) and not isinstance(error, ValueError | OSError)
                if ours or click.get_current_context().find_root().params["debug"]:
                    raise
                raise click.ClickException(message) from None

        return wrapped

    return decorate


class Program(click.Command):
    """A command whose output no terminal's encoding ends, and which Ctrl-C ends with 130 and no traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream, errors in (sys.stdout, "replace"), (sys.stderr, "backslashreplace"):  # stderr names files
            with suppress(AttributeError, OSError):  # no such stream, or another kind of file behind it
                stream.reconfigure(errors=errors)  # type: ignore[union-attr]
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


class ProgramGroup(Program, click.Group):
    """A Program with sub-commands."""


def require_posix(name: str) -> None:
    """Raise a ClickException on Windows, which lacks the locks that a command needs."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise click.ClickException(f"{name} runs on Linux and macOS; on Windows use WSL") from None


def run_command(command: click.Command, name: str) -> None:
    """Run a command as a program. Under torchrun the process exits without Python's own clean-up."""
    try:
        command(prog_name=name)
    except (SystemExit, Exception) as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(code, int | None):
            raise
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        # One rank in a hundred crashed at exit, after its work, in a thread of torch.distributed that outlived its
        # owner. Another hung forever while it freed its process group, after the other rank had been killed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def find_device(name: str) -> "torch.device":
    """Return the torch device of a name: "auto" is CUDA, else MPS, else the CPU; "cuda" is this rank's GPU."""
    import torch

    kind = name
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
        torch.empty(0, device=device).cpu()  # "meta" is a device, too, but nothing comes back from it
    except (RuntimeError, AssertionError):
        raise ValueError(f"this machine has no device {name!r}: use cpu, or auto") from None
    return device


def check_compiler(device: "torch.device", otherwise: str) -> None:
    """Let torch.compile's back end make a tiny kernel; a ValueError says in a line why it cannot.

    It takes a tenth of a second beside what any compiled program needs: its imports and, once on a machine, half a
    minute of a C++ compiler.
    """
    import torch
    from torch import _inductor  # torch.compile itself would count a graph more

    try:
        sample = torch.ones(8, device=device)
        _inductor.compile(torch.fx.symbolic_trace(lambda x: x + 1), [sample])(sample)
    except Exception as error:  # no compiler, no headers, no room for its files: these errors have no common type
        reason = str(error).strip().partition("\n")[0][:200]
        advice = f"install a C++ compiler (g++), or use {otherwise}"
        raise ValueError(f"torch.compile does not work here ({reason}): {advice}") from None


def keep_buffers() -> None:
    """Put large CPU tensors into huge pages, and keep their memory for the next one instead of giving it back.

    Call this before the first large tensor. By default each one is mapped anew and faulted in, 4 KiB at a time:
    412,000 faults, 1.1 s of a 2.9 s training step of a 7M-parameter model. With both settings a step takes 1.7 s.
    """
    import ctypes

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first large allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc has it, musl has not
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            mallopt(parameter, 2**31 - 1)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout; a terminal that cannot show UTF-8 gets escapes."""
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not utf8))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path | None:
    """Return a package's folder in the user's cache, which may not exist yet; None if the user has no home."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if cache.startswith("~") else Path(cache, name)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, if its file system can: some network disks refuse every fsync."""
    try:
        os.fsync(descriptor)
    except OSError as error:  # EBADF: of a folder that was opened for reading
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss, if its file system can."""
    with suppress(PermissionError):  # Windows cannot open folders; others may forbid to list one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is complete and on the disk; a kill before leaves the old one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)  # the error of a write does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@cache  # said once
def warn_of_no_lock(folder: Path, reason: str | None) -> None:
    """Warn that a folder's file system has no locks."""
    advice = "see to it that no other process writes there"
    click.echo(f"warning: {folder} cannot be locked ({reason}): {advice}", err=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, created if needed, during the block; a ValueError names another process that holds it."""
    import socket

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    # Another user's file can be locked, but not written.
    ours = not path.exists() or os.access(path, os.W_OK, effective_ids=True)
    with path.open("a+" if ours else "r") as file:
        _lock(file, folder, shared=False)
        if ours:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def check_unlocked(folder: Path) -> None:
    """Raise the ValueError of `locked` if another process holds the folder. Writes nothing."""
    if (folder / ".lock").exists():
        with (folder / ".lock").open() as file:
            _lock(file, folder, shared=True)


def _lock(file: TextIO, folder: Path, shared: bool) -> None:
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ValueError(f"{folder} is in use by {owner}: wait for it, or choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warn_of_no_lock(folder, error.strerror)
