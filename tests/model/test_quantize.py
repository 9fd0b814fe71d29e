"""int8 weights: what they are, and what they cost on real text."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gpt2_model import GPT, GPTConfig
from gpt2_model.cpu.int8 import Int8Embedding, Int8Linear, Int8Matrix, quantize
from gpt2_model.decoding import dequantize, make_decoder


def test_weights_are_within_half_a_step() -> None:
    weight = torch.randn(50, 37) * torch.logspace(-3, 1, 50)[:, None]
    weight[7] = 0
    layer = Int8Linear(weight, torch.randn(50))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= 0.5001 * step).all()
    x = torch.randn(3, 4, 37)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    ids = torch.randint(0, 50, (2, 5))
    torch.testing.assert_close(Int8Embedding(weight)(ids), layer.weight[ids])


def test_dequantized_is_the_same_function(tiny_hf_folder) -> None:
    model = GPT.from_pretrained(tiny_hf_folder, dtype=torch.int8)
    plain = dequantize(model)
    assert not any(isinstance(part, Int8Matrix) for part in plain.modules())
    tokens = torch.randint(0, 50257, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(plain(tokens)[0], model(tokens)[0], rtol=0, atol=1e-5)
    decoder = make_decoder(model, 30, compile=False)
    assert isinstance(decoder._model.wte, torch.nn.Embedding)  # not turned into fp32 anew at each step


def test_int8_models_are_for_running_alone(tiny_hf_folder, tmp_path) -> None:
    model = GPT.from_pretrained(tiny_hf_folder, dtype=torch.int8)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="an int8 model cannot be saved"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_loss_on_real_text_is_that_of_fp32() -> None:
    """A model trained on the bytes of the standard library's sources, on some that it has not seen: within 0.5 %
    of fp32 (it was 0.01), by the module and by engine.c with its 16-bit activations."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parents[1].glob("[a-m]*.py")))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=96, block_size=128, vocab_size=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        starts = torch.randint(0, len(ids) - 20_000, (16,))
        batch = torch.stack([ids[start : start + 129] for start in starts])
        _, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = ids[-128 * 128 - 1 :]
    tokens, targets = held_out[:-1].view(-1, 128), held_out[1:].view(-1, 128)

    def engine_loss(model: GPT) -> float:
        decoder = make_decoder(model, 128, compile=None)
        logits = [decoder.prefill(tokens[::8, :1].tolist())]
        logits += [decoder.step(tokens[::8, place].tolist()) for place in range(1, 128)]
        return F.cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets[::8].flatten()).item()

    with torch.inference_mode():
        exact, exact_engine = model(tokens, targets)[1].item(), engine_loss(model)
        quantize(model)
        rounded, rounded_engine = model(tokens, targets)[1].item(), engine_loss(model)
    assert exact < 2.7  # nats a byte: it has learned, from 5.5
    assert abs(rounded / exact - 1) < 0.005, (exact, rounded)
    assert abs(rounded_engine / exact_engine - 1) < 0.005, (exact_engine, rounded_engine)
