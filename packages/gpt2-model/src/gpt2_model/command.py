"""What the commands of gpt2-model, gpt2-eval and gpt2-train share.

torch and other slow modules are imported only where they are used: `--help` must be quick.
"""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, TextIO, TypeVar, cast

import click

if TYPE_CHECKING:
    from datetime import timedelta

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
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
FIRST_WORD, NEXT_WORD = 3.0, 10.0  # seconds before a rank says for whom it waits, and between two such lines
GRACE = 2.0  # seconds in which ranks that were started together meet, though a signal came
_LAUNCH = "start the processes with torchrun, or unset RANK and WORLD_SIZE"
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
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):  # None if there is no such stream
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
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


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks that torchrun or a cluster set; (0, 1) without them.

    Raises ValueError if the variables do not fit together.
    """
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name in numbers:
        text = os.environ.get(name, str(numbers[name]))
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{name}={text!r} in the environment is not a whole number: {_LAUNCH}")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        others = f"WORLD_SIZE={size}" if "WORLD_SIZE" in os.environ else "no WORLD_SIZE"
        raise ValueError(f"RANK={rank} and {others} in the environment: {_LAUNCH}")
    return rank, size


def join_ranks(
    backend: str, patience: "timedelta", name: str = "gpt2", stop: Callable[[], bool] = lambda: False
) -> bool:
    """Join torch's process group once all ranks are there, and say meanwhile for whom this one waits.

    A signal ends the waiting, which is Python's: torch's own, in C++, answers none for ten minutes. Where a signal
    only makes `stop` true, ranks that are about to meet still do, so as to end together; False says that they did
    not. Raises ValueError if the environment does not say where to meet, OSError if rank 0 is gone or nobody comes
    within `patience`.
    """
    from datetime import timedelta

    import torch.distributed as dist

    rank, size = ranks()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT, rank 0's host and port: {_LAUNCH}")
    place, c10d = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)", cast(Any, dist)

    def wait(here: Callable[[], bool], whom: Callable[[], str]) -> bool:
        return _wait(here, lambda: f"rank {rank} waits for {whom()} at {place}", patience.total_seconds(), stop)

    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process answers there
    is_server = rank == 0 and not by_agent
    if not is_server and not wait(lambda: _answers(host, int(port)), lambda: "torchrun" if by_agent else "rank 0"):
        return False
    try:
        seconds = timedelta(seconds=30)  # if something else answers at this port
        store = c10d.TCPStore(host, int(port), size, is_server, seconds, wait_for_workers=False)
        # torchrun (2.13) restarts workers with the store in which the dead ones left their addresses: the first
        # worker connects to one of these, and is refused. On several nodes the agents count restarts differently,
        # so there torchrun itself must be told to make new stores: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if by_agent and os.environ.get("GROUP_WORLD_SIZE") == "1":
            name = f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = c10d.PrefixStore(name, store)
        keys = [f"rank {number}" for number in range(size)]
        store.set(keys[rank], "")
        if not wait(lambda: store.check(keys), lambda: _missing(store, keys)):
            return False
    except RuntimeError as error:
        raise OSError(f"rank {rank} cannot meet the others at {place}: {one_line(error)[:200]}") from None
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    return True


def _wait(here: Callable[[], bool], words: Callable[[], str], patience: float, stop: Callable[[], bool]) -> bool:
    """Wait until `here` is true, and say so now and then; False if `stop` became true before."""
    began = time.monotonic()
    next_word = began + FIRST_WORD
    while not here():
        now = time.monotonic()
        if stop() and now - began > GRACE:
            return False
        if now - began > patience:
            raise OSError(f"{words()}: in vain for {patience:.0f} s")
        if now > next_word and os.environ.get("LOCAL_RANK", "0") == "0":  # one of each machine
            next_word = now + NEXT_WORD
            with suppress(OSError, ValueError):  # nobody may be listening
                print(words(), file=sys.stderr, flush=True)
        time.sleep(0.05)
    return True


def _answers(host: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((host, port), timeout=1.0).close()
        return True
    except OSError:  # perhaps its name is not known yet, as in a cluster whose machines are starting
        return False


def _missing(store: Any, keys: list[str]) -> str:
    """Return "3 of 8 ranks (rank 1, rank 2, rank 5)"; of many only the first."""
    names = [key for key in keys if not store.check([key])]
    return f"{len(names)} of {len(keys)} ranks ({', '.join(names[:8])}{', ...' * (len(names) > 8)})"


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
    with (folder / ".lock").open("a+") as file:
        _lock(file, folder, shared=False)
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
