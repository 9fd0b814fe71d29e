"""Runs of gpt2-train as forks of one process that has imported torch: a start takes 0.1 s instead of five."""

import faulthandler
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection


class ForkServer:
    """A process that has imported everything, and forks a run of gpt2-train when it is asked to.

    torch reads the number of its threads once, so they are set to one, for this machine has as many runs as cores.
    """

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self._connection = ours
        self._codes: dict[int, int] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"import fork_server; fork_server.serve({theirs.fileno()})"]
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()

    def start(self, arguments, log, faults=(), **env: str) -> "Child":
        """Begin `gpt2-train ARGUMENTS`, with stdout and stderr appended to `log`.

        Args:
            faults: (function of the module `inside`, its arguments), called in the new process before the command.
            env: variables of its environment.
        """
        before = log.stat().st_size if log.exists() else 0
        self._connection.send((list(arguments), str(log), list(faults), env))
        return Child(self, self._receive("pid", 60), log, before)

    def code(self, pid: int, seconds: float) -> int | None:
        """Exit code of a child, -n for a signal; None if it still runs after so many seconds."""
        until = time.monotonic() + seconds
        while pid not in self._codes and self._connection.poll(max(0.0, until - time.monotonic())):
            self._receive("code", 0)
        return self._codes.get(pid)

    def _receive(self, wanted: str, seconds: float) -> int:
        while True:
            if wanted == "pid" and not self._connection.poll(seconds):
                raise TimeoutError("the fork server does not answer")
            kind, pid, code = self._connection.recv()
            if kind == "code":
                self._codes[pid] = code
            if kind == wanted:
                return int(pid)

    def close(self) -> None:
        """End the server, and what it has started."""
        self._connection.close()
        self._process.wait()


class Child:
    """A run that the server has forked."""

    def __init__(self, server: ForkServer, pid: int, log, log_start: int) -> None:
        self.server, self.pid, self.log, self.log_start = server, pid, log, log_start

    def poll(self, seconds: float = 0.0) -> int | None:
        """Exit code, -n for a signal; None if it still runs after so many seconds."""
        return self.server.code(self.pid, seconds)

    def wait(self, seconds: float = 60.0) -> int:
        """Exit code; raises TimeoutError, after killing it."""
        code = self.poll(seconds)
        if code is None:
            self.send(signal.SIGUSR2)  # faulthandler: where is it?
            self.poll(1)
            self.send(signal.SIGKILL)
            self.poll(10)
            raise TimeoutError(f"still running after {seconds} s; its output:\n{self.output()}")
        return code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)  # no other process gets its number: the server reaps it only to say so

    def output(self) -> str:
        """What it wrote, without what the runs before it wrote to the same log."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace") if self.log.exists() else ""


def serve(descriptor: int) -> None:
    """The server's life; in a forked child, the command's."""
    for name in ("torch._dynamo", "gpt2_train.loop", "gpt2_train.cli"):  # the first optimizer imports _dynamo
        import_module(name)
    from gpt2_eval.loss import bytes_per_token

    bytes_per_token()  # kept, as the tokenizer is: reading the vocabulary takes longer than thirty steps
    gc.freeze()
    connection, children = Connection(descriptor), set[int]()
    while True:
        try:
            asked = connection.recv() if connection.poll(0.005 if children else None) else None
        except EOFError:
            break
        if asked is not None:
            pid = os.fork()
            if not pid:
                connection.close()
                _become(*asked)
            children.add(pid)
            connection.send(("pid", pid, 0))
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.remove(pid)
            connection.send(("code", pid, os.waitstatus_to_exitcode(status)))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _become(arguments: list[str], log: str, faults, env: dict[str, str]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    os.environ.update(env)
    faulthandler.register(signal.SIGUSR2, file=2)
    for name, options in faults:
        getattr(import_module("inside"), name)(**options)
    from gpt2_train.cli import main

    sys.argv = ["gpt2-train", *arguments]
    code = 0
    try:
        main(arguments, prog_name="gpt2-train")
    except SystemExit as done:
        code = done.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():  # as Python does, which then takes half a second to tidy up all of torch
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def start_ranks(server: ForkServer, arguments, log, ranks: int, faults=(), **env: str) -> list[Child]:
    """A run on one process or more, as torchrun would start them; the log of rank r > 0 is LOG.r."""
    if ranks == 1:
        return [server.start(arguments, log, faults, **env)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env}
    logs = [log, *(log.with_name(f"{log.name}.{rank}") for rank in range(1, ranks))]
    return [
        server.start(arguments, logs[rank], faults, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(ranks)
    ]
