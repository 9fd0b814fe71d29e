"""`python -m gpt2_eval` and `torchrun ... -m gpt2_eval` are `gpt2-eval`."""

from gpt2_eval.cli import main
from gpt2_model.command import run_command

if __name__ == "__main__":
    run_command(main, "gpt2-eval")
