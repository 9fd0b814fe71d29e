"""`python -m gpt2_eval` and `torchrun ... -m gpt2_eval` are `gpt2-eval`."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    try:
        main(prog_name="gpt2-eval")
    except SystemExit as done:
        if "TORCHELASTIC_RUN_ID" not in os.environ or not isinstance(done.code, int | None):
            raise
        # One rank of a hundred died at exit, its work done: "terminate called without an active exception", by a
        # thread of torch.distributed that outlived its owner. So a rank of torchrun leaves without tidying up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code or 0)
