"""Batches loaded ahead by a thread: the same ones, in buffers that stay valid as long as is said."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gpt2_data import TokenLoader


@pytest.fixture
def folder(make, texts):
    return make(texts, shard_size=1111)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    gc.collect()
    assert threading.active_count() == before


def loader_of(folder, **options):
    return TokenLoader(folder, **({"batch_size": 4, "seq_len": 50, "seed": 2} | options))


def copies(batches, count):
    return [(x.copy(), y.copy()) for _, (x, y) in zip(range(count), batches, strict=False)]


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def loaded(monkeypatch):
    """Counts the batches that any loader loads."""
    count, next_into = [], TokenLoader.next_into

    def counting(self, x, y):
        next_into(self, x, y)
        count.append(self.samples_consumed)

    monkeypatch.setattr(TokenLoader, "next_into", counting)
    return count


@pytest.mark.parametrize(
    ("depth", "options"),
    [(1, {}), (2, {"rank": 1, "world_size": 2}), (2, {"order": "build-nanogpt"}), (5, {"order": "sequential"})],
)
def test_the_batches_are_those_of_the_loader(folder, depth, options):
    expected = copies(loader_of(folder, **options), 80)
    with loader_of(folder, **options).prefetch(depth) as batches:
        assert iter(batches) is batches
        assert np.array_equal(copies(batches, 80), expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_pair_is_valid_until_the_depth_th_call_after_its_own(folder, loaded, depth):
    expected = copies(loader_of(folder), 40)
    loaded.clear()
    buffers, valid = set(), []
    with loader_of(folder).prefetch(depth) as batches:
        for call in range(30):
            valid = [*valid, next(batches)][-depth:]
            # The thread fills what it may, and then waits: `depth` batches are ready.
            ahead = depth + max(depth, call + 1)
            wait_until(lambda ahead=ahead: len(loaded) == ahead)
            time.sleep(0.002)
            assert len(loaded) == ahead
            first = call + 1 - len(valid)
            assert np.array_equal(valid, expected[first : call + 1])
            buffers |= {id(array) for array in valid[-1]}
    assert len(buffers) == 2 * 2 * depth  # a ring: nothing is allocated on the way


def test_the_state_is_where_the_consumer_is(folder, loaded):
    expected = copies(loader_of(folder), 20)
    loaded.clear()
    loader = loader_of(folder)
    with loader.prefetch(3) as batches:
        wait_until(lambda: len(loaded) == 6)
        assert loader.state() == batches.state() == loader_of(folder).state()
        for call in range(10):
            next(batches)
            state = batches.state()
            assert state == loader.state()
            assert state["samples"] == loader.samples_consumed == 4 * (call + 1)
            resumed = loader_of(folder, batch_size=2, world_size=2)
            resumed.restore(state)
            assert np.array_equal(next(resumed)[0], expected[call + 1][0][:2])
            loaded.pop()
    assert np.array_equal(copies(loader, 5), expected[10:15])  # the loader itself goes on from there
    with loader.prefetch() as batches:  # and so does another prefetch
        assert np.array_equal(copies(batches, 5), expected[15:20])


def until_error(batches):
    """The batches before an error, and its words."""
    taken = []
    with pytest.raises(ValueError) as error:
        taken.extend((x.copy(), y.copy()) for x, y in batches)
    return taken, str(error.value)


def test_an_error_comes_in_its_place_with_its_words(folder):
    plain, prefetched = (loader_of(folder, order="sequential") for _ in range(2))
    next(plain)
    os.truncate(folder / "train_000002.bin", 1524)  # 250 of its tokens are left, after 2222 of the shards before
    batches = prefetched.prefetch(2)
    next(batches)
    expected, reason = until_error(plain)
    taken, error = until_error(batches)
    assert len(taken) == len(expected) == 2472 // 200 - 1
    assert np.array_equal(taken, expected)
    assert "train_000002.bin: cut short while it was read, at token" in error == reason
    assert batches.state() == plain.state()
    with pytest.raises(ValueError, match="this prefetch is closed"):
        next(batches)


def test_buffers_are_the_callers(folder):
    arrays = []

    def allocate(shape, dtype):
        arrays.append(np.full(shape, -1, dtype))
        return arrays[-1]

    with loader_of(folder).prefetch(2, allocate) as batches:
        for _ in range(10):
            assert all(any(array is own for own in arrays) for array in next(batches))
    assert len(arrays) == 8
    batches = loader_of(folder).prefetch(2, lambda shape, dtype: np.empty(3, dtype))
    with pytest.raises(ValueError, match=r"the arrays have shapes \(3,\) and \(3,\)"):
        next(batches)
    with pytest.raises(ValueError, match="prefetch depth 0 must be 1 or more"):
        loader_of(folder).prefetch(0)


def test_a_loader_that_was_moved_meanwhile_is_noticed(folder):
    loader = loader_of(folder)
    start = loader.state()
    for use in (lambda: loader.restore(start)), (lambda: next(loader)):
        with loader.prefetch() as batches:
            next(batches)
            use()
            with pytest.raises(ValueError, match="the loader was used during a prefetch"):
                next(batches)


def test_the_thread_ends_with_the_block_an_error_close_or_the_last_reference(folder):
    def thread_runs():
        return any(thread.name.startswith("prefetch") for thread in threading.enumerate())

    with contextlib.suppress(KeyError), loader_of(folder).prefetch() as batches:
        next(batches)
        assert thread_runs()
        raise KeyError
    assert not thread_runs()
    batches = loader_of(folder).prefetch()
    batches.close()
    batches.close()
    assert not thread_runs()
    batches = loader_of(folder).prefetch()
    next(batches)
    assert thread_runs()
    del batches
    gc.collect()
    assert not thread_runs()


def test_the_thread_itself_may_find_that_nobody_needs_it(folder, monkeypatch):
    abandoned, next_into = threading.Event(), TokenLoader.next_into

    def collecting(self, x, y):
        abandoned.wait(20)
        gc.collect()
        next_into(self, x, y)

    monkeypatch.setattr(TokenLoader, "next_into", collecting)
    batches = loader_of(folder).prefetch()
    batches.itself = batches  # only the collector finds such garbage
    del batches
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("prefetch"))
    abandoned.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "import gc; batches.itself = batches; del batches"])
def test_a_process_that_closes_nothing_ends(folder, end):
    code = (
        "import sys\nfrom gpt2_data import TokenLoader\n"
        "batches = TokenLoader(sys.argv[1], batch_size=4, seq_len=50).prefetch()\n"
        f"next(batches)\n{end}"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
