"""What gigatoken's cache takes. Run as a program, with the bound in bytes, it prints the most and the renewals."""

import json
import sys

import numpy as np

from gpt2_data import gigatoken as fast
from gpt2_data import tokenizer


def random_words(seed, size=1_000_000):
    data = np.random.default_rng(seed).integers(97, 123, size, dtype=np.uint8)
    data[::8] = 32
    return data, np.array([0, size])


def growth(bound):
    """Most bytes that an encoder took, and its renewals."""
    encoder = fast.Encoder(tokenizer.token_ranks(), max_growth=bound)
    encoder.encode(*random_words(0))
    before = fast._memory()
    most = 0
    for seed in range(1, 30):
        encoder.encode(*random_words(seed))
        most = max(most, fast._memory() - before)
    return most, encoder.renewals


if __name__ == "__main__":
    print(json.dumps(growth(int(sys.argv[1]))))
