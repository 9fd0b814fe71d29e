"""Turn text into verified GPT-2 token shards, and read batches from them, without torch.

The public names load on first use, so that `gpt2-data --help` pays for none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult as BuildResult
    from gpt2_data.building.build import build as build
    from gpt2_data.building.config import BuildConfig as BuildConfig
    from gpt2_data.conversion import convert as convert
    from gpt2_data.dataset import Dataset as Dataset
    from gpt2_data.dataset import open_dataset as open_dataset
    from gpt2_data.formats.verification import verify as verify
    from gpt2_data.loader import Prefetch as Prefetch
    from gpt2_data.loader import TokenLoader as TokenLoader
    from gpt2_data.sources.hub import fetch as fetch
    from gpt2_data.tokenizer import EOT as EOT
    from gpt2_data.tokenizer import encode_documents as encode_documents
    from gpt2_data.tokenizer import get_tokenizer as get_tokenizer

    __version__: str

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
    "fetch": "sources.hub",
    "get_tokenizer": "tokenizer",
    "open_dataset": "dataset",
    "verify": "formats.verification",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms of help's half second

        return version("gpt2-data")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gpt2_data.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
