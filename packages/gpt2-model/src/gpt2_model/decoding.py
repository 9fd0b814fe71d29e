"""Tokens in, next-token logits out, with the keys and values of what came before kept: on the CPU by engine.c,
elsewhere and without a C compiler by PyTorch."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from gpt2_model.model import GPT
from gpt2_model.native import Engine, Unavailable
from gpt2_model.quantize import Int8Matrix, dequantize

PREFILL = 256  # tokens of prompts that go through the engine at once: enough to be bound by arithmetic


class KVCache:
    """Keys and values of the tokens so far, for rows of different lengths that all start at position 0.

    Rows are filled from the left, so a row's positions and its attention do not depend on the rows beside it:
    there is no left padding, no shifted position, no fully masked query (whose softmax would be NaN).

    Args:
        model: whose layers, heads and device the cache is for.
        batch: rows.
        capacity: longest row, in tokens. Memory: 2 * n_layer * n_embd values for each token of each row.
        dtype: of keys and values; by default the model's.
        zeroed: what is masked must be numbers for `extend`, since 0 * NaN is NaN.

    Raises:
        ValueError: a capacity beyond the model's context.
    """

    def __init__(
        self, model: GPT, batch: int, capacity: int, dtype: torch.dtype | None = None, zeroed: bool = True
    ) -> None:
        config = model.config
        if capacity > config.block_size:
            raise ValueError(f"a cache of {capacity} tokens exceeds the model's context of {config.block_size}")
        shape = (config.n_layer, batch, config.n_head, capacity, config.head_dim)
        make = torch.zeros if zeroed else torch.empty
        self.keys = make(shape, device=model.device, dtype=dtype or model.ln_f.weight.dtype)
        self.values = make(shape, device=model.device, dtype=self.keys.dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.empty = True

    def positions(self, time: int) -> Tensor:
        """Where the next `time` tokens of each row stand: (batch, time)."""
        return self.lengths[:, None] + torch.arange(time, device=self.lengths.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store (batch, n_head, time, head_dim) behind each row; return what a query may look at, and the mask.

        The mask is None where plain causal attention is right: when the rows were empty. Otherwise all of the
        cache is returned, masked: its shape is the same at every step, as a compiled step needs it.
        """
        time = key.shape[2]
        if self.empty:
            self.keys[layer, :, :, :time] = key
            self.values[layer, :, :, :time] = value
            return key, value, None
        positions = self.positions(time)
        rows = torch.arange(key.shape[0], device=key.device)[:, None]
        self.keys[layer][rows, :, positions] = key.transpose(1, 2)
        self.values[layer][rows, :, positions] = value.transpose(1, 2)
        visible = torch.arange(self.keys.shape[3], device=key.device) <= positions[:, :, None]
        return self.keys[layer], self.values[layer], visible[:, None]

    def advance(self, time: int) -> None:
        """Count `time` tokens more in every row."""
        self.lengths += time
        self.empty = False

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how much of each row is real, after right-padded prompts went in: the rest is overwritten."""
        self.lengths.copy_(torch.tensor(lengths))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.keys = self.keys[:, index]
        self.values = self.values[:, index]
        self.lengths = self.lengths[index]


class Decoder(Protocol):
    """What generation needs of a model. Logits are (rows, vocab_size) in fp32, rows in the order of `select`."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a row for each prompt: the logits of what follows it."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be taken several times."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row: the logits of what follows."""

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        """Forget what a row holds, and let it hold these tokens."""


