"""`python -m gpt2_eval` and `torchrun ... -m gpt2_eval` are `gpt2-eval`."""

import os
import sys

import click

from gpt2_eval.cli import main


def run(command: click.Command, name: str) -> None:
    """A command as a program. One process of several leaves without tidying up.

    One rank of a hundred died at exit, its work done: "terminate called without an active exception", by a thread
    of torch.distributed that outlived its owner. Another hung for ever, when the other rank had been killed: while
    it freed its process group, which waited for a thread that waited for the interpreter.
    """
    try:
        command(prog_name=name)
    except SystemExit as done:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(done.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code or 0)


if __name__ == "__main__":
    run(main, "gpt2-eval")
