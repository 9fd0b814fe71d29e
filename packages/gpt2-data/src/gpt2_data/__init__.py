"""Text to verified GPT-2 token shards, and batches from them. Without torch.

The public names load on first use, so that `gpt2-data --help` pays for none of them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult, build
    from gpt2_data.building.config import BuildConfig
    from gpt2_data.conversion import convert
    from gpt2_data.dataset import Dataset, open_dataset
    from gpt2_data.formats.verification import verify
    from gpt2_data.loader import Prefetch, TokenLoader
    from gpt2_data.sources.download import fetch
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
    "fetch",
    "get_tokenizer",
    "open_dataset",
    "verify",
]

_MODULE_OF = {
    "EOT": "tokenizer",
    "BuildConfig": "building.config",
    "BuildResult": "building.build",
    "Dataset": "dataset",
    "Prefetch": "loader",
    "TokenLoader": "loader",
    "build": "building.build",
    "convert": "conversion",
    "encode_documents": "tokenizer",
    "fetch": "sources.download",
    "get_tokenizer": "tokenizer",
    "open_dataset": "dataset",
    "verify": "formats.verification",
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
