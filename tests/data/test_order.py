"""The order of samples."""

import itertools
import random

import numpy as np
import pytest

from gpt2_data import TokenLoader, open_dataset
from gpt2_data.order import build_nanogpt_starts, mix, permute


def test_is_a_bijection_of_every_small_set():
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**20, 2**20 + 1, 9_720_692, 2**40 - 1, 2**62])
def test_large_sets_stay_inside_and_distinct(n):
    indices = np.concatenate([np.arange(min(n, 50_000)), np.arange(n - 1000, n)])
    result = permute(indices, n, seed=3)
    assert len(set(result.tolist())) == len(set(indices.tolist()))
    assert result.min() >= 0
    assert result.max() < n


def test_values_are_frozen():
    # A change here changes which sample every run sees when.
    assert permute(np.arange(10), 10, 0).tolist() == [4, 6, 2, 3, 5, 8, 0, 1, 7, 9]
    assert permute([0, 1, 2, 999_999], 1_000_000, 42).tolist() == [698766, 996022, 878936, 368038]
    assert mix(0, 0) == 0xA706DD2F4D197E6F
    assert mix(-1, 5) == 0x4E8A6DB52492127B


def test_seeds_differ_and_orders_look_random():
    orders = {tuple(permute(np.arange(50), 50, seed).tolist()) for seed in range(200)}
    assert len(orders) == 200
    shuffled = permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(np.arange(100_000), shuffled)[0, 1]) < 0.02
    assert abs(np.mean(np.diff(shuffled) > 0) - 0.5) < 0.01
    first = np.bincount([int(permute(0, 7, seed)) for seed in range(7000)], minlength=7)
    assert first.min() > 850


def test_indices_outside_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        permute([5], 5, 0)


class DataLoaderLite:
    """build-nanogpt's loader, line by line, on arrays in place of files."""

    def __init__(self, shards, B, T, process_rank, num_processes):
        self.shards, self.B, self.T = shards, B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.current_shard = 0
        self.tokens = self.shards[self.current_shard]
        self.current_position = self.B * self.T * self.process_rank

    def next_batch(self):
        B, T = self.B, self.T
        buf = self.tokens[self.current_position : self.current_position + B * T + 1]
        x = (buf[:-1]).reshape(B, T)  # inputs
        y = (buf[1:]).reshape(B, T)  # targets
        # advance the position in the tensor
        self.current_position += B * T * self.num_processes
        # if loading the next batch would be out of bounds, advance to next shard
        if self.current_position + (B * T * self.num_processes + 1) > len(self.tokens):
            self.current_shard = (self.current_shard + 1) % len(self.shards)
            self.tokens = self.shards[self.current_shard]
            self.current_position = B * T * self.process_rank
        return x, y


def test_build_nanogpts_order_is_its_own():
    draw = random.Random(5)
    apart = 0
    for B, T, W in itertools.product((1, 2, 3, 5), (1, 4, 7), (1, 2, 3, 8)):
        step = B * T * W
        # At the borders, where one token decides, and anywhere.
        near = [step * k + extra for k in (1, 2, 3, 4) for extra in (1, 2, B * T, B * T + 1, step - 1, step)]
        sizes = [n for n in draw.sample(near, 5) if n > step]
        sizes += [draw.randint(step + 1, 9 * step) for _ in range(3)]
        bounds = np.cumsum([0, *sizes])
        shards = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]  # each token is its place in the stream
        left_first_shard = set()
        for rank in range(W):
            reference = DataLoaderLite(shards, B, T, rank, W)
            starts = build_nanogpt_starts(np.arange(120), sizes, B, T, rank, W)
            for start in starts:
                x, y = reference.next_batch()
                assert np.array_equal(x.ravel(), np.arange(start, start + B * T))
                assert np.array_equal(y.ravel(), np.arange(start, start + B * T) + 1)
            left_first_shard.add(int(np.argmax(starts >= bounds[1])))
            # A number alone tells where: nothing is counted up.
            assert build_nanogpt_starts(77, sizes, B, T, rank, W) == starts[77]
        assert (np.diff(starts) < 0).any() or sum(sizes) > 100 * step  # several epochs
        apart += len(left_first_shard) > 1
    assert apart >= 5  # the ranks do not all leave a shard at the same step, and ours neither


def test_build_nanogpts_batches_from_a_dataset(make, texts):
    folder = make(texts, shard_size=997)
    dataset = open_dataset(folder)
    sizes = [shard.tokens for shard in dataset.manifest.split("train")]
    bounds = np.cumsum([0, *sizes]).tolist()
    shards = [dataset.read("train", a, b) for a, b in itertools.pairwise(bounds)]
    assert len(shards) > 5
    for B, T, W in (3, 16, 1), (2, 20, 4), (1, 50, 2):
        epoch = sum(sizes) // (B * T * W)
        for rank in range(W):
            reference = DataLoaderLite(shards, B, T, rank, W)
            options = {"rank": rank, "world_size": W, "order": "build-nanogpt"}
            loader, other = (TokenLoader(folder, "train", B, T, **options) for _ in range(2))
            for _ in range(2 * epoch + 5):
                other.restore(loader.state())  # at every step
                expected = reference.next_batch()
                for batch in next(loader), next(other):
                    assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_build_nanogpts_order_refuses_what_it_cannot_go_on_from(make, texts):
    folder = make(texts, shard_size=1000)
    options = {"batch_size": 2, "seq_len": 20, "world_size": 2, "order": "build-nanogpt"}
    loader = TokenLoader(folder, rank=1, **options)
    next(loader)
    state = loader.state()
    for field, other in ("batch_size", 1), ("world_size", 4):
        message = f"has {field} 2, this loader {other}, which the order build-nanogpt depends on"
        with pytest.raises(ValueError, match=message):
            TokenLoader(folder, **options | {field: other}).restore(state)
    with pytest.raises(ValueError, match="an impossible number of samples: 3"):
        loader.restore(state | {"samples": 3})
    # Here the reference would end in an error in mid-run: a rank's batch is not in the shard.
    with pytest.raises(ValueError, match=r"train_000021\.bin has 862 tokens, and .* needs 1,001 in each shard"):
        TokenLoader(folder, batch_size=10, seq_len=25, world_size=4, order="build-nanogpt")
    with pytest.raises(ValueError, match="reshape"):
        DataLoaderLite([np.arange(1000)], 10, 25, 3, 4).next_batch()
