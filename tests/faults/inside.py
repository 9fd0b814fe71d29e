"""Faults that a test plants in the process of a run, before gpt2-train begins; see ForkServer.start.

Each runs on the rank asked for, or on all. What is patched are names of torch and os, and functions of the product
that are to fail; where a run stands is read from its metrics.jsonl. Nothing in the product knows of it.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch

RANK = int(os.environ.get("RANK", 0))


def act(what):
    """Do what a fault does: a signal to this process, a hang, an error."""
    if what == "sleep":
        time.sleep(1000)
    elif what == "hold the GIL":
        ctypes.PyDLL(None).sleep(1000)
    elif what == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif what == "out of memory":
        torch.empty(2**60)  # torch's own error
    elif what == "bug":
        raise RuntimeError("planted")
    else:
        os.kill(os.getpid(), getattr(signal, what))


def wrap(module, name, before=None, after=None):
    """Call `before(*arguments)` before module.name, and pass what it returned through `after`."""
    real = getattr(module, name)

    def wrapped(*arguments, **options):
        if before is not None:
            before(*arguments)
        result = real(*arguments, **options)
        return result if after is None else after(result)

    setattr(module, name, wrapped)


def out() -> Path:
    """The run's folder, as the command line names it."""
    return Path(sys.argv[sys.argv.index("--out") + 1])


def now() -> int:
    """The update that is being computed, counted from 1: the one after the last row of metrics.jsonl.

    Rank 0 writes a row before it begins the next update, and no rank gets through a backward pass without it: so
    this holds from the backward pass on, and in the first forward of a process.
    """
    rows = out() / "metrics.jsonl"
    lines = rows.read_bytes().split(b"\n")[:-1] if rows.exists() else []
    steps = [row["step"] for row in map(json.loads, lines[-20:]) if "loss" in row]
    return 1 + max(steps, default=0)


def in_forward():
    """Return a function that says, in a forward pass, in which update it is."""
    last = []
    wrap(torch.nn.utils, "get_total_norm", before=lambda *_: last.append(now()))
    return lambda: last[-1] + 1 if last else now()


def follow_steps(reached):
    """Call reached(step) in the middle of each update, between its gradients and what is made of them."""
    wrap(torch.nn.utils, "get_total_norm", before=lambda *_: reached(now()))


def in_update(step, do, rank=None, life=None):
    """In the middle of an update; `life`: only in that run of torchrun's restarts, counted from 0."""
    if rank not in (None, RANK) or life not in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
        return
    follow_steps(lambda number: act(do) if number == step else None)


def in_evaluation(number, do, rank=None, life=None):
    """In the middle of the `number`th evaluation of this process."""
    if rank not in (None, RANK) or life not in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
        return
    from gpt2_train import loop

    calls = iter(range(1, 10**6))
    wrap(loop, "evaluate_loss", before=lambda *_: act(do) if next(calls) == number else None)


def in_save(number, do, file="trainer.json", rank=None, life=None):
    """As the `number`th checkpoint of this process comes to a file; that is in the thread which writes it."""
    if rank not in (None, RANK) or life not in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
        return
    seen = iter(range(1, 10**6))

    def hook(event, arguments):
        if event != "open" or "w" not in str(arguments[1]):
            return
        path = str(arguments[0])
        if ".tmp-step" in path and path.endswith(f"/{file}") and next(seen) == number:
            act(do)

    sys.addaudithook(hook)


def in_log(text, do, number=1):
    """Before the `number`th row with a certain field is written."""
    seen = iter(range(1, 10**6))

    def note(_descriptor, data):
        if f'"{text}": '.encode() in bytes(data) and next(seen) == number:
            act(do)

    wrap(os, "write", before=note)


def before_joining(do, rank=None):
    """Before the processes meet."""
    if rank in (None, RANK):
        from gpt2_train import distributed

        wrap(distributed, "find_device", before=lambda *_: act(do))


