"""Invariant 5, same text: what a row is does not depend on what is around it. And the ways a row can end."""

import numpy as np
import pytest
import torch

from gpt2_model import EOT, GPT, GPTConfig, KVCache, generate, get_tokenizer, stream
from gpt2_model.cpu.engine import EngineDecoder, Unavailable, library
from gpt2_model.decoding import TorchDecoder
from gpt2_model.sampling import uniforms

PROMPTS = [
    "Hello, I'm", "The quick brown fox jumped over the", "One", "A", "In the year 2026", "x = [", "It", "We are"
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_hf_folder):
    return GPT.from_pretrained(tiny_hf_folder)


@pytest.fixture(params=["engine", "torch"])
def way(request) -> dict[str, bool]:
    """Both decoders: engine.c, and PyTorch's operations."""
    if request.param == "engine":
        try:
            library(torch.float32)
        except Unavailable as reason:
            pytest.skip(f"engine.c cannot be compiled here: {reason}")
    return {"compile": request.param == "engine"}


def texts(model, prompts, **options) -> list[list[int]]:
    return [row.tokens for row in generate(model, prompts, max_new_tokens=24, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
def test_the_same_rows_in_batches_of_1_3_and_8_and_in_another_order(tiny_hf_folder, monkeypatch, dtype) -> None:
    """On the CPU bit by bit: the log-probabilities are equal, not close."""
    model = GPT.from_pretrained(tiny_hf_folder, dtype=dtype)

    def rows(numbers):
        """The rows of these numbers alone: a row's random numbers are those of its number."""
        monkeypatch.setattr(
            "gpt2_model.generation.uniforms", lambda seed, row, count: uniforms(seed, numbers[row], count)
        )
        done = generate(model, [PROMPTS[n] for n in numbers], max_new_tokens=24, seed=7, logprobs=True)
        return {numbers[row.row]: (row.tokens, row.logprobs) for row in done}

    whole = rows(range(8))
    assert len({tuple(tokens) for tokens, _ in whole.values()}) == 8
    for numbers in ([0], [5], [0, 1, 2], [6, 1, 4], [7, 6, 5, 4, 3, 2, 1, 0]):
        assert rows(numbers) == {number: whole[number] for number in numbers}, numbers


def test_samples_are_rows_as_any_other(model, way) -> None:
    samples = texts(model, PROMPTS[:2], num_samples=4, seed=7, **way)
    assert samples == texts(model, [*PROMPTS[:1] * 4, *PROMPTS[1:2] * 4], seed=7, **way)
    assert len(set(map(tuple, samples))) == 8


@pytest.mark.parametrize("share", [1, 2, 3])
def test_shares_of_the_samples_are_the_samples(model, way, share) -> None:
    """As several processes draw them: each so many rows, from its own first row on."""
    options = {"max_new_tokens": 24, "seed": 11, "stop": ["e"], "logprobs": True, **way}
    whole = generate(model, PROMPTS[1:2], num_samples=6, **options)
    firsts = range(0, 6, share)
    parts = [generate(model, PROMPTS[1:2], num_samples=share, first_row=first, **options) for first in firsts]
    joined = [row for part in parts for row in part]
    assert [row.row for row in joined] == list(range(6))
    assert len({tuple(row.tokens) for row in whole}) == 6
    for row, alone in zip(whole, joined, strict=True):
        assert (row.tokens, row.text, row.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
        if way["compile"]:  # the engine's logits are bit-equal in any batch; PyTorch's round as they like
            assert row.logprobs == alone.logprobs
        else:
            assert row.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("decoder", [EngineDecoder, TorchDecoder])
def test_prompts_are_computed_once_and_finished_rows_not_at_all(model, monkeypatch, decoder) -> None:
    prefilled, stepped = [], []
    prefill, step = decoder.prefill, decoder.step
    monkeypatch.setattr(decoder, "prefill", lambda self, ids: prefilled.append(len(ids)) or prefill(self, ids))
    monkeypatch.setattr(decoder, "step", lambda self, ids: stepped.append(len(ids)) or step(self, ids))
    rows = generate(
        model, PROMPTS[:2], num_samples=5, max_new_tokens=30, stop_ids=range(0, 50257, 9), seed=3,
        compile=decoder is EngineDecoder,
    )  # fmt: skip
    assert prefilled == [2]
    # A row is computed once for each of its tokens but the last, which ends it: a stop id is not among them.
    steps = [len(row.tokens) - (row.finish_reason == "length") for row in rows]
    assert len(set(steps)) > 3
    assert stepped == [sum(count >= step for count in steps) for step in range(1, max(steps) + 1)]


def test_both_decoders_write_the_same_and_another_seed_other_text(model) -> None:
    ways = ((3, True), (3, False), (4, True))
    rows, by_torch, other = (texts(model, PROMPTS, seed=seed, compile=engine) for seed, engine in ways)
    assert rows == by_torch != other


def test_a_long_prompt_goes_in_by_parts(model, way) -> None:
    """256 tokens at a time; here prompts of 700 beside short ones."""
    long = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=500, block_size=1024))
    prompts = [[n % 500 for n in range(700)], [1, 2], [n % 499 for n in range(600)]]
    with torch.inference_mode():
        expected = [long(torch.tensor([prompt]))[0][0, -1].argmax().item() for prompt in prompts]
    rows = generate(long, prompts, max_new_tokens=3, temperature=0, stop_ids=(), **way)
    assert [row.tokens[0] for row in rows] == expected
    alone = generate(long, prompts[2:], max_new_tokens=3, temperature=0, stop_ids=(), **way)
    assert alone[0].tokens == rows[2].tokens


def test_cached_steps_give_the_logits_of_the_whole_sequence(model) -> None:
    tokens = torch.randint(0, 50257, (3, 30))
    with torch.inference_mode():
        expected = model(tokens)[0]
        cache = KVCache(model, batch=3, capacity=30)
        parts = [model.head(model.hidden(part, cache)) for part in (tokens[:, :11], tokens[:, 11:17])]
        parts += [model.head(model.hidden(tokens[:, t : t + 1], cache)) for t in range(17, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)


def test_rows_end_where_the_context_ends(model, way) -> None:
    long, short = [5] * 120, [5] * 10  # of 128
    rows = generate(model, [long, short], max_new_tokens=200, temperature=0.5, **way)
    assert [len(row.tokens) for row in rows] == [8, 118]
    assert [row.finish_reason for row in rows] == ["length", "length"]


def test_sliding_goes_on_from_the_half_of_the_context_that_came_last(model, way) -> None:
    """The tokens after a slide are those that the kept half alone would have as its greedy continuation."""
    prompts = [[5] * 100, [7, 8, 9], [11] * 300]
    rows = generate(model, prompts, max_new_tokens=150, temperature=0, stop_ids=(), slide=True, **way)
    assert [len(row.tokens) for row in rows] == [150] * 3
    whole = prompts[0] + rows[0].tokens
    # When 128 tokens are in and one more is drawn, the last 64 begin anew, and it follows them.
    again = generate(model, [whole[64:129]], max_new_tokens=20, temperature=0, stop_ids=(), **way)
    assert whole[129:149] == again[0].tokens
    cut = generate(model, [prompts[2][-64:]], max_new_tokens=10, temperature=0, stop_ids=(), **way)
    assert rows[2].tokens[:10] == cut[0].tokens
    assert rows[2].prompt == get_tokenizer().decode(prompts[2])  # as it was given


def test_stop_ids_end_rows_at_different_steps(model, way) -> None:
    stops = range(0, 50257, 9)
    rows = generate(model, PROMPTS, max_new_tokens=40, seed=3, stop_ids=stops, logprobs=True, **way)
    assert {row.finish_reason for row in rows} == {"stop", "length"} or len({len(row.tokens) for row in rows}) > 3
    assert all(token % 9 for row in rows for token in row.tokens)
    assert all(len(row.logprobs) == len(row.tokens) for row in rows)
    free = generate(model, PROMPTS, max_new_tokens=40, seed=3, stop_ids=(), **way)
    for row, whole in zip(rows, free, strict=True):  # up to its end a row is what it is without ends
        assert row.tokens == whole.tokens[: len(row.tokens)]
        assert row.finish_reason == "length" or whole.tokens[len(row.tokens)] % 9 == 0


class Script(GPT):
    """A model that writes what it is told to, whatever came before."""

    def __init__(self, *ids: list[int]) -> None:
        super().__init__(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=128))
        self.ids, self.step = ids, -1

    def head(self, hidden):
        self.step += 1
        logits = torch.zeros(hidden.shape[0], 50257)
        for row in range(hidden.shape[0]):
            script = self.ids[row % len(self.ids)]
            logits[row, script[min(self.step, len(script) - 1)]] = 10
        return logits


def test_end_of_text_stops_unless_told_otherwise() -> None:
    (row,) = generate(Script([5, EOT]), ["Hi"], temperature=0, compile=False)
    assert (row.tokens, row.finish_reason) == ([5], "stop")
    (row,) = generate(Script([5, EOT]), ["Hi"], max_new_tokens=3, temperature=0, stop_ids=(), compile=False)
    assert row.tokens == [5, EOT, EOT]


def write(text: str | list[int], **options):
    ids = get_tokenizer().encode_ordinary(text) if isinstance(text, str) else text
    pieces = list(stream(Script(ids), ["x"], max_new_tokens=len(ids), temperature=0, compile=False, **options))
    completion = pieces[-1].completion
    assert completion is not None
    assert "".join(piece.text for piece in pieces) == completion.text
    return [piece.text for piece in pieces], completion


def test_a_stop_string_across_tokens_is_found_and_never_shown() -> None:
    text = "One two three.\n\nUser: and four"
    pieces, completion = write(text, stop=["\nUser:", "never"])
    assert (completion.text, completion.finish_reason) == ("One two three.\n", "stop")
    assert all("U" not in piece for piece in pieces)
    assert get_tokenizer().decode(completion.tokens).endswith("User:")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab aaab", ["aab"], "a"),  # the first a is no beginning of the match: a naive matcher misses it
        ("ababac", ["abac"], "ab"),
        ("xyz", ["xyzzy", "yz"], "x"),  # a longer one only begins
        ("abc", ["c", "b"], "a"),  # the one that comes first in the text
        ("no match", ["matches"], "no match"),  # what was held back comes at the end
        ("abc", ["abc"], ""),
        ("Hello wonderful world", ["der"], "Hello won"),  # in the middle of a token
    ],
)
def test_stop_strings(text, stop, expected) -> None:
    by_character = [get_tokenizer().encode_ordinary(char)[0] for char in text]
    for ids in (by_character, text):
        _, completion = write(ids, stop=stop)
        assert completion.text == expected
        assert completion.finish_reason == ("length" if expected == text else "stop")


