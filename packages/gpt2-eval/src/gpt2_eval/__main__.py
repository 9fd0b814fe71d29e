"""`python -m gpt2_eval` and `torchrun ... -m gpt2_eval` are `gpt2-eval`."""

import os
import sys

import click

from .cli import main


def run(command: click.Command, name: str) -> None:
    """A command as a program. A rank of torchrun leaves without tidying up.

    One rank of a hundred died at exit, its work done: "terminate called without an active exception", by a thread
    of torch.distributed that outlived its owner.
    """
    try:
        command(prog_name=name)
    except SystemExit as done:
        if "TORCHELASTIC_RUN_ID" not in os.environ or not isinstance(done.code, int | None):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code or 0)


if __name__ == "__main__":
    run(main, "gpt2-eval")
