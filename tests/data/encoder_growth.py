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


if __name__ == "__main__":
    encoder = fast.Encoder(tokenizer.token_ranks(), max_growth=int(sys.argv[1]))
    encoder.encode(*random_words(0))
    before, most = fast._memory(), 0
    for seed in range(1, 30):
        encoder.encode(*random_words(seed))
        most = max(most, fast._memory() - before)
    print(json.dumps([most, encoder.renewals]))