def test_streams_never_show_half_a_character() -> None:
    text = "naïve 日本語 🙂🏽 end"
    ids = get_tokenizer().encode_ordinary(text)
    alone = [get_tokenizer().decode([token]) for token in ids]
    assert sum("�" in token for token in alone) >= 6  # so many tokens are no text by themselves
    pieces, completion = write(text)
    assert completion.text == text
    assert not any("�" in piece for piece in pieces)
    broken = ids[: ids.index(get_tokenizer().encode_ordinary("🙂")[0]) + 1]  # ends within the emoji
    _, completion = write(broken)
    assert completion.text == get_tokenizer().decode(broken)
    assert completion.text.endswith("�")


def test_the_text_is_the_tokenizers_decode() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        ids = random.integers(0, EOT, 30).tolist()
        assert write(ids)[1].text == get_tokenizer().decode(ids)


def test_streamed_rows_are_the_generated_ones(model) -> None:
    options = {"num_samples": 2, "first_row": 10, "max_new_tokens": 12, "seed": 4, "stop": [" a", "e"]}
    pieces = list(stream(model, PROMPTS, **options))
    rows = generate(model, PROMPTS, **options)
    assert [(row.row, row.prompt) for row in rows] == [(10 + n, PROMPTS[n // 2]) for n in range(16)]
    for row in rows:
        *some, last = (piece for piece in pieces if piece.row == row.row)
        assert (last.completion.row, last.completion.tokens) == (row.row, row.tokens)
        assert "".join(piece.text for piece in [*some, last]) == row.text
        assert not any(piece.completion for piece in some)


def test_logprobs_are_those_of_the_model(model, way) -> None:
    row = generate(model, ["Hello"], max_new_tokens=10, temperature=3.0, top_k=5, logprobs=True, **way)[0]
    ids = torch.tensor([get_tokenizer().encode_ordinary("Hello") + row.tokens])
    with torch.no_grad():
        expected = model(ids)[0].log_softmax(-1)[0, -11:-1].gather(1, ids[0, -10:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=1e-4)
    assert generate(model, ["Hello"], max_new_tokens=2)[0].logprobs is None


def test_repetition_penalty_makes_a_loop_end(model, way) -> None:
    plain, penalised = (
        generate(model, ["A"], max_new_tokens=60, temperature=0, stop_ids=(), repetition_penalty=penalty, **way)[0]
        for penalty in (1.0, 50.0)
    )
    assert len(set(plain.tokens)) < 60  # a small greedy model repeats itself
    assert len(set(penalised.tokens)) == 60


def test_ids_beyond_gpt2s_vocabulary_are_never_drawn(way) -> None:
    """50,304 rows are GPT-2's 50,257 rounded up; here the 47 that are no tokens are the likeliest."""
    padded = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=50304, block_size=32))
    with torch.no_grad():
        padded.ln_f.weight.zero_()
        padded.ln_f.bias.fill_(1.0)
        padded.wte.weight[50257:] = 5.0
    for options in ({"temperature": 0}, {"top_k": None, "temperature": 5.0}, {"repetition_penalty": 2.0}):
        rows = generate(padded, [[1], [2], [3]], max_new_tokens=20, logprobs=True, **options, **way)
        assert max(max(row.tokens) for row in rows) < 50257
        assert min(min(row.logprobs) for row in rows) > -15


def test_model_with_its_own_vocabulary(way) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=300, block_size=16))
    row = generate(model, [[1, 2, 3]], max_new_tokens=5, **way)[0]
    assert len(row.tokens) == 5
    assert max(row.tokens) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or a positive number, not -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
        ({"min_p": 2.0}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"seed": -1}, "seed must be between 0"),
        ({"num_samples": 0}, "num_samples 0 and max_new_tokens 64 must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"stop": [""]}, "stop must be a list of non-empty strings"),
        ({"stop": "text"}, "stop must be a list"),
        ({"stop_ids": (60000,)}, "stop_ids .60000. must all be below the vocabulary size, 50257"),
    ],
)
def test_nonsense_options_are_refused(model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        stream(model, ["a"], **options)  # at once, before anything is asked of the iterator


def test_nonsense_prompts_are_refused(model) -> None:
    for prompts, message in (
        (["fine", ""], "a prompt is empty"),
        ([[1] * 128], "a prompt of 128 tokens leaves no room in the model's context of 128"),
        ([[50257]], "token id 50257; the model's vocabulary ends at 50256"),
        ([[5, -1]], "token id -1;"),
        ("Hello", r"prompts must be a list: \[prompt\] for one"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts)
    assert generate(model, []) == []


def test_a_model_that_computes_nan_is_said_to(model, way) -> None:
    broken = GPT(model.config)
    torch.nn.init.constant_(broken.h[1].mlp.c_fc.bias, float("nan"))
    with pytest.raises(ValueError, match="the model computes NaN"):
        generate(broken, ["Hi"], **way)
