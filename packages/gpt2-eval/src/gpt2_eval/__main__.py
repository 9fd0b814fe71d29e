"""`python -m gpt2_eval` and `torchrun ... -m gpt2_eval` are `gpt2-eval`."""

from .cli import main

main(prog_name="gpt2-eval")