def file_events(folder, do, first=1, last=10**9):
    """Call `do(n)` before the n-th change of the run's folder: open for writing, fsync, rename, deletion."""
    count = iter(range(1, 10**9))
    busy = threading.local()

    def event():
        if getattr(busy, "now", False):
            return
        busy.now = True
        number = next(count)
        if first <= number <= last:
            do(number)
        busy.now = False

    names = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def hook(name, arguments):
        if name in names or (name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            # Relative to a folder's descriptor, as rmtree deletes, a name is bare.
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            if path.startswith(folder) or not os.path.isabs(path):
                event()

    sys.addaudithook(hook)
    wrap(os, "fsync", before=lambda _: event())
    import safetensors.torch

    wrap(safetensors.torch, "save_file", before=lambda *_: event(), after=lambda result: (event(), result)[1])


def kill_at_change(folder, number):
    """SIGKILL before the n-th change of the run's folder."""
    file_events(folder, lambda _: os.kill(os.getpid(), signal.SIGKILL), number, number)


def observe_changes(folder, report):
    """Before every change of the run's folder, write a line: which checkpoints are good at that instant."""
    from gpt2_train import checkpoint

    lock = threading.Lock()

    def look(number):
        with lock, open(report, "a") as file:
            good = [p.name for p in checkpoint.checkpoints(Path(folder)) if not checkpoint.verify_checkpoint(p)]
            file.write(f"{number} {','.join(good)}\n")

    file_events(folder, look)


def unsound(steps, kind, where="loss", rank=None):
    """The loss of some updates times NaN, Inf or a number; or one element of one gradient."""
    if rank not in (None, RANK):
        return
    from gpt2_train import loop

    factor = float(kind)
    if where == "loss":
        step = in_forward()
        wrap(loop, "loss_of", after=lambda loss: loss * factor if step() in steps else loss)
    else:

        def spoil(gradients, *_):
            if now() in steps:
                gradients[3].view(-1)[1] = factor

        wrap(torch.nn.utils, "get_total_norm", before=spoil)


def dump_state(folder, steps):
    """SHA-256 of weights and AdamW's state before each of some updates, and after all, as FOLDER/RANK-STEP."""
    import hashlib

    from gpt2_train import loop
    from gpt2_train.optimizer import own_state

    runs = []
    wrap(loop, "set_up", after=lambda run: (runs.append(run), run)[1])

    def dump(step):
        if step in steps:
            run, digest = runs[0], hashlib.sha256()
            for name, tensor in (*run.model.named_parameters(), *own_state(run.model, run.optimizers).items()):
                digest.update(name.encode() + tensor.detach().numpy().tobytes())
            with open(f"{folder}/{RANK}-{step}", "w") as file:
                file.write(digest.hexdigest())

    follow_steps(dump)


def record_tokens(path):
    """A line for each micro-batch that an update takes: step, and the tokens of each of its rows."""
    from gpt2_train import loop

    step = in_forward()

    def note(*arguments):
        x, y = arguments[-2:]
        if not x.any():  # the pass before the first step, over nothing in particular
            return
        with open(f"{path}.{RANK}", "a") as file:
            for row in torch.cat([x, y[:, -1:]], 1).tolist():
                file.write(f"{step()} {row}\n")

    wrap(loop, "loss_of", before=note)


def clock_jumps(step):
    """From a step on the wall clock is a day back."""
    real, real_ns = time.time, time.time_ns
    back = {"s": 0}
    time.time = lambda: real() - back["s"]
    time.time_ns = lambda: real_ns() - back["s"] * 10**9
    follow_steps(lambda number: back.update(s=86400) if number == step else None)


def in_step(step, call, arguments, rank=None):
    """Call a function of `os` or `shutil`, by name, as an update begins."""
    import shutil

    if rank in (None, RANK):
        function = getattr(os, call, None) or getattr(shutil, call)
        follow_steps(lambda number: function(*arguments) if number == step else None)


def limit_at(step, size):
    """From a step on no file may grow beyond `size` bytes: a write fails in the middle, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    follow_steps(
        lambda number: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)) if number == step else 0
        )
    )


def fill_disk(step, path, clear=0):
    """From a step on the disk has room for rows of metrics but for no checkpoint; from another on, it has."""

    def reached(number):
        if number == clear:
            os.unlink(path)
        elif number >= step and (number < clear or not clear):  # at each step: rotation makes room
            for thread in threading.enumerate():
                if thread.name == "saver":  # what it writes and removes meanwhile would make the room's size wrong
                    thread.join()
            disk = os.statvfs(os.path.dirname(path))
            with open(path, "ab") as file:
                room = disk.f_bavail * disk.f_frsize - 60_000
                if room > 0:
                    os.posix_fallocate(file.fileno(), file.tell(), room)

    follow_steps(reached)


def little_room(free):
    """The disk says that so many bytes are free."""
    import shutil

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=free)


def no_access(path):
    """The superuser may write anywhere: os.access says what it would to others."""
    real = os.access
    os.access = lambda where, mode, **more: os.fspath(where) != path and real(where, mode, **more)


def no_descriptors(step):
    """From a step on no file can be opened."""
    follow_steps(lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)) if number == step else None)


def closed_stderr():
    """Nobody reads what the run says."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)


def failing_writer(number, do):
    """The `number`th checkpoint of this process fails in its thread."""
    from gpt2_train import checkpoint

    calls = iter(range(1, 10**6))
    wrap(checkpoint, "write_checkpoint", before=lambda *_: act(do) if next(calls) == number else None)


def slow_steps(seconds):
    """Each update takes so long, that a signal finds the run at work."""
    follow_steps(lambda _: time.sleep(seconds))


def without_torch():
    """Importing torch anew is an error: what follows must be refused before that."""
    for name in [name for name in sys.modules if name.startswith("gpt2_train.loop")]:
        del sys.modules[name]
    sys.modules["gpt2_train.loop"] = None


def unlike_versions():
    """Another torch and Python than the ones the checkpoint was written by."""
    from gpt2_train import checkpoint

    checkpoint.versions = lambda: {"python": "3.99.0", "torch": "9.9.9"}
