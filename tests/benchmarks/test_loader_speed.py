"""That the loader is not slow. Floors far below what is measured: a loaded machine must not fail them."""

import time

import numpy as np
import pytest

from gpt2_data import TokenLoader, tokenizer
from gpt2_data.formats import uint16
from gpt2_data.formats.manifest import Manifest, Shard, Sidecar

TOKENS, SHARDS = 1_000_000, 3
BATCH, TIME = 64, 1024
FLOOR = 20e6  # tokens a second; a quiet core of 2.5 GHz gives 200 to 300 million


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of random tokens, written without a build."""
    folder = tmp_path_factory.mktemp("tokens")
    draw, shards = np.random.default_rng(0), []
    for number in range(SHARDS):
        tokens = draw.integers(0, 50257, TOKENS, dtype=np.uint16)
        shard, docs = f"train_{number:06d}.bin", f"train_{number:06d}.docs"
        with (folder / shard).open("wb") as file:
            written = uint16.write_shard(file, TOKENS, [tokens])
        with (folder / docs).open("wb") as file:
            sidecar = uint16.write_docs(file, np.array([0]))
        sums = written.payload_sha256, written.sha256
        beside = Sidecar(docs, sidecar.bytes, sidecar.sha256)
        shards.append(Shard("train", shard, TOKENS, 1, written.bytes, int(tokens.max()), *sums, beside))
    (folder / "dataset.json").write_bytes(Manifest(tokenizer.identity(), {}, {}, tuple(shards)).to_bytes())
    return folder


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
