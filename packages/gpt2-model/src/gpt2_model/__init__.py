"""Exact GPT-2 in PyTorch: `GPT.from_pretrained("gpt2")`, `generate(model, ["Hello"])`.

Names are imported on first use, so that `gpt2-model --help` does not wait two seconds for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_model.cache import KVCache as KVCache
    from gpt2_model.config import PRESETS as PRESETS
    from gpt2_model.config import GPTConfig as GPTConfig
    from gpt2_model.config import flops_per_token as flops_per_token
    from gpt2_model.generation import Completion as Completion
    from gpt2_model.generation import Piece as Piece
    from gpt2_model.generation import generate as generate
    from gpt2_model.generation import stream as stream
    from gpt2_model.model import GPT as GPT
    from gpt2_model.tokenizer import EOT as EOT
    from gpt2_model.tokenizer import get_tokenizer as get_tokenizer

__version__ = version("gpt2-model")

_MODULE_OF = {
    "PRESETS": "config",
    "GPTConfig": "config",
    "flops_per_token": "config",
    "Completion": "generation",
    "Piece": "generation",
    "generate": "generation",
    "stream": "generation",
    "KVCache": "cache",
    "GPT": "model",
    "EOT": "tokenizer",
    "get_tokenizer": "tokenizer",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
