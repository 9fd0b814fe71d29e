"""`python -m gpt2_train` and `torchrun ... -m gpt2_train` are `gpt2-train`."""

from gpt2_model.command import run_command as run
from gpt2_train.cli import main

if __name__ == "__main__":
    run(main, "gpt2-train")
