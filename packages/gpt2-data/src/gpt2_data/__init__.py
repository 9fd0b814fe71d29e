"""Turn text into verified GPT-2 token shards, and read batches from them, without torch.

Names are imported on first use, so that `gpt2-data --help` pays for none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_data.building.build import BuildResult, build
    from gpt2_data.building.config import BuildConfig
    from gpt2_data.conversion import convert
    from gpt2_data.dataset import Dataset, open_dataset
    from gpt2_data.formats.verification import verify
    from gpt2_data.loader import Prefetch, TokenLoader
    from gpt2_data.sources.hub import fetch
    from gpt2_data.tokenizer import EOT, encode_documents, get_tokenizer

    __version__: str

__all__ = ["EOT", "BuildConfig", "BuildResult", "Dataset", "Prefetch", "TokenLoader", "build", "convert",
           "encode_documents", "fetch", "get_tokenizer", "open_dataset", "verify"]  # fmt: skip
_MODULE_OF = {
    **dict.fromkeys(("BuildResult", "build"), "building.build"),
    **dict.fromkeys(("Dataset", "open_dataset"), "dataset"),
    **dict.fromkeys(("Prefetch", "TokenLoader"), "loader"),
    **dict.fromkeys(("EOT", "encode_documents", "get_tokenizer"), "tokenizer"),
    "BuildConfig": "building.config",
    "convert": "conversion",
    "fetch": "sources.hub",
    "verify": "formats.verification",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-data")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
