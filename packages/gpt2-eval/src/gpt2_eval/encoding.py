"""Text -> token ids: by GPT-2's tokenizer or another model's, a context and its continuation together or apart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from gpt2_eval.packing import Row
from gpt2_model import EOT, get_tokenizer


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer.

    Attributes:
        begin: text -> ids, with what the tokenizer puts before a text (GPT-2's puts nothing, Llama's <s>).
        go_on: text that continues another -> ids.
        prefix: the id that stands for an empty context.
        is_gpt2: True for GPT-2's tokenizer, by which datasets for training are tokenised.
    """

    begin: Callable[[str], list[int]]
    go_on: Callable[[str], list[int]]
    prefix: int
    is_gpt2: bool = False


@cache
def gpt2_encoder() -> Encoder:
    """GPT-2's byte-pair encoding."""
    encode = get_tokenizer().encode_ordinary
    # An item's rows begin alike; nobody writes into these lists.
    return Encoder(lru_cache(maxsize=8)(encode), encode, EOT, is_gpt2=True)


def joint(encoder: Encoder, context: str, continuation: str) -> Row:
    """Tokenise the whole, and cut it where the context's own tokens end; blanks that end it go over first.

    Source: lm_eval/api/model.py (TemplateLM._encode_pair and loglikelihood), lm-evaluation-harness 0.4.13.
    """
    stripped = context.rstrip()
    if not stripped and not context:
        ids = encoder.go_on(continuation)
        # A continuation that begins with the prefix is not given it twice.
        return Row(ids[:1], ids[1:]) if ids[:1] == [encoder.prefix] else Row([encoder.prefix], ids)
    given, whole = encoder.begin(stripped), encoder.begin(context + continuation)
    return Row(given or [encoder.prefix], whole[len(given) :])


def apart(encoder: Encoder, context: str, continuation: str) -> Row:
    """Tokenise each by itself. Source: render_example of build-nanogpt's hellaswag.py."""
    return Row(encoder.begin(context) or [encoder.prefix], encoder.go_on(continuation))
