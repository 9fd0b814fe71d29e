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
        with pytest.raises(ValueError, match="split 'train' has"):
            dataset.read("train", a, b)
    with pytest.raises(ValueError, match="no split 'test': choose train or val"):
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
    loader = TokenLoader(folder, batch_size=3, seq_len=50, order="sequential")
    for j, (x, y) in enumerate(take(loader, 5)):
        assert x.shape == y.shape == (3, 50)
        assert x.dtype == y.dtype == np.int64
        assert x.flags.c_contiguous
        for row in range(3):
            start = (3 * j + row) * 50
            assert np.array_equal(x[row], dataset.read("train", start, start + 50))
            assert np.array_equal(y[row], dataset.read("train", start + 1, start + 51))
    assert loader.samples_consumed == 15


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_no_token_of_an_epoch_is_lost(folder, order):
    dataset = open_dataset(folder)
    tokens = dataset.tokens("val")
    divisors = [t for t in range(1, 60) if (tokens - 1) % t == 0]
    for seq_len in {1, 7, tokens // 3, tokens - 2, tokens - 1, *divisors}:
        loader = TokenLoader(folder, "val", batch_size=1, seq_len=seq_len, order=order)
        assert loader.num_windows == [-(-(tokens - 1) // seq_len)]
        _, starts = loader.windows(np.arange(loader.num_windows[0]))
        inputs = np.bincount((starts[:, None] + np.arange(seq_len)).ravel(), minlength=tokens)
        assert (inputs[:-1] >= 1).all()
        assert inputs[-1] == 0  # it has no successor: it is a target only
        assert inputs.sum() - (tokens - 1) == -(tokens - 1) % seq_len  # read twice: where the last two overlap
        targets = np.concatenate([y[0] for _, y in take(loader, loader.num_windows[0])])
        assert np.array_equal(np.unique(targets), np.unique(dataset.read("val", 1, tokens)))
    x, y = next(TokenLoader(folder, "val", batch_size=1, seq_len=tokens - 1))
    assert np.array_equal(np.append(x[0], y[0, -1]), dataset.read("val", 0, tokens))
    with pytest.raises(ValueError, match=f"a sample of seq_len {tokens} needs {tokens + 1:,}"):
        TokenLoader(folder, "val", batch_size=1, seq_len=tokens)


def test_an_epoch_has_every_sample_once_and_the_next_another_order(folder):
    loader = TokenLoader(folder, batch_size=1, seq_len=64, seed=9)
    n = loader.num_windows[0]
    epochs = [loader.windows(np.arange(e * n, (e + 1) * n))[1].tolist() for e in range(3)]
    in_order = TokenLoader(folder, seq_len=64, order="sequential").windows(np.arange(2 * n))[1].tolist()
    assert in_order[:n] == in_order[n:] == sorted(set(in_order))
    assert all(sorted(epoch) == in_order[:n] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert TokenLoader(folder, seq_len=64, seed=8).windows(np.arange(n))[1].tolist() != epochs[0]


GLOBAL_BATCH = 8
LAYOUTS = [(b, w) for w in (1, 2, 4, 8) for b in (1, 2, 4, 8) if b * w <= GLOBAL_BATCH]


def global_step(loaders):
    """What all ranks take for one step of the global batch, micro-batch after micro-batch, one row a sample."""
    rows = []
    for _ in range(GLOBAL_BATCH // (len(loaders) * loaders[0].batch_size)):
        rows += [np.concatenate(next(loader), axis=1) for loader in loaders]
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "mix"])
def test_any_ranks_and_micro_batches_take_the_same_and_resume_at_every_step(folder, make, texts, kind):
    path = {folder: 3, make(texts[:60]): 2} if kind == "mix" else folder
    order = "shuffled" if kind == "mix" else kind
    layouts = {
        (b, w): [
            TokenLoader(path, batch_size=b, seq_len=400, seed=1, rank=rank, world_size=w, order=order)
            for rank in range(w)
        ]
        for b, w in LAYOUTS
    }
    whole = layouts[GLOBAL_BATCH, 1][0]
    steps = 3 * whole.num_windows[0] // GLOBAL_BATCH  # through several epochs
    expected, states = [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(whole.state())))
        expected.append(np.concatenate(next(whole), axis=1))
    assert kind == "sequential" or len({rows.tobytes() for rows in expected}) == steps
    assert len(json.dumps(states[-1])) < 400

    for (b, w), loaders in layouts.items():
        if (b, w) == (GLOBAL_BATCH, 1):
            continue
        for state, rows in zip(states, expected, strict=True):
            # The state is the same from every layout: to resume from one of them is to resume from each.
            assert [json.loads(json.dumps(loader.state())) for loader in loaders] == [state] * w
            assert np.array_equal(global_step(loaders), rows)
    for loaders in layouts.values():
        for step in reversed(range(steps)):
            for loader in loaders:
                loader.restore(states[step])
            assert np.array_equal(global_step(loaders), expected[step])
            assert all(loader.samples_consumed == (step + 1) * GLOBAL_BATCH for loader in loaders)
    fresh = TokenLoader(path, batch_size=2, seq_len=400, seed=1, order=order)
    fresh.restore(states[5])
    assert np.array_equal(np.concatenate(next(fresh), axis=1), expected[5][:2])


def test_restoring_far_ahead_costs_nothing(folder, make, texts):
    for path in folder, {folder: 0.9, make(texts[:50]): 0.1}:
        loader = TokenLoader(path, seq_len=64, batch_size=2)
        for samples in 10**12, 2**61:
            loader.restore(loader.state() | {"samples": samples})
            next(loader)
            assert loader.samples_consumed == samples + 2


def test_restoring_to_within_a_batch(folder):
    """As after another batch size; what was planned for the batches before does not fit."""
    rows = np.concatenate([x for x, _ in take(TokenLoader(folder, seq_len=64, batch_size=1), 20)])
    loader = TokenLoader(folder, seq_len=64, batch_size=4)
    for samples in 4, 7, 3, 10, 9, 0:
        loader.restore(loader.state() | {"samples": samples})
        assert np.array_equal(next(loader)[0], rows[samples : samples + 4])


def test_a_state_of_another_stream_is_refused(folder, make, texts):
    small = make(texts[:50])
    state = TokenLoader(folder, seq_len=64, seed=1).state()
    for changed, field in [
        (TokenLoader(folder, seq_len=32, seed=1), "seq_len"),
        (TokenLoader(folder, seq_len=64, seed=2), "seed"),
        (TokenLoader(folder, "val", seq_len=64, seed=1), "split"),
        (TokenLoader(folder, seq_len=64, seed=1, order="sequential"), "order"),
        (TokenLoader(small, seq_len=64, seed=1), "dataset"),
        (TokenLoader({folder: 1, small: 1}, seq_len=64, seed=1), "dataset"),
    ]:
        with pytest.raises(ValueError, match=f"state has {field} "):
            changed.restore(state)
    loader = TokenLoader(folder, seq_len=64, seed=1)
    with pytest.raises(ValueError, match="the loader's state has version "):
        loader.restore(state | {"version": 1})
    for samples in (-1, None, 10**30, 1.5):
        with pytest.raises(ValueError, match="the loader's state has an impossible number of samples: "):
            loader.restore(state | {"samples": samples})
    with pytest.raises(ValueError, match="the loader's state has version None"):
        loader.restore({})
    assert loader.samples_consumed == 0


def test_arguments_that_cannot_work(folder):
    for arguments, message in [
        ({"batch_size": 0}, "must be 1 or more"),
        ({"seq_len": 0}, "must be 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
        ({"split": "test"}, "no split 'test'"),
        ({"seq_len": 10**9}, "a sample of seq_len 1000000000 needs"),
        ({"order": "random"}, "order 'random': must be one of shuffled, sequential, build-nanogpt"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenLoader(folder, **arguments)


def test_batches_go_into_arrays_of_the_callers(folder):
    loader, other = (TokenLoader(folder, batch_size=3, seq_len=40) for _ in range(2))
    x, y = np.zeros((3, 40), np.int64), np.zeros((3, 40), np.int64)
    for _ in range(3):
        loader.next_into(x, y)
        assert all(np.array_equal(a, b) for a, b in zip((x, y), next(other), strict=True))
    for wrong in np.zeros((1, 40), np.int64), np.zeros((3, 41), np.int64):
        with pytest.raises(ValueError, match=r"not \(3, 40\)"):
            loader.next_into(wrong, y)
    assert loader.samples_consumed == 9


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_an_id_outside_the_vocabulary_is_named(folder, order):
    with (folder / "train_000002.bin").open("r+b") as file:
        file.seek(1024 + 2 * 500)
        file.write((60_000).to_bytes(2, "little"))
    loader = TokenLoader(folder, batch_size=4, seq_len=100, order=order)
    with pytest.raises(ValueError, match=r"train_000002\.bin: token 500 is 60000, the vocabulary has 50257"):
        take(loader, loader.num_windows[0])


@pytest.mark.parametrize("seq_len", [100, 1200])  # most rows within a shard, and all across several
def test_a_shard_cut_while_it_is_read_is_an_error(folder, seq_len):
    loader = TokenLoader(folder, batch_size=4, seq_len=seq_len, order="sequential")
    next(loader)
    os.truncate(folder / "train_000002.bin", 1524)
    with pytest.raises(ValueError, match=r"train_000002\.bin: cut short while it was read, at token"):
        take(loader, loader.num_windows[0])
    before = loader.samples_consumed
    with pytest.raises(ValueError, match="cut short"):
        next(loader)
    assert loader.samples_consumed == before  # a batch that failed was not taken


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
