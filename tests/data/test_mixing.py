"""Several datasets in one stream."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from gpt2_data import TokenLoader, open_dataset
from gpt2_data.order import BLOCK, apportion, integer_weights

MIXES = [[1, 1], [7, 3], [1, 4095], [1, 2, 3, 4, 5], [333, 333, 334], [10**20, 10**20 + 1, 3 * 10**17], [5]]


def test_weights_become_integers_without_a_rounding_error():
    for weights, integers in [
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.1, 0.1], [1, 1, 1]),
        ([70, 30.0], [7, 3]),
        ([Fraction(1, 3), Fraction(1, 6)], [2, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([np.float64(0.25), np.float32(0.5)], [1, 2]),
        ([1e-3, 1], [1, 1000]),
    ]:
        smallest = integer_weights(weights)
        assert [Fraction(a, smallest[0]) for a in smallest] == [Fraction(a, integers[0]) for a in integers]
        assert np.gcd.reduce(smallest) == 1


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much", None])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match=f"weight {weight!r} is not a positive number"):
        integer_weights([1, weight])


def test_a_weight_too_small_for_a_block_is_refused():
    assert integer_weights([1, BLOCK - 1]) == [1, BLOCK - 1]
    with pytest.raises(ValueError, match="weight 1 is under 1/4096 of the sum of weights, 4097: leave that"):
        integer_weights([1, BLOCK])


@pytest.mark.parametrize("weights", MIXES, ids=str)
def test_shares_are_exact_and_no_sample_of_a_source_is_left_out(weights):
    blocks, total = 6, sum(weights)
    sources, within = apportion(np.arange(blocks * BLOCK), weights, seed=4)
    for source, weight in enumerate(weights):
        chosen = sources == source
        assert np.array_equal(within[chosen], np.arange(chosen.sum()))  # each once, in its own order
        counts = chosen.reshape(blocks, BLOCK).sum(axis=1).tolist()
        for block in range(blocks):
            assert abs(counts[block] - Fraction(BLOCK * weight, total)) < 1
            assert abs(sum(counts[: block + 1]) - Fraction((block + 1) * BLOCK * weight, total)) < 1


def test_each_sample_is_known_from_its_number_alone():
    sources, within = apportion(np.arange(3 * BLOCK), [7, 3], seed=4)
    some = np.random.default_rng(0).integers(0, 3 * BLOCK, 100)
    assert np.array_equal(apportion(some, [7, 3], 4), (sources[some], within[some]))
    for number in (0, BLOCK - 1, BLOCK):
        assert np.array_equal(apportion(np.array([number]), [7, 3], 4)[1], within[[number]])
    # Far out no count has drifted.
    far = 10**14 * BLOCK
    sources, within = apportion(np.arange(far, far + BLOCK), [1, 2], 0)
    assert within[sources == 0].min() == far // 3
    assert within[sources == 1].min() == far - far // 3


def test_values_are_frozen():
    # A change here changes which sample every mixed run sees when.
    sources, within = apportion(np.arange(12), [7, 3], seed=0)
    assert sources.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert within.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]


def test_ranks_see_no_pattern():
    sources, _ = apportion(np.arange(16 * BLOCK), [1, 1], seed=1)
    for ranks in 2, 4, 8:
        shares = sources.reshape(-1, ranks).mean(axis=0)
        assert np.abs(shares - 0.5).max() < 0.03
    one, other = sources[:BLOCK], sources[BLOCK : 2 * BLOCK]
    assert abs((one == other).mean() - 0.5) < 0.05  # another order in each block
    assert abs((one[1:] == one[:-1]).mean() - 0.5) < 0.05
    assert abs((sources == apportion(np.arange(16 * BLOCK), [1, 1], seed=2)[0]).mean() - 0.5) < 0.03


@pytest.fixture
def folders(make, texts):
    return [make(texts, shard_size=1111), make(texts[:40], shard_size=500)]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_of_each_dataset_the_samples_come_as_they_would_alone(folders, order):
    options = {"batch_size": 1, "seq_len": 150, "seed": 3, "order": order}
    mixed = TokenLoader({folders[0]: 0.7, folders[1]: 0.3}, **options)
    alone = [TokenLoader(dataset.path, **options) for dataset in mixed.datasets]
    sources, _ = mixed.windows(np.arange(900))
    taken = np.bincount(sources, minlength=2).tolist()
    assert all(count > 2 * loader.num_windows[0] for count, loader in zip(taken, alone, strict=True))  # epochs
    for source in sources.tolist():
        for ours, theirs in zip(next(mixed), next(alone[source]), strict=True):
            assert np.array_equal(ours, theirs)
    in_batches = TokenLoader({folders[0]: 0.7, folders[1]: 0.3}, **options | {"batch_size": 9})
    mixed.restore(in_batches.state())
    for _ in range(100):
        x, y = next(in_batches)
        rows = [next(mixed) for _ in range(9)]
        assert np.array_equal(x, np.concatenate([row[0] for row in rows]))
        assert np.array_equal(y, np.concatenate([row[1] for row in rows]))


def test_a_mix_does_not_hang_on_names_or_on_the_order_they_stand_in(folders, tmp_path):
    one = TokenLoader({folders[0]: 2, folders[1]: 1}, batch_size=8, seq_len=60)
    (tmp_path / "moved").symlink_to(folders[0])
    other = TokenLoader({str(folders[1]): 0.5, str(tmp_path / "moved"): 1.0}, batch_size=8, seq_len=60)
    assert one.state() == other.state()
    for _ in range(20):
        assert np.array_equal(next(one), next(other))


def test_the_state_names_every_dataset_and_weight(folders, make, texts):
    third = make(texts[:30])
    loader = TokenLoader({folders[0]: 2, folders[1]: 1}, batch_size=8, seq_len=60)
    next(loader)
    state = json.loads(json.dumps(loader.state()))
    hashes = {open_dataset(folder).manifest.hash: weight for folder, weight in zip(folders, (2, 1), strict=True)}
    assert dict(zip(state["dataset"], state["weights"], strict=True)) == hashes
    for mix, field in [
        ({folders[0]: 1, folders[1]: 1}, "weights"),
        ({folders[0]: 2, third: 1}, "dataset"),
        ({folders[0]: 2, folders[1]: 1, third: 1}, "dataset"),
        (folders[0], "dataset"),
    ]:
        with pytest.raises(ValueError, match=f"the loader's state has {field} "):
            TokenLoader(mix, batch_size=8, seq_len=60).restore(state)


def test_a_mix_of_one_is_that_dataset(folders):
    one, other = TokenLoader({folders[0]: 0.3}, seq_len=60), TokenLoader(folders[0], seq_len=60)
    assert one.state() == other.state()
    assert np.array_equal(next(one), next(other))


def test_mixes_that_cannot_be(folders, tmp_path):
    (tmp_path / "again").symlink_to(folders[0])
    with pytest.raises(ValueError, match="are the same dataset: name it once"):
        TokenLoader({folders[0]: 1, tmp_path / "again": 1}, seq_len=60)
    with pytest.raises(ValueError, match="the mix contains no dataset"):
        TokenLoader({}, seq_len=60)
    with pytest.raises(ValueError, match="weight 0 is not a positive number"):
        TokenLoader({folders[0]: 1, folders[1]: 0}, seq_len=60)
    with pytest.raises(ValueError, match="the order build-nanogpt reads one dataset"):
        TokenLoader({folders[0]: 1, folders[1]: 1}, seq_len=6, batch_size=2, order="build-nanogpt")
    with pytest.raises(ValueError, match="nowhere is not a dataset"):
        TokenLoader({folders[0]: 1, tmp_path / "nowhere": 1})
    manifest = open_dataset(folders[1]).manifest
    foreign = dataclasses.replace(manifest, tokenizer=manifest.tokenizer | {"eot": 0})
    (folders[1] / "dataset.json").write_bytes(foreign.to_bytes())
    with pytest.raises(ValueError, match="foreign tokenizer: eot"):
        TokenLoader({folders[0]: 1, folders[1]: 1}, seq_len=60)
