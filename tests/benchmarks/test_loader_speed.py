"""That the loader is not slow. Floors far below what is measured: a loaded machine must not fail them."""

import time

import pytest

from benchmarks.data import dataset
from benchmarks.harness import Bench
from gpt2_data import TokenLoader

BATCH, TIME = 64, 1024
FLOOR = 20e6  # tokens a second; a quiet core of 2.5 GHz gives 200 to 300 million


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three million tokens of Python's own text."""
    return dataset(Bench(str(tmp_path_factory.mktemp("tokens")), 1, "cpu", 1))


def best_speed(batches):
    """Tokens a second in the fastest of several short runs."""
    next(batches)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        for _ in range(20):
            next(batches)
        seconds.append(time.perf_counter() - started)
    return 20 * BATCH * TIME / min(seconds)


@pytest.mark.parametrize("order", ["shuffled", "sequential", "build-nanogpt"])
def test_batches_come_fast(folder, order):
    assert best_speed(TokenLoader(folder, batch_size=BATCH, seq_len=TIME, order=order)) > FLOOR


def test_prefetched_batches_come_fast(folder):
    with TokenLoader(folder, batch_size=BATCH, seq_len=TIME).prefetch() as batches:
        assert best_speed(batches) > FLOOR
