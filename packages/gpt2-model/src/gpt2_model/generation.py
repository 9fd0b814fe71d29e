"""Text from a model: prompts in, completions out, all at once or as they come."""

import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor

from gpt2_model.cpu.engine import EngineDecoder
from gpt2_model.decoding import TorchDecoder, make_decoder
from gpt2_model.model import GPT
from gpt2_model.sampling import Sampling, penalize, sample, uniforms
from gpt2_model.tokenizer import Tokenizer, whole_characters

P = ParamSpec("P")


@dataclass
class Completion:
    """One row of `generate`, finished.

    Attributes:
        row: first_row + prompt number * num_samples + sample number.
        prompt: the prompt as text.
        text: the new text, without the prompt, the end-of-text token and the stop string.
        tokens: the ids drawn, without the stop id; with a stop string, up to the token that completed it.
        finish_reason: "stop" (a stop id or string) or "length" (max_new_tokens or the context is used up).
        tokens_per_second: new tokens after the first, over the time they took; 0 where there are none.
        seconds_to_first_token: the time includes the prompts, but neither loading nor compiling.
        logprobs: if asked for, the log-probability (nats) of each of `tokens` under the model itself, before
            temperature, penalty and truncation.
    """

    row: int
    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0
    seconds_to_first_token: float = 0.0
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Piece:
    """Some text of one row, as `stream` yields it. A row's last piece, maybe empty, has its `completion`."""

    row: int
    text: str
    completion: Completion | None = None


@dataclass
class _Row:
    """A row that is still growing."""

    completion: Completion
    context: list[int]  # prompt and new tokens
    numbers: np.ndarray  # its own random numbers, one for each token that it may draw
    cached: int  # number of its tokens that the decoder holds
    characters: Callable[[int | None], str]  # the text that a token adds; None for the end
    pending: str = ""  # text that may be the beginning of a stop string

    def add(
        self, token: int, logprob: float, seconds: float, stop: Sequence[str], stop_ids: Set[int]
    ) -> tuple[str, bool]:
        """Add the next token; return the text that can be shown, and True if the row is finished."""
        done, text = self.completion, self.pending
        if not done.tokens:
            done.seconds_to_first_token = seconds
        elif seconds > done.seconds_to_first_token:
            done.tokens_per_second = len(done.tokens) / (seconds - done.seconds_to_first_token)
        if token in stop_ids:
            done.finish_reason = "stop"
        else:
            done.tokens.append(token)
            self.context.append(token)
            if done.logprobs is not None:
                done.logprobs.append(logprob)
            text += self.characters(token)
        last = done.finish_reason == "stop" or len(done.tokens) == len(self.numbers)
        text += self.characters(None) if last else ""
        places = [place for string in stop if (place := text.find(string)) >= 0]
        if places:
            text, last = text[: min(places)], True
            done.finish_reason = "stop"
        ends = (size for size in range(len(text), 0, -1) if any(s.startswith(text[-size:]) for s in stop))
        overlap = 0 if last else next(ends, 0)
        shown, self.pending = text[: len(text) - overlap], text[len(text) - overlap :]
        done.text += shown
        return shown, last


