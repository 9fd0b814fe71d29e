"""Faults that a test plants in the process of a run, before gpt2-train begins; see fork_server.Child.

What is patched are names of torch, os and shutil, and the forward pass of the public model; where a run stands is
read from its metrics.jsonl. Nothing in the product knows of it.
"""

import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import safetensors.torch
import torch

from gpt2_eval.loss import bytes_per_token
from gpt2_model import GPT

bytes_per_token()  # kept, as the tokenizer is: reading the vocabulary takes longer than thirty steps


def plant(faults):
    """Call each (name of a function here, its arguments).

    `rank` among the arguments: on that rank alone; `life`: only in that run of torchrun's restarts, from 0.
    """
    for name, options in faults:
        rank, life = options.pop("rank", None), options.pop("life", None)
        if rank in (None, this_rank()) and life in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
            globals()[name](**options)


def this_rank() -> int:
    return int(os.environ.get("RANK", 0))


def act(what):
    """Do what a fault does: a signal to this process, a hang, an error."""
    if what == "sleep":
        time.sleep(1000)
    elif what == "pause":
        time.sleep(1)
    elif what == "hold the GIL":
        ctypes.PyDLL(None).sleep(1000)
    elif what == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif what == "bug in an exchange":
        torch.distributed.all_reduce(torch.ones(1), async_op=True)
        act("bug")
    elif what == "out of memory":
        torch.empty(2**60)  # torch's own error
    elif what == "bug":
        raise RuntimeError("planted")
    elif what == "exit":
        os._exit(77)
    elif what == "wait for step 9":
        while now() <= 9:
            time.sleep(0.001)
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
    """Return the run's folder, as the command line names it."""
    return Path(sys.argv[sys.argv.index("--out") + 1])


def rows(field) -> list[dict]:
    """Return the last rows of metrics.jsonl that have a field."""
    path = out() / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines[-20:]) if field in row]


def now() -> int:
    """Return the update that is being computed, from 1: right from the backward pass on, and in the first forward.

    It comes after the last row of metrics.jsonl, which rank 0 writes before the update begins.
    """
    return 1 + max((row["step"] for row in rows("loss")), default=0)


def in_forward():
    """Return a function that says, in a forward pass, in which update it is."""
    last = []
    wrap(torch.nn.utils, "get_total_norm", before=lambda *_: last.append(now()))
    return lambda: last[-1] + 1 if last else now()


def follow_steps(reached):
    """Call reached(step) in the middle of each update, between its gradients and what is made of them."""
    wrap(torch.nn.utils, "get_total_norm", before=lambda *_: reached(now()))


def at(step, do):
    follow_steps(lambda number: do() if number == step else None)


def once(number, condition, do):
    """Return a function that calls `do` when `condition` of its arguments is true for the `number`th time."""
    seen = iter(range(1, 10**9))
    return lambda *arguments: do() if condition(*arguments) and next(seen) == number else None


def in_update(step, do):
    at(step, lambda: act(do))


def in_evaluation(number, do):
    """In the middle of the run's `number`th evaluation, as the model leaves its training mode."""

    def begins(module, mode=True):
        return isinstance(module, GPT) and not mode and len(rows("val_loss")) == number - 1

    wrap(torch.nn.Module, "train", before=once(1, begins, lambda: act(do)))


def in_save(number, do, file="trainer.json"):
    """As the `number`th checkpoint of this process comes to a file; that is in the thread which writes it."""
    due = once(number, lambda path: ".tmp-step" in path and path.endswith(f"/{file}"), lambda: act(do))
    sys.addaudithook(lambda event, words: due(str(words[0])) if event == "open" and "w" in str(words[1]) else None)


def in_log(text, do, number=1):
    """Before the `number`th row with a certain field is written."""
    wrap(os, "write", before=once(number, lambda _, data: f'"{text}": '.encode() in bytes(data), lambda: act(do)))


