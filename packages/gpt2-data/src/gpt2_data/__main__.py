"""`python -m gpt2_data` is `gpt2-data`."""

from gpt2_data.cli import main

if __name__ == "__main__":  # not in a worker that was spawned
    main(prog_name="gpt2-data")
