"""`python -m gpt2_train` and `torchrun ... -m gpt2_train` are `gpt2-train`."""

from gpt2_model.command import run_command
from gpt2_train.cli import main

if __name__ == "__main__":
    run_command(main, "gpt2-train")
