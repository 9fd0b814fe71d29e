"""Models to evaluate, with their tokenizers: a GPT-2, or any causal language model that transformers loads."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_eval.packing import Layout, Row
from gpt2_model import EOT, GPT, Tokenizer, get_tokenizer, load_tokenizer
from gpt2_model.command import find_device


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer."""

    begin: Callable[[str], list[int]]  # ids of a text that begins, with what precedes it (Llama: <s>)
    go_on: Callable[[str], list[int]]  # ids of a text that continues another
    prefix: int  # the id that stands for an empty context
    tokenizer: Tokenizer | None = None  # the same by its files, which can be compared; None if they cannot

    def same_ids(self, other: Tokenizer) -> bool:
        """True if no text without special tokens gets other ids by `other`; added tokens do not matter."""
        return self.tokenizer is not None and not self.tokenizer.problem and self.tokenizer.same_ids(other)

    @property
    def is_gpt2(self) -> bool:
        """True if texts get GPT-2's ids."""
        return self.same_ids(GPT2)


NO_PREFIX = "the model's tokenizer has no bos or eos token to stand for an empty context"
GPT2 = Tokenizer()  # its files are read when the first text comes


@cache
def gpt2_encoder() -> Encoder:
    """GPT-2's byte-pair encoding."""
    encode = get_tokenizer().encode_ordinary
    # An item's rows begin alike; nobody writes into these lists.
    return Encoder(lru_cache(maxsize=8)(encode), encode, EOT, GPT2)


def encoder_of(model: Any) -> Encoder:
    """Return a model's own encoder; GPT-2's for a module that says nothing of its tokenizer.

    A ValueError says that a GPT has none, or that it cannot be followed.
    """
    if isinstance(model, HFModel):
        return model.encoder or gpt2_encoder()
    if not hasattr(model, "tokenizer"):
        return gpt2_encoder()
    encoder: Encoder = tokenizer_encoder(model.text_tokenizer())
    return encoder


@lru_cache(maxsize=4)
def tokenizer_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return the encoder of a tokenizer; a ValueError says that it cannot be followed, or names no beginning."""
    if tokenizer.problem:
        raise ValueError(tokenizer.problem)
    if tokenizer.prefix is None:
        raise ValueError(NO_PREFIX)
    if tokenizer.is_gpt2 and tokenizer.prefix == EOT:
        return gpt2_encoder()
    before = len(tokenizer.encode(""))  # what some tokenizers put before a text
    begin = lru_cache(maxsize=8)(tokenizer.encode)
    return Encoder(begin, lambda text: tokenizer.encode(text)[before:], tokenizer.prefix, tokenizer)


def joint(encoder: Encoder, context: str, continuation: str) -> Row:
    """Tokenise both texts as one, and cut after the context's own tokens; its final blanks go to the continuation.

    Source: lm_eval/api/model.py (TemplateLM._encode_pair and loglikelihood), lm-evaluation-harness 0.4.13.
    """
    if not context:
        ids = encoder.go_on(continuation)
        # If the continuation begins with the prefix, the prefix is not added again.
        return Row(ids[:1], ids[1:]) if ids[:1] == [encoder.prefix] else Row([encoder.prefix], ids)
    given, whole = encoder.begin(context.rstrip()), encoder.begin(context + continuation)
    return Row(given or [encoder.prefix], whole[len(given) :])


class Sizes(NamedTuple):
    block_size: int
    vocab_size: int


class HFModel(nn.Module):
    """A transformers model split into hidden states and head, as score_items needs it.

    Some models also scale or cap their logits. So the two are tried on a few tokens: if their product is not the
    model's own logits, `hidden` returns the logits, and `head_weight` is None. That is slower, but right.
    """

    def __init__(self, model: Any, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder
        sizes = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
        embedding = model.get_input_embeddings()
        self.config = Sizes(next((size for size in sizes if size), 2048), int(embedding.weight.shape[0]))
        self.head_weight: Tensor | None = getattr(model.get_output_embeddings(), "weight", None)
        if not self._has_halves():
            self.head_weight = None

    @torch.no_grad()
    def is_causal(self) -> bool:
        """True if a token does not affect the predictions before it."""
        tokens = torch.arange(3, 11, device=self.model.device).repeat(2, 1) % self.config.vocab_size
        tokens[1, -1] = 2 % self.config.vocab_size
        one, other = self.model(tokens, use_cache=False).logits[:, :-1]
        return torch.allclose(one, other, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def _has_halves(self) -> bool:
        if self.head_weight is None or self.model.base_model is self.model:
            return False
        tokens = torch.arange(3, 9, device=self.model.device)[None] % self.config.vocab_size
        expected = self.model(tokens, use_cache=False).logits
        try:
            logits = F.linear(self.hidden(tokens), self.head_weight)
        except (AttributeError, TypeError, RuntimeError):
            return False
        return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)

    def hidden(self, tokens: Tensor, layout: Layout | None = None, /) -> Tensor:
        """(batch, time) ids -> (batch, time, width), or logits without a `head_weight`."""
        assert layout is None, "transformers' models do not support shared prefixes"
        if self.head_weight is None:
            return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]
        return self.model.base_model(tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


LanguageModel = GPT | HFModel
"""What is scored. Any module with `config`, `hidden` and `head_weight` will do, though type checkers object."""


def load_model(model: str | None, hf: str | None, device: str) -> tuple[LanguageModel, Encoder | None]:
    """Load a model in fp32 onto a device, by GPT.from_pretrained or by transformers; return it and its tokenizer.

    The tokenizer is None if the model has none, so that no text can be scored, but a loss on ids.

    A ValueError or OSError says that there is no such model or device.
    """
    assert (model is None) != (hf is None)
    where = find_device(device)
    if model is not None:
        own = GPT.from_pretrained(model).to(where)
        return own, None if own.tokenizer is None else encoder_of(own)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise ValueError("--hf needs transformers: pip install 'gpt2-eval[transformers]'") from None
    if not sys.stderr.isatty():
        disable_progress_bar()  # 148 weights take 30 ms
    try:
        # A text may be longer than the context, of which transformers would warn.
        tokenizer = AutoTokenizer.from_pretrained(hf, model_max_length=10**9)
        loaded = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).to(where).eval()
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]  # the rest may list all architectures
        raise ValueError(
            f"transformers cannot load {hf!r}, a hub name or a folder with a tokenizer in it, as a causal "
            f"language model: {why[:200]}"
        ) from error
    encoder = _encoder(tokenizer)
    wrapped = HFModel(loaded, encoder)
    if not wrapped.is_causal():
        raise ValueError(f"{hf} is not a causal language model: its predictions depend on later tokens")
    return wrapped, encoder


def _encoder(tokenizer: Any) -> Encoder:
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise ValueError(NO_PREFIX)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = load_tokenizer(folder)
    return Encoder(tokenizer.encode, partial(tokenizer.encode, add_special_tokens=False), int(prefix), files)
