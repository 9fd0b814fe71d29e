"""Lines for a person or a log while nothing is finished."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 10.0  # between two lines


@contextmanager
def speaking(what: str | Callable[[], str]) -> Iterator[None]:
    """Write to stderr what goes on, every ten seconds while the block runs; under torchrun, on rank 0."""
    over, start = threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(SECONDS):
            text = what() if callable(what) else f"{what}: {time.monotonic() - start:.0f} s"
            print(text, file=sys.stderr, flush=True)

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
