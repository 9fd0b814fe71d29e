"""Runs of gpt2-train as forks of one process that has imported torch: a start takes 0.1 s instead of five."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import traceback
from importlib import import_module
from multiprocessing import forkserver, get_context
from unittest.mock import patch

CONTEXT = get_context("forkserver")
# `inside` reads the vocabulary, too; the first optimizer imports _dynamo, and a child's __main__ pytest.
CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "gpt2_train.loop", "gpt2_train.cli", "inside"])


def environment() -> dict[str, str]:
    """Return variables for a process that imports what the tests do, on one thread: runs are as many as cores."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": path}


class Child:
    """`gpt2-train ARGUMENTS` in a fork, with stdout and stderr appended to `log`.

    `faults` are (function of the module `inside`, its arguments), called in the new process before the command, or
    alone if `arguments` is None.
    """

    def __init__(self, arguments, log, faults=(), **env: str) -> None:
        with patch.dict(os.environ, environment()):
            forkserver.ensure_running()
        self.log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self._process = CONTEXT.Process(target=_become, args=(arguments, str(log), faults, env), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return the exit code, -n for a signal; None if it still runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def wait(self, seconds: float = 60.0) -> int:
        """Return the exit code; raise TimeoutError, after killing it."""
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
            os.kill(self.pid, number)

    def output(self) -> str:
        """Return what it wrote, without what the runs before it wrote to the same log."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace") if self.log.exists() else ""


def _become(arguments: list[str] | None, log: str, faults, env: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has it ignored
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    os.environ.update(env)
    faulthandler.register(signal.SIGUSR2, file=2)
    sys.argv = ["gpt2-train", *(arguments or [])]
    code = 0
    try:
        import_module("inside").plant(faults)
        if arguments is not None:
            import_module("gpt2_train.cli").main(arguments, prog_name="gpt2-train")
    except SystemExit as done:
        # The error and its frames stay: a process group that is freed with them may wait for ever for its threads.
        code, _error = done.code, done
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():  # as Python does, which then takes half a second to tidy up all of torch
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def start_ranks(arguments, log, ranks: int, faults=(), **env: str) -> list[Child]:
    """Begin a run on one process or more, as torchrun would; the log of rank r > 0 is LOG.r."""
    logs = [log, *(log.with_name(f"{log.name}.{rank}") for rank in range(1, ranks))]
    return [
        Child(arguments, log, faults, **of_rank, **env)
        for log, of_rank in zip(logs, rank_variables(ranks), strict=True)
    ]


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun would set for each process; none for a single one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
