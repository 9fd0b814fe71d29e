"""The order of samples."""

import numpy as np
import pytest

from gpt2_data.order import mix, permute


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
