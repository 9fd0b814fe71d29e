"""`python -m gpt2_model` is `gpt2-model`."""

from gpt2_model.cli import main
from gpt2_model.command import run_command

if __name__ == "__main__":
    run_command(main, "gpt2-model")
