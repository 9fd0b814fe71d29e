"""Tokens in, next-token logits out: by PyTorch on any device, or by the engine in C on a CPU."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpt2_model.cache import KVCache
from gpt2_model.cpu.engine import EngineDecoder, Unavailable
from gpt2_model.cpu.int8 import Int8Matrix
from gpt2_model.model import GPT


def make_decoder(model: GPT, capacity: int, compile: bool | None) -> "EngineDecoder | TorchDecoder":
    """Return the fastest decoder for the model on its device, for rows of up to `capacity` tokens.

    On a CPU, `compile` is about engine.c: None uses it if it can be compiled, True raises a ValueError if not. On
    CUDA, True lets torch.compile make one graph of a step, in half a minute. False runs plain PyTorch.
    """
    device = model.device.type
    if device == "cpu" and compile is not False:
        try:
            return EngineDecoder(model, capacity)
        except Unavailable as reason:
            if compile:
                raise ValueError(f"cannot compile for this CPU: {reason}") from None
    if device == "cpu" and isinstance(model.wte, Int8Matrix):
        model = dequantize(model)
    if compile and device not in ("cpu", "cuda"):
        raise ValueError(f"cannot compile for {device}: turn compiling off (--no-compile)")
    return TorchDecoder(model, capacity, compiled=bool(compile))


@torch.no_grad()
def dequantize(model: GPT) -> GPT:
    """Return the same model with its int8 weights as fp32: 12 times as fast where the engine cannot be used."""
    with torch.device("meta"):
        plain = GPT(model.config)
    weights = model.state_dict()
    matrices = ((name, part) for name, part in model.named_modules() if isinstance(part, Int8Matrix))
    weights.update({f"{name}.weight": part.weight for name, part in matrices})
    plain.load_state_dict(weights, strict=False, assign=True)
    return plain.requires_grad_(False).eval()


class TorchDecoder:
    """A model and its cache of rows; logits are (rows, vocab_size) in fp32, rows in the order of `select`.

    It uses PyTorch, on any device. Compiled, the batch keeps its shape: dropped rows are computed, but not read.
    """

    def __init__(self, model: GPT, capacity: int, compiled: bool = False) -> None:
        self._model, self._capacity, self._compiled = model, capacity, compiled
        self._rows: list[int] = []
        self._step = _compiled_step(model.device.type) if compiled else _step

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a row for each prompt; return the logits of the token after it."""
        self._rows = list(range(len(prompts)))
        self._cache, logits = self._fill(prompts)
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row may be taken several times."""
        if self._compiled and len(set(rows)) == len(rows):
            self._rows = [self._rows[row] for row in rows]
            return
        self._cache.select([self._rows[row] for row in rows])
        self._rows = list(range(len(rows)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; return the logits of the token after it."""
        full = torch.zeros(len(self._cache.lengths), 1, dtype=torch.long)
        full[self._rows, 0] = torch.tensor(tokens)
        if self._compiled:  # dropped rows would grow beyond the cache
            self._cache.lengths.clamp_(max=self._capacity - 1)
            for tensor in (self._cache.keys, self._cache.values, self._cache.lengths):
                torch._dynamo.mark_static_address(tensor)
        logits = self._step(self._model, full.to(self._model.device), self._cache)
        return logits if len(self._rows) == len(logits) else logits[self._rows]

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        """Replace the contents of a row with these tokens."""
        filled, _ = self._fill([tokens])
        place = self._rows[row]
        self._cache.keys[:, place] = filled.keys[:, 0]
        self._cache.values[:, place] = filled.values[:, 0]
        self._cache.lengths[place] = len(tokens)

    def _fill(self, prompts: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """Fill a cache with prompts, padded on the right, where causal attention never looks."""
        device, lengths = self._model.device, [len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for place, prompt in enumerate(prompts):
            tokens[place, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(self._model, len(prompts), self._capacity)
        hidden = self._model.hidden(tokens.to(device), cache)
        cache.lengths.copy_(torch.tensor(lengths))  # what is beyond them is overwritten
        last = hidden[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
        return cache, self._model.head(last).float()


def _step(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Compute (rows, vocab_size) logits in fp32 from (rows, 1) ids."""
    return model.head(model.hidden(tokens, cache)[:, -1]).float()


@lru_cache
def _compiled_step(device: str) -> Callable[[GPT, Tensor, KVCache], Tensor]:
    """Return the same compiled step each time, so that it is compiled only once for the same shapes."""
    mode = "reduce-overhead" if device == "cuda" else "default"  # with CUDA graphs
    return torch.compile(_step, mode=mode, dynamic=False, fullgraph=True)