def before_joining(do):
    """Before the processes meet, as soon as signals are listened to: SIGUSR1 is the last of them."""
    wrap(signal, "signal", before=once(1, lambda number, _: number == signal.SIGUSR1, lambda: act(do)))


def file_events(folder, do):
    """Call `do(n)` before the n-th change below a folder: open for writing, fsync, rename, deletion."""
    numbers = iter(range(1, 10**9))
    busy, lock = threading.local(), threading.Lock()

    def event(result=None):
        if not getattr(busy, "now", False):
            busy.now = True
            with lock:
                do(next(numbers))
            busy.now = False
        return result

    names = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def hook(name, arguments):
        if name in names or (name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            # Relative to a folder's descriptor, as rmtree deletes, a name is bare.
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            if path.startswith(folder) or not os.path.isabs(path):
                event()

    sys.addaudithook(hook)
    wrap(os, "fsync", before=lambda _: event())
    wrap(safetensors.torch, "save_file", before=lambda *_: event(), after=event)


def copy_at_changes(folder, to, last=10**9):
    """Copy the folder before each of its changes: what a SIGKILL at that instant would leave."""

    def copy(number):
        if number <= last and os.path.isdir(folder):  # the first change of a new run makes it
            shutil.copytree(folder, f"{to}/{number:04d}")

    file_events(folder, copy)


def change_nothing(folder):
    """End at once, with a code of its own, if this process changes anything in a folder."""
    file_events(folder, lambda _: act("exit"))


def unsound(steps, kind, where="loss"):
    """The loss of some updates times NaN, Inf or a number; or one element of one gradient."""
    step = in_forward() if where == "loss" else now

    def spoil_loss(result):
        logits, loss = result
        return (logits, loss * float(kind)) if torch.is_grad_enabled() and step() in steps else result

    def spoil_gradient(gradients, *_):
        if step() in steps:
            gradients[3].view(-1)[1] = float(kind)

    if where == "loss":
        wrap(GPT, "forward", after=spoil_loss)
    else:
        wrap(torch.nn.utils, "get_total_norm", before=spoil_gradient)


def unsound_weight(step):
    """An update makes one weight NaN, though its loss and gradient are finite."""

    def spoil(optimizer):
        if now() == step:
            optimizer.param_groups[0]["params"][0].data.view(-1)[5] = float("nan")

    wrap(torch.optim.AdamW, "step", before=spoil)


def record_tokens(path):
    """A line for each micro-batch that an update takes: step, and the tokens of each of its rows."""
    step = in_forward()

    def note(_model, x, y=None):
        # The pass before the first step is over nothing in particular.
        if torch.is_grad_enabled() and x.any():
            with open(f"{path}.{this_rank()}", "a") as file:
                file.writelines(f"{step()} {row}\n" for row in torch.cat([x, y[:, -1:]], 1).tolist())

    wrap(GPT, "forward", before=note)


def clock_jumps(step):
    """From a step on the wall clock is a day back."""
    back = []
    wrap(time, "time", after=lambda seconds: seconds - 86400 * len(back))
    wrap(time, "time_ns", after=lambda ns: ns - 86400 * 10**9 * len(back))
    at(step, lambda: back.append(1))


def move_folder(step, to):
    at(step, lambda: os.rename(out(), to))


def stuck_folder(text, code):
    """Folders with a text in their path cannot be removed, nor renamed if it is of the name itself."""
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def path_of(name, folder=None):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder else "", os.fspath(name)) + "/"

    def refuse(name, *, dir_fd=None):
        if text in path_of(name, dir_fd):
            raise error
        return remove(name, dir_fd=dir_fd)

    def refuse_rename(old, new, **options):
        if "/step" in text and text in path_of(old):
            raise error
        return rename(old, new, **options)

    remove, rename = os.rmdir, os.rename
    os.rmdir, os.rename = refuse, refuse_rename