def stream(
    model: GPT,
    prompts: Sequence[str | Sequence[int]],
    *,
    num_samples: int = 1,
    first_row: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    slide: bool = False,
    compile: bool | None = None,
) -> Iterator[Piece]:
    """Continue each prompt `num_samples` times; yield the text as it comes, in whole characters.

    Errors are raised at once, not with the first piece. A row's random numbers depend on `seed` and the row's
    number alone, so its text does not change with the rows beside it: on the CPU its logits are equal to the last
    bit, elsewhere up to rounding, which can let another token win.

    Args:
        model: its `tokenizer` is needed if prompts are text.
        prompts: text, or token ids. `[[model.tokenizer.eot]]` asks for text without a prompt.
        num_samples: rows per prompt; the prompt is computed once.
        first_row: number of the first row, so that processes can share the samples of a prompt.
        max_new_tokens: tokens to add; fewer if the context is full or the model ends the text.
        temperature: 0 takes the most likely token.
        top_k: sample from this many most likely tokens; None for all.
        top_p: sample from the smallest set of tokens with this probability (Holtzman et al. 2019).
        min_p: leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024).
        repetition_penalty: above 1 makes earlier tokens less likely, at temperature 0 too (Keskar et al. 2019).
        seed: another seed gives another text.
        stop: end a row where one of these strings appears, even in the middle of a token; it is not in the text.
        stop_ids: end a row at one of these tokens; None for the model's own, GPT-2's `<|endoftext|>`; () for none.
        logprobs: also return the log-probability of each token.
        slide: when the context is full, continue from its last half, which is computed again, instead of stopping.
        compile: see `make_decoder`; the default is the fastest way that starts at once.

    Raises:
        ValueError: a prompt is empty or fills the context, an id or option is invalid, or logits are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples {num_samples} and max_new_tokens {max_new_tokens} must be at least 1")
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop must be a list of non-empty strings, not {stop!r}")
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list: [prompt] for one")
    size, context = model.config.vocab_size, model.config.block_size
    stop_ids = end_ids(model) if stop_ids is None else stop_ids
    if not all(0 <= token < size for token in stop_ids):
        raise ValueError(f"stop_ids {list(stop_ids)} must all be below the vocabulary size, {size}")
    rows: list[_Row] = []
    text_needed = bool(stop) or any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = model.text_tokenizer() if text_needed else _usable(model)
    for prompt in prompts:
        whole, text = _encode(prompt, tokenizer, model, slide)
        ids = whole if len(whole) < context else whole[-max(1, context // 2) :]
        room = max_new_tokens if slide else min(max_new_tokens, context - len(ids))
        for _ in range(num_samples):
            number = first_row + len(rows)
            completion = Completion(number, text, logprobs=[] if logprobs else None)
            characters = tokenizer.stream(whole) if tokenizer else lambda _: ""
            rows.append(_Row(completion, list(ids), uniforms(seed, number, room), len(ids), characters))
    return _run(model, rows, num_samples, sampling, stop, frozenset(stop_ids), compile) if rows else iter(())


def _collecting(stream: Callable[P, Iterator[Piece]]) -> Callable[P, list[Completion]]:
    """Return a function with the parameters of `stream` that returns all of its completions at once."""

    @wraps(stream, assigned=())  # the parameters of `stream`, but a name and a docstring of its own
    def generate(*args: P.args, **kwargs: P.kwargs) -> list[Completion]:
        """Return the completions of `stream`, ordered by row. Arguments and errors are those of `stream`."""
        rows = [piece.completion for piece in stream(*args, **kwargs) if piece.completion]
        return sorted(rows, key=lambda row: row.row)

    return generate


generate = _collecting(stream)


@torch.inference_mode()
def _run(
    model: GPT, rows: list[_Row], num_samples: int, sampling: Sampling, stop: Sequence[str], stop_ids: Set[int],
    compile: bool | None,
) -> Iterator[Piece]:  # fmt: skip
    """Yield the pieces of `stream`, which has checked the arguments."""
    device, context = model.device, model.config.block_size
    capacity = min(context, max(len(row.context) + len(row.numbers) for row in rows))
    decoder = make_decoder(model, capacity, compile)
    tokenizer = _usable(model)
    seen = None if sampling.repetition_penalty == 1 else _only_tokens(_seen(rows, model), tokenizer)

    started = time.perf_counter()
    logits = decoder.prefill([row.context for row in rows[::num_samples]])
    if not logits.amax(-1).isfinite().all():  # amax passes NaN on, and lets the -inf of padding ids be
        raise ValueError("the model computes NaN or inf: its weights are damaged, or too large for this dtype")
    if num_samples > 1:
        copies = [place // num_samples for place in range(len(rows))]
        decoder.select(copies)
        logits = logits[copies]

    for step in count():
        logits = _only_tokens(logits, tokenizer)
        adjusted = logits if seen is None else penalize(logits, seen, sampling.repetition_penalty)
        noise = torch.from_numpy(np.array([row.numbers[step] for row in rows])).to(device)
        drawn = sample(adjusted, noise, sampling)
        chosen = [0.0] * len(rows)
        if rows[0].completion.logprobs is not None:
            chosen = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0].tolist()
        now = time.perf_counter() - started
        growing = []
        for place, (row, token, logprob) in enumerate(zip(rows, drawn.tolist(), chosen, strict=True)):
            shown, finished = row.add(token, logprob, now, stop, stop_ids)
            if shown or finished:
                yield Piece(row.completion.row, shown, row.completion if finished else None)
            if not finished:
                growing.append(place)
        if not growing:
            return
        if len(growing) < len(rows):
            rows = [rows[place] for place in growing]
            decoder.select(growing)
            seen = None if seen is None else seen[growing]
        if seen is not None:
            last = torch.tensor([row.context[-1] for row in rows], device=device)
            seen.scatter_(1, last[:, None], True)
        logits = _step(decoder, rows, context)


def _step(decoder: EngineDecoder | TorchDecoder, rows: list[_Row], context: int) -> Tensor:
    """Give the decoder each row's last token. A row that fills the context begins again with its last half."""
    for place, row in enumerate(rows):
        if row.cached == context:
            half = row.context[-(context // 2) - 1 : -1]
            decoder.refill(place, half)
            row.cached = len(half)
        row.cached += 1
    return decoder.step([row.context[-1] for row in rows])


def _seen(rows: list[_Row], model: GPT) -> Tensor:
    """Return a mask, (rows, vocabulary), True for the tokens of the prompt."""
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
    for place, row in enumerate(rows):
        seen[place, row.context] = True
    return seen.to(model.device)


def _only_tokens(logits: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Leave out what the tokenizer has no token for: it pads the vocabulary, and no text has it."""
    if tokenizer is None:
        return logits
    logits = logits[:, : tokenizer.num_tokens]
    if tokenizer.holes:
        lowest = False if logits.dtype == torch.bool else -torch.inf
        logits = logits.index_fill(1, torch.tensor(tokenizer.holes, device=logits.device), lowest)
    return logits


def end_ids(model: GPT) -> list[int]:
    """Return the ids that end a text by default: those that the model's folder or tokenizer names."""
    own = model.special_ids.eos if model.tokenizer is None else model.tokenizer.stop_ids
    return [token for token in own if token < model.config.vocab_size]


def first_id(model: GPT) -> int:
    """Return the id from which a text without a prompt begins."""
    ids, tokenizer = model.special_ids, model.tokenizer
    first = tokenizer.eot if tokenizer else next(iter((*ids.bos, *ids.eos)), None)
    if first is None or first >= model.config.vocab_size:
        raise ValueError("the model's files name no token that a text begins with: give a prompt")
    return first


def _usable(model: GPT) -> Tokenizer | None:
    """Return the model's tokenizer, or None if it has none that can be followed."""
    return None if model.tokenizer is None or model.tokenizer.problem else model.tokenizer


def _encode(
    prompt: str | Sequence[int], tokenizer: Tokenizer | None, model: GPT, slide: bool
) -> tuple[list[int], str]:
    """Return the ids of a prompt, checked, and its text."""
    ids = tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else [*prompt]
    size, context = model.config.vocab_size, model.config.block_size
    if not ids:
        first = "[[model.tokenizer.eot]]"
        raise ValueError(f"a prompt is empty: to write from nothing, give no prompt (in Python, {first})")
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise ValueError(f"prompt holds token id {wrong[0]}; the model's vocabulary ends at {size - 1}")
    if len(ids) >= context and not slide:
        full = f"a prompt of {len(ids)} tokens leaves no room in the model's context of {context}"
        raise ValueError(f"{full}: shorten it, or continue from its last half (--slide)")
    if isinstance(prompt, str):
        return ids, whole_characters(prompt)
    return ids, tokenizer.decode(ids) if tokenizer else ""
