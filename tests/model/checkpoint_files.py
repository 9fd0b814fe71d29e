"""Small checkpoints on disk, for tests of what loads and what is refused."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from gpt2_model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"  # the first tensor: 100 x 32 fp32, 12,800 bytes


def random_model() -> GPT:
    """A small model, with biases and norms other than zeros and ones, which hide mistakes."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def as_file(folder: Path, content: object, name: str = "pytorch_model.bin", **options) -> Path:
    """Put a file of torch.save in the place of a folder's weights."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / name, **options)
    return folder / name


def refused(path: Path | str, message: str) -> None:
    for read in (GPT.from_pretrained, GPT.inspect):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            read(path)
        text = str(caught.value)
        assert text.isprintable()
        assert len(text) < 500
