"""Exact GPT-2 in PyTorch: `GPT.from_pretrained("gpt2")`, `generate(model, ["Hello"])`.

Names are imported on first use, so that `gpt2-model --help` does not wait two seconds for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_model.cache import KVCache
    from gpt2_model.config import EOT, PRESETS, GPTConfig, flops_per_token
    from gpt2_model.generation import Completion, Piece, generate, stream
    from gpt2_model.model import GPT
    from gpt2_model.tokenizer import Tokenizer, get_tokenizer, load_tokenizer

    __version__: str

__all__ = ["EOT", "GPT", "PRESETS", "Completion", "GPTConfig", "KVCache", "Piece", "Tokenizer", "flops_per_token",
           "generate", "get_tokenizer", "load_tokenizer", "stream"]  # fmt: skip
_MODULE_OF = {"EOT": "config", "GPT": "model", "PRESETS": "config", "Completion": "generation",
              "GPTConfig": "config", "KVCache": "cache", "Piece": "generation", "Tokenizer": "tokenizer",
              "flops_per_token": "config", "generate": "generation", "get_tokenizer": "tokenizer",
              "load_tokenizer": "tokenizer", "stream": "generation"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-model")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
