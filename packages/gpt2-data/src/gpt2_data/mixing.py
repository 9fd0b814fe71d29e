"""Several datasets in one stream: which of them the k-th sample comes from, by weight, in O(1).

The stream is cut into blocks of 4096 samples. In each block, and in all whole blocks from the start, every
dataset has its share to within one sample. Inside a block the places are permuted, anew in each block, so that no
rank sees a pattern; the samples of each dataset come in the order that it has alone, through epochs of its own.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from gpt2_data.order import mix, permute

BLOCK = 4096


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the same proportions. A float counts as the decimal it is written as.

    Raises ValueError for a weight that is not positive, or smaller than one 4096th of their sum.
    """
    exact = []
    for weight in weights:
        try:
            exact.append(Fraction(str(weight)))
        except ValueError:
            raise ValueError(f"weight {weight!r} is not a positive number") from None
    if min(exact) <= 0:
        raise ValueError(f"weight {weights[exact.index(min(exact))]!r} is not a positive number")
    if min(exact) * BLOCK < sum(exact):
        raise ValueError(
            f"weight {weights[exact.index(min(exact))]!r} is under 1/{BLOCK} of the sum of weights, "
            f"{float(sum(exact)):g}: leave that dataset out or raise its weight"
        )
    denominator = math.lcm(*(weight.denominator for weight in exact))
    numerators = [int(weight * denominator) for weight in exact]
    return [numerator // math.gcd(*numerators) for numerator in numerators]


def apportion(
    numbers: NDArray[np.int64], weights: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each of the stream's samples `numbers` its source, and its number among that source's samples.

    `weights` are those of `integer_weights`.
    """
    sources, within = np.empty_like(numbers), np.empty_like(numbers)
    blocks, places = np.divmod(numbers, BLOCK)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        block_sources, block_numbers = _block(block, weights, seed)
        sources[here], within[here] = block_sources[places[here]], block_numbers[places[here]]
    return sources, within


def _block(block: int, weights: Sequence[int], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Sources 0 to i have had floor(block * BLOCK * c / total) samples before it, c the sum of their weights: the
    # differences are each source's share, off by less than one. Python's integers, so that nothing overflows.
    total = sum(weights)
    sums = [sum(weights[: i + 1]) for i in range(len(weights))]
    before = np.diff([block * BLOCK * c // total for c in sums], prepend=0)
    until = np.diff([(block + 1) * BLOCK * c // total for c in sums], prepend=0)
    counts = until - before
    assert counts.min() >= 0  # as each weight is at least 1/BLOCK of the total
    sources = np.repeat(np.arange(len(weights)), counts)
    # A key that no epoch's has: epochs count up from 0.
    sources = sources[permute(np.arange(BLOCK), BLOCK, mix(mix(seed, -1), block))]
    by_source = np.argsort(sources, kind="stable")
    numbers = np.empty(BLOCK, np.int64)
    numbers[by_source] = np.arange(BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
    return sources, numbers + before[sources]
