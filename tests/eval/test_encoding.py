"""A context and its continuation as ids."""

import random
from dataclasses import replace

from gpt2_eval.encoding import gpt2_encoder, joint

PIECES = [
    *" \n\t\x1c\x85\u00a0\u2003\u3000", "  ", " \n ",
    "a", "Word", "don't", "'s", " 's", "'", "12", ".", " ?!", "é", "豆腐",
    "e\u0301", "🏖", "<|endoftext|>", "[step]",
]  # fmt: skip


def test_the_short_way_gives_the_ids_of_the_whole():
    """20,000 pairs of wild text: where a blank begins the continuation, both parts may be tokenised alone."""
    encoder, draw = gpt2_encoder(), random.Random(0)
    the_long_way = replace(encoder, is_gpt2=False)
    for _ in range(20_000):
        context = "".join(draw.choices(PIECES, k=draw.randint(0, 6)))
        continuation = draw.choice(["", " "]) + "".join(draw.choices(PIECES, k=draw.randint(1, 6)))
        row = joint(encoder, context, continuation)
        assert row == joint(the_long_way, context, continuation), (context, continuation)