def make_decoder(model: GPT, capacity: int, compile: bool | None) -> Decoder:
    """The fastest decoder that there is for the model, where it is.

    Args:
        capacity: longest row, in tokens.
        compile: on the CPU, engine.c: None where it can be compiled, True or else an error. On CUDA True has
            torch.compile make one graph of a step, in half a minute. False: PyTorch's operations one by one.

    Raises:
        ValueError: `compile` is True, and cannot be.
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
        raise ValueError(f"cannot compile for {device}: leave compiling off there")
    return TorchDecoder(model, capacity, compiled=bool(compile))


class EngineDecoder:
    """engine.c. A row's logits are bit-equal whatever rows are beside it."""

    def __init__(self, model: GPT, capacity: int) -> None:
        self._engine = Engine(model)
        self._model, self._capacity = model, capacity
        self._rows: list[int] = []  # of the cache, for each of ours
        self._lengths: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._cache = KVCache(self._model, len(prompts), self._capacity, torch.float32, zeroed=False)
        self._rows, self._lengths = list(range(len(prompts))), [0] * len(prompts)
        return self._append(self._rows, prompts)

    def select(self, rows: Sequence[int]) -> None:
        if len(set(rows)) < len(rows):
            self._cache.select([self._rows[row] for row in rows])
            self._rows = list(range(len(rows)))
        else:  # rows that leave only lose their place: nothing is copied
            self._rows = [self._rows[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._call(range(len(tokens)), [[token] for token in tokens])

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        self._lengths[row] = 0
        self._append([row], [tokens])

    def _append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Any number of tokens a row, up to PREFILL a call, so that long prompts need little memory."""
        pieces = [
            (place, ids[start : start + PREFILL])
            for place, ids in enumerate(tokens)
            for start in range(0, len(ids), PREFILL)
        ]
        logits = torch.empty(len(rows), self._model.config.vocab_size)
        while pieces:
            count, total = 1, len(pieces[0][1])
            while count < len(pieces) and total + len(pieces[count][1]) <= PREFILL:
                total += len(pieces[count][1])
                count += 1
            now, pieces = pieces[:count], pieces[count:]
            places = [place for place, _ in now]
            logits[places] = self._call([rows[place] for place in places], [ids for _, ids in now])
        return logits

    def _call(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        logits = self._engine.forward(
            tokens,
            [self._rows[row] for row in rows],
            [self._lengths[row] for row in rows],
            self._cache.keys,
            self._cache.values,
        )
        for row, ids in zip(rows, tokens, strict=True):
            self._lengths[row] += len(ids)
        return logits


class TorchDecoder:
    """PyTorch, on any device. Compiled, the batch keeps its shape: rows that left it are computed and not read."""

    def __init__(self, model: GPT, capacity: int, compiled: bool = False) -> None:
        self._model, self._capacity, self._compiled = model, capacity, compiled
        self._rows: list[int] = []
        self._step = _compiled_step(model.device.type) if compiled else _step

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._rows = list(range(len(prompts)))
        self._cache, logits = self._fill(prompts)
        return logits

    def select(self, rows: Sequence[int]) -> None:
        if self._compiled and len(set(rows)) == len(rows):
            self._rows = [self._rows[row] for row in rows]
            return
        self._cache.select([self._rows[row] for row in rows])
        self._rows = list(range(len(rows)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        full = torch.zeros(len(self._cache.lengths), 1, dtype=torch.long)
        full[self._rows, 0] = torch.tensor(tokens)
        if self._compiled:  # a row that left has no end of its own
            self._cache.lengths.clamp_(max=self._capacity - 1)
            for tensor in (self._cache.keys, self._cache.values, self._cache.lengths):
                torch._dynamo.mark_static_address(tensor)
        logits = self._step(self._model, full.to(self._model.device), self._cache)
        return logits if len(self._rows) == len(logits) else logits[self._rows]

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        filled, _ = self._fill([tokens])
        place = self._rows[row]
        self._cache.keys[:, place] = filled.keys[:, 0]
        self._cache.values[:, place] = filled.values[:, 0]
        self._cache.lengths[place] = len(tokens)

    def _fill(self, prompts: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """Prompts padded on the right, where causal attention never looks."""
        device, lengths = self._model.device, [len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for place, prompt in enumerate(prompts):
            tokens[place, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(self._model, len(prompts), self._capacity)
        hidden = self._model.hidden(tokens.to(device), cache)
        cache.set_lengths(lengths)
        last = hidden[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
        return cache, self._model.head(last).float()


def _step(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """(rows, 1) ids -> (rows, vocab_size) logits in fp32."""
    return model.head(model.hidden(tokens, cache)[:, -1]).float()


@lru_cache
def _compiled_step(device: str) -> Callable[[GPT, Tensor, KVCache], Tensor]:
    """Kept, so that a second call of the same shapes finds it compiled."""
    mode = "reduce-overhead" if device == "cuda" else "default"  # with CUDA graphs
    return torch.compile(_step, mode=mode, dynamic=False, fullgraph=True)
