"""Which sample comes k-th: a seeded shuffle, the shares of several datasets, build-nanogpt's order.

All of it is arithmetic on a sample's number, in O(1) memory. The shuffle is a Feistel network, which permutes
[0, 2^bits), the smallest such set that holds [0, n); a result outside [0, n) goes through again until it is inside
("cycle walking"), which keeps it a bijection. It is computed here on uint64: the order does not depend on a random
number generator's version.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 4096  # samples of a mix in which every dataset has its share to within one sample
_MASK64 = (1 << 64) - 1
_ROUNDS = 8  # 4 make a good permutation of large sets; small ones need more, and it costs little


def permute(indices: ArrayLike, n: int, seed: int) -> NDArray[np.int64]:
    """Return where permutation number `seed` (any int; its low 64 bits count) puts `indices` in [0, n)."""
    values = np.atleast_1d(np.asarray(indices, np.int64))
    if values.size and (values.min() < 0 or values.max() >= n):
        raise ValueError(f"indices must lie in [0, {n})")
    bits = (n - 1).bit_length()
    keys = [mix(seed, round_) for round_ in range(_ROUNDS)]
    result = _feistel(values.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(result >= np.uint64(n))
    while outside.size:  # fewer than half are, so this ends after a few turns
        result[outside] = _feistel(result[outside], bits, keys)
        outside = outside[result[outside] >= np.uint64(n)]
    return result.astype(np.int64).reshape(np.shape(indices))


def mix(seed: int, stream: int) -> int:
    """Return a 64-bit seed made from a seed and a number (an epoch, a round): SplitMix64's finalizer, twice."""
    numbers = np.array([seed & _MASK64, (stream * 0x9E3779B97F4A7C15) & _MASK64], np.uint64)
    return int(_splitmix(_splitmix(numbers[:1]) ^ numbers[1:])[0])


def _splitmix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply one step of SplitMix64, https://prng.di.unimi.it/splitmix64.c; uint64 arrays wrap around as in C."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _feistel(values: NDArray[np.uint64], bits: int, keys: list[int]) -> NDArray[np.uint64]:
    """Change each half in turn by a hash of the other, which can be undone: a bijection whatever the hash."""
    shift = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = values >> shift, values & low_mask
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        high = high ^ (_splitmix(low ^ np.uint64(even)) & high_mask)
        low = low ^ (_splitmix(high ^ np.uint64(odd)) & low_mask)
    return (high << shift) | low


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the same proportions. A float counts as the decimal that Python prints.

    Raises ValueError for a weight that is not positive, or smaller than one 4096th of their sum.
    """
    exact = []
    for weight in weights:
        try:
            exact.append(Fraction(str(weight)))
        except ValueError:
            exact.append(Fraction(0))  # refused below
    least, total = min(exact), sum(exact)
    smallest = weights[exact.index(least)]
    if least <= 0:
        raise ValueError(f"weight {smallest!r} is not a positive number")
    if least * BLOCK < total:
        raise ValueError(
            f"weight {smallest!r} is under 1/{BLOCK} of the sum of weights, {float(total):g}: "
            "leave that dataset out or raise its weight"
        )
    numerators, denominators = zip(*(weight.as_integer_ratio() for weight in exact), strict=True)
    unit = Fraction(math.gcd(*numerators), math.lcm(*denominators))
    return [int(weight / unit) for weight in exact]


def apportion(
    numbers: NDArray[np.int64], weights: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each of a mix's samples `numbers` its dataset, and its number among that dataset's samples.

    In each block of 4096 samples, and in all whole blocks from the start, every dataset has its share to within
    one sample. `weights` are those of `integer_weights`.
    """
    sources, within = np.empty_like(numbers), np.empty_like(numbers)
    blocks, places = np.divmod(numbers, BLOCK)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        block_sources, block_numbers = _block(block, weights, seed)
        sources[here], within[here] = block_sources[places[here]], block_numbers[places[here]]
    return sources, within


def _block(block: int, weights: Sequence[int], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Before this block, sources 0 to i have had floor(block * BLOCK * c / total) samples, where c is the sum of
    # their weights. The differences are each source's share, off by less than one. No Python integer overflows.
    sums = list(itertools.accumulate(weights))
    before, until = (np.diff([n * BLOCK * c // sums[-1] for c in sums], prepend=0) for n in (block, block + 1))
    counts = until - before
    assert counts.min() >= 0  # as each weight is at least 1/BLOCK of the total
    # Permuted anew in each block, so that no rank sees a pattern. The key is one that no epoch has: those count
    # up from 0.
    sources = np.repeat(np.arange(len(weights)), counts)
    sources = sources[permute(np.arange(BLOCK), BLOCK, mix(mix(seed, -1), block))]
    by_source = np.argsort(sources, kind="stable")
    numbers = np.empty(BLOCK, np.int64)
    numbers[by_source] = np.arange(BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
    return sources, numbers + before[sources]


def build_nanogpt_starts(
    batches: ArrayLike, shard_tokens: Sequence[int], batch_size: int, seq_len: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Return where a rank's `batches` (numbers from 0, through the epochs) begin in the stream of all shards.

    build-nanogpt's DataLoaderLite starts a shard at B*T*rank, moves on by B*T*W, and leaves the shard as soon as
    B*T*W + 1 tokens more would go past its end. That skips up to two batches of all ranks at a shard's end, and as
    the rank's own place counts, a high rank may leave it a batch before a low one. Each shard must have B*T*W + 1
    tokens. https://github.com/karpathy/build-nanogpt/blob/master/train_gpt2.py
    """
    tokens = np.asarray(shard_tokens, np.int64)
    step, first = batch_size * seq_len * world_size, batch_size * seq_len * rank
    assert tokens.min() > step
    # The n-th batch of a shard is its last if first + n * step + step + 1 > tokens; one is always taken.
    in_shard = np.maximum((tokens - 1 - first) // step, 1)
    ends = np.cumsum(in_shard)
    within = np.asarray(batches, np.int64) % ends[-1]
    shard = np.searchsorted(ends, within, side="right")
    shard_starts, batches_before = np.cumsum(tokens) - tokens, ends - in_shard
    starts: NDArray[np.int64] = shard_starts[shard] + first + (within - batches_before[shard]) * step
    return starts
