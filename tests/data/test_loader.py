"""Datasets read, and batches that depend on the seed and their number alone."""

import json
import os
import pickle

import numpy as np
import pytest

from gpt2_data import TokenLoader, encode_documents, open_dataset


@pytest.fixture
def folder(make, texts):
    return make(texts, val_tokens=700, shard_size=1111)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def stream(loader, samples):
    """Inputs and targets of the next global samples, one row each, from a loader that has them all."""
    batches = take(loader, samples // loader.batch_size)
    return np.concatenate([np.concatenate([x, y], axis=1) for x, y in batches])


def test_reads_across_shards(folder, texts):
    dataset = open_dataset(folder)
    tokens, _ = encode_documents(texts)
    both = np.concatenate([dataset.read(split, 0, dataset.tokens(split)) for split in ("val", "train")])
    assert np.array_equal(both, tokens)
    start = dataset.tokens("val")
    for a, b in (0, 0), (0, 1), (1100, 1120), (1111, 2222), (1110, 3400), (5, 5):
        part = dataset.read("train", a, b)
        assert part.dtype == np.uint16
        assert np.array_equal(part, tokens[start + a : start + b])
    for a, b in (-1, 4), (5, 4), (0, dataset.tokens("train") + 1):
        with pytest.raises(ValueError, match="of split 'train'"):
            dataset.read("train", a, b)
    with pytest.raises(ValueError, match="no split 'test': there are train and val"):
        dataset.tokens("test")


def test_documents(folder, texts):
    dataset = open_dataset(folder)
    documents = [*dataset.documents("val"), *dataset.documents("train")]
    assert len(documents) == len(texts)
    assert all(np.array_equal(d, encode_documents([text])[0]) for d, text in zip(documents, texts, strict=True))
    val = dataset.num_documents("val")
    for number in 0, 1, 50, dataset.num_documents("train") - 1:
        assert np.array_equal(dataset.document("train", number), documents[val + number])
    with pytest.raises(ValueError, match="no document 999 in split 'train'"):
        dataset.document("train", 999)


def test_a_split_may_be_empty(make):
    folder = make(["Hello world"] * 3)
    dataset = open_dataset(folder)
    assert dataset.tokens("val") == 0
    assert list(dataset.documents("val")) == []
    with pytest.raises(ValueError, match="split 'val' has 0 tokens, a sample of seq_len 1024 needs 1,025"):
        TokenLoader(folder, "val")


def test_batches_are_windows_shifted_by_one(folder):
    dataset = open_dataset(folder)
    loader = TokenLoader(folder, batch_size=3, seq_len=50, shuffle=False)
    assert loader.num_samples == (dataset.tokens("train") - 1) // 50
    for j, (x, y) in enumerate(take(loader, 5)):
        assert x.shape == y.shape == (3, 50)
        assert x.dtype == y.dtype == np.int64
        assert x.flags.c_contiguous
        for row in range(3):
            start = (3 * j + row) * 50
            assert np.array_equal(x[row], dataset.read("train", start, start + 50))
            assert np.array_equal(y[row], dataset.read("train", start + 1, start + 51))
    assert loader.samples_consumed == 15


def test_an_epoch_has_every_sample_once_and_the_next_another_order(folder):
    loader = TokenLoader(folder, batch_size=1, seq_len=64, seed=9)
    n = loader.num_samples
    epochs = [loader.samples(np.arange(e * n, (e + 1) * n)).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert TokenLoader(folder, seq_len=64, seed=8).samples(np.arange(n)).tolist() != epochs[0]
    assert TokenLoader(folder, seq_len=64, shuffle=False).samples(np.arange(2 * n)).tolist() == [*range(n)] * 2


def test_the_ranks_together_take_what_one_rank_takes(folder):
    whole = TokenLoader(folder, batch_size=8, seq_len=100, seed=3)
    expected = stream(whole, 8 * 60)
    assert 2 * whole.num_samples < 8 * 60  # through several epochs
    for world_size in 1, 2, 4:
        for batch_size in 8 // world_size, 4 // world_size:
            loaders = [
                TokenLoader(folder, batch_size=batch_size, seq_len=100, seed=3, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            steps = 8 * 60 // (batch_size * world_size)
            rows = []
            for _ in range(steps):
                rows += [np.concatenate(next(loader), axis=1) for loader in loaders]
            assert np.array_equal(np.concatenate(rows), expected)


def test_resume_at_every_step_on_any_number_of_ranks(folder):
    expected = stream(TokenLoader(folder, batch_size=1, seq_len=200, seed=1), 120)
    running = TokenLoader(folder, batch_size=4, seq_len=200, seed=1)
    for step in range(20):
        state = json.loads(json.dumps(running.state()))
        assert len(json.dumps(state)) < 300
        for batch_size, world_size in (4, 1), (1, 4), (2, 1), (3, 2):
            rows = []
            for rank in range(world_size):
                loader = TokenLoader(
                    folder, batch_size=batch_size, seq_len=200, seed=1, rank=rank, world_size=world_size
                )
                loader.restore(state)
                assert loader.samples_consumed == 4 * step
                rows.append(np.concatenate(next(loader), axis=1))
            size = batch_size * world_size
            assert np.array_equal(np.concatenate(rows), expected[4 * step : 4 * step + size])
        next(running)


def test_restoring_far_ahead_costs_nothing(folder):
    loader = TokenLoader(folder, seq_len=64, batch_size=2)
    loader.restore(loader.state() | {"samples": 10**12})
    next(loader)
    assert loader.samples_consumed == 10**12 + 2


def test_a_state_of_another_stream_is_refused(folder, make, texts):
    state = TokenLoader(folder, seq_len=64, seed=1).state()
    for changed, field in [
        (TokenLoader(folder, seq_len=32, seed=1), "seq_len"),
        (TokenLoader(folder, seq_len=64, seed=2), "seed"),
        (TokenLoader(folder, "val", seq_len=64, seed=1), "split"),
        (TokenLoader(folder, seq_len=64, seed=1, shuffle=False), "shuffle"),
        (TokenLoader(make(texts[:50]), seq_len=64, seed=1), "dataset"),
    ]:
        with pytest.raises(ValueError, match=f"state has {field} "):
            changed.restore(state)
    loader = TokenLoader(folder, seq_len=64, seed=1)
    for faulty in {}, state | {"version": 2}, state | {"samples": -1}, state | {"samples": None}:
        with pytest.raises(ValueError, match="the loader's state has"):
            loader.restore(faulty)


def test_arguments_that_cannot_work(folder):
    for arguments, message in [
        ({"batch_size": 0}, "must be 1 or more"),
        ({"seq_len": 0}, "must be 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
        ({"split": "test"}, "no split 'test'"),
        ({"seq_len": 10**9}, "a sample of seq_len 1000000000 needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenLoader(folder, **arguments)


def test_missing_and_cut_shards_are_named_at_the_start(folder):
    os.truncate(folder / "train_000003.bin", 1500)
    with pytest.raises(ValueError, match=r"train_000003\.bin: cut short"):
        TokenLoader(folder, seq_len=64)
    (folder / "train_000003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_000003\.bin"):
        TokenLoader(folder, seq_len=64)


def test_damaged_offsets_are_an_error(folder):
    path = min(folder.glob("train_*.docs"))
    data = bytearray(path.read_bytes())
    data[24:32] = (10**9).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="docs: offsets out of order or outside"):
        list(open_dataset(folder).documents("train"))


def test_a_loader_goes_to_another_process(folder):
    loader = TokenLoader(folder, seq_len=64, batch_size=2)
    next(loader)
    other = pickle.loads(pickle.dumps(loader))
    assert np.array_equal(next(other)[0], next(loader)[0])
