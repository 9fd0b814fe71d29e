"""Text to verified GPT-2 token shards, and batches from them. Without torch.

The public names load on first use, so that `gpt2-data --help` pays for none of them.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_data.build import BuildResult, build
    from gpt2_data.config import BuildConfig
    from gpt2_data.convert import convert
    from gpt2_data.dataset import Dataset, open_dataset
    from gpt2_data.loader import TokenLoader
    from gpt2_data.manifest import verify
    from gpt2_data.prefetch import Prefetch
    from gpt2_data.tokenizer import EOT, encode_documents, get_tokenizer

    __version__: str

__all__ = [
    "EOT",
    "BuildConfig",
    "BuildResult",
    "Dataset",
    "Prefetch",
    "TokenLoader",
    "build",
    "convert",
    "encode_documents",
    "get_tokenizer",
    "open_dataset",
    "verify",
]

_MODULE_OF = {
    "EOT": "tokenizer",
    "BuildConfig": "config",
    "BuildResult": "build",
    "Dataset": "dataset",
    "Prefetch": "prefetch",
    "TokenLoader": "loader",
    "build": "build",
    "convert": "convert",
    "encode_documents": "tokenizer",
    "get_tokenizer": "tokenizer",
    "open_dataset": "dataset",
    "verify": "manifest",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("gpt2-data")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gpt2_data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gpt2_data.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


class _Package(types.ModuleType):
    """Keeps `gpt2_data.build` the function: importing the module of that name would put itself in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