def broken_samples():
    """Generation fails: whatever asks for the next token of one row at a time."""
    from gpt2_train import loop

    loop.stream = lambda *_, **__: act("bug")


def broken_validation(number):
    """The process's `number`th batch of validation tokens cannot be read, as if the shard were gone."""
    from gpt2_data import Dataset

    def gone():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "val_000000.bin")

    wrap(Dataset, "read", before=once(number, lambda _, split, *__: split == "val", gone))


def no_descriptors(step):
    at(step, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)))


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


def bad_disk(number):
    """The disk flips a bit of the weights of the `number`th checkpoint, once it has been told to keep them."""
    paths = []

    def flip(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.name == "model.safetensors" and ".tmp-step" in str(path):
            paths.append(path)
            if len(paths) == number:
                content = bytearray(path.read_bytes())
                content[-5] ^= 4
                path.write_bytes(content)

    wrap(os, "fsync", before=flip)


def little_room(free):
    wrap(shutil, "disk_usage", after=lambda usage: usage._replace(free=free))


def no_access(path):
    """The superuser may write anywhere: os.access says what it would to others."""
    real = os.access
    os.access = lambda where, mode, **more: os.fspath(where) != path and real(where, mode, **more)


def closed_stderr():
    """Nobody reads what the run says."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)


def nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def slow_steps(seconds):
    """Each update takes so long, that a signal finds the run at work."""
    follow_steps(lambda _: time.sleep(seconds))


def without_torch():
    """Importing torch anew is an error: what follows must be refused before that."""
    sys.modules.pop("gpt2_train.loop", None)
    sys.modules["gpt2_train.loop"] = None


def unlike_versions():
    """Another torch and Python than the ones the checkpoint was written by."""
    import platform

    torch.__version__ = "9.9.9"
    platform.python_version = lambda: "3.99.0"


def trace_exchange(folder):
    """Leave gradients-RANK.pt of the first step in a folder, and trace-RANK.json of the second; then end the run.

    In the first step DDP tells all ranks in what order gradients come. The model is compiled at once and outside
    of DDP, as where micro-batches are tried on a GPU. Any backend gets graphs cut for DDP; aot_eager is quick.
    """
    compile_model, tracing = torch.compile, torch.profiler.profile(record_shapes=True)

    def note_gradients(gradients):
        if now() == 1:
            torch.save([gradient.clone() for gradient in gradients], f"{folder}/gradients-{this_rank()}.pt")

    def note_step(_):
        if now() == 1:
            tracing.start()
        elif now() == 2:
            tracing.stop()
            tracing.export_chrome_trace(f"{folder}/trace-{this_rank()}.json")
            act("exit")

    def compile_early(model, **options):
        compiled = compile_model(model, backend="aot_eager", **options)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        compiled(tokens, tokens.clone(), return_logits=False)[1].backward()
        model.zero_grad(set_to_none=True)
        return compiled

    torch.compile = compile_early
    wrap(torch.nn.utils, "get_total_norm", before=note_gradients)
    wrap(torch.optim.AdamW, "step", before=note_step)


def count_graphs(path):
    follow_steps(lambda _: Path(path).write_text(str(torch._dynamo.utils.counters["stats"]["unique_graphs"])))


def agree_on_micro_batches(path, limits):
    """Choose a micro-batch on two ranks, for each pair of the numbers of rows that fit on them."""
    from gpt2_train import TrainConfig, distributed
    from gpt2_train.memory import choose_micro_batch

    world = distributed.start("cpu")
    config = TrainConfig(batch_tokens=48 * 32, seq_len=32, model={"n_layer": 1, "n_head": 1, "n_embd": 8})

    def choose(fits):
        def try_one(number):
            if number > fits[world.rank]:
                raise torch.OutOfMemoryError

        return choose_micro_batch(config, world, try_one)

    Path(f"{path}.{world.rank}").write_text(json.dumps(list(map(choose, limits))))
    distributed.stop(world)
