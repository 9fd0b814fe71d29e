"""Text from a model: prompts in, completions out, with a key-value cache and a random stream for each row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .model import GPT
from .sampling import check_options, sample, uniforms
from .tokenizer import EOT, get_tokenizer


@dataclass
class Completion:
    """What one row of `generate` came to.

    Attributes:
        row: prompt number * num_samples + sample number.
        prompt: the prompt as text.
        text: the new text, without the prompt and without the end-of-text token.
        tokens: the ids of the new text.
        finish_reason: "stop" (the model ended the text) or "length" (max_new_tokens or the context is used up).
        tokens_per_second: new tokens after the first, over the time they took; 0 where there are none.
        seconds_to_first_token: from the call to the row's first token.
    """

    row: int
    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0
    seconds_to_first_token: float = 0.0


class KVCache:
    """Keys and values of the tokens so far, for rows of different lengths that all start at position 0.

    Rows are filled from the left, so a row's positions and its attention do not depend on the rows beside it:
    there is no left padding, no shifted position, no fully masked query (whose softmax would be NaN).

    Args:
        model: whose layers, heads, device and dtype the cache is for.
        batch: rows.
        capacity: longest row, in tokens. Memory: 2 * n_layer * n_embd values for each token of each row.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        config = model.config
        shape = (config.n_layer, batch, config.n_head, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=model.device, dtype=model.wte.weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.max_length = 0  # of the rows, kept on the host so that no step waits for the device

    def positions(self, time: int) -> Tensor:
        """Where the next `time` tokens of each row stand: (batch, time)."""
        return self.lengths[:, None] + torch.arange(time, device=self.lengths.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store (batch, n_head, time, head_dim) behind each row; return what a query may look at, and the mask.

        The mask is None where plain causal attention is right: when the rows were empty.
        """
        time = key.shape[2]
        if self.max_length == 0:
            self.keys[layer, :, :, :time] = key
            self.values[layer, :, :, :time] = value
            return key, value, None
        positions = self.positions(time)
        rows = torch.arange(key.shape[0], device=key.device)[:, None]
        self.keys[layer][rows, :, positions] = key.transpose(1, 2)
        self.values[layer][rows, :, positions] = value.transpose(1, 2)
        end = self.max_length + time
        visible = torch.arange(end, device=key.device) <= positions[:, :, None]
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end], visible[:, None]

    def advance(self, time: int) -> None:
        """Count `time` tokens more in every row."""
        self.lengths += time
        self.max_length += time

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how much of each row is real, after right-padded prompts went in: the rest is overwritten."""
        self.lengths.copy_(torch.tensor(lengths))
        self.max_length = max(lengths)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.lengths = self.lengths[rows]


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[str | Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> list[Completion]:
    """Continue each prompt `num_samples` times.

    A row's random numbers depend on `seed` and the row's number alone, so in fp32 its text does not change with
    the rows beside it. Prompts of different lengths go in one batch; a finished row leaves it.

    Args:
        model: its vocabulary must be GPT-2's where prompts are text.
        prompts: text, or token ids. `[[EOT]]` asks for text from nothing.
        num_samples: rows a prompt; the prompt is computed once.
        max_new_tokens: tokens to add, fewer where the model's context ends or it ends the text itself.
        temperature: 0 takes the most likely token.
        top_k: sample from this many most likely tokens; None for all.
        top_p: sample from the smallest set of tokens with this probability (Holtzman et al. 2019).
        min_p: leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024).
        seed: another seed, another text.

    Raises:
        ValueError: an empty prompt, one that fills the context, an id outside the vocabulary, or an option
            that means nothing.
    """
    check_options(temperature, top_k, top_p, min_p, seed)
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples {num_samples} and max_new_tokens {max_new_tokens} must be at least 1")
    if not prompts:
        return []
    ids = [_encode(prompt, model) for prompt in prompts]
    rows = [
        Completion(row=number * num_samples + sample_number, prompt=_decode(prompt_ids))
        for number, prompt_ids in enumerate(ids)
        for sample_number in range(num_samples)
    ]
    noise = torch.from_numpy(np.stack([uniforms(seed, row.row, max_new_tokens) for row in rows])).to(model.device)

    started = time.perf_counter()
    longest = max(map(len, ids))
    capacity = min(model.config.block_size, longest + max_new_tokens)
    cache, logits = _prefill(model, ids, capacity)
    repeated = torch.arange(len(ids), device=model.device).repeat_interleave(num_samples)
    cache.select(repeated)
    logits = logits[repeated]

    running = list(range(len(rows)))
    # A row can grow until the context is full; the cache holds every row up to there.
    room = [min(max_new_tokens, model.config.block_size - len(ids[row // num_samples])) for row in running]
    for step in range(max_new_tokens):
        drawn = sample(
            logits, noise[running, step], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        now = time.perf_counter() - started
        still_running = []
        for place, (row_number, token) in enumerate(zip(running, drawn.tolist(), strict=True)):
            row = rows[row_number]
            if step == 0:
                row.seconds_to_first_token = now
            elif now > row.seconds_to_first_token:
                row.tokens_per_second = step / (now - row.seconds_to_first_token)
            if token == EOT:
                row.finish_reason = "stop"
                continue
            row.tokens.append(token)
            if len(row.tokens) < room[row_number]:
                still_running.append(place)
        if not still_running:
            break
        if len(still_running) < len(running):
            kept = torch.tensor(still_running, device=model.device)
            cache.select(kept)
            drawn = drawn[kept]
            running = [running[place] for place in still_running]
            cache.max_length = max(len(ids[row // num_samples]) + step for row in running)
        logits = model.head(model.hidden(drawn[:, None], cache)[:, -1])

    for row in rows:
        row.text = _decode(row.tokens)
    return rows


def _prefill(model: GPT, ids: list[list[int]], capacity: int) -> tuple[KVCache, Tensor]:
    """Run the prompts, padded on the right, where causal attention never looks: cache and next-token logits."""
    lengths = [len(prompt) for prompt in ids]
    tokens = torch.zeros(len(ids), max(lengths), dtype=torch.long, device=model.device)
    for place, prompt in enumerate(ids):
        tokens[place, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model, len(ids), capacity)
    hidden = model.hidden(tokens, cache)
    cache.set_lengths(lengths)
    last = torch.tensor(lengths, device=model.device) - 1
    return cache, model.head(hidden[torch.arange(len(ids), device=model.device), last])


def _encode(prompt: str | Sequence[int], model: GPT) -> list[int]:
    ids = get_tokenizer().encode_ordinary(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise ValueError("a prompt is empty: for text from nothing give no prompt, or the id of <|endoftext|>")
    if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        raise ValueError(
            f"prompt holds token id {max(ids)}; the model's vocabulary ends at {model.config.vocab_size - 1}"
        )
    if len(ids) >= model.config.block_size:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room in the model's context of {model.config.block_size}"
        )
    return ids


def _decode(ids: Sequence[int]) -> str:
    """Text of ids; a model with a vocabulary of its own can draw ids that GPT-2's tokenizer lacks."""
    tokenizer = get_tokenizer()
    return tokenizer.decode([token for token in ids if token < tokenizer.n_vocab])
