"""GPT-2 pretraining: `torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data DIR --out RUN`.

Names are imported on first use, so that `gpt2-train --help` does not wait two seconds for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_train.checkpoint import find_checkpoint, verify_checkpoint
    from gpt2_train.config import RECIPES, TrainConfig, load_config
    from gpt2_train.distributed import World
    from gpt2_train.loop import train
    from gpt2_train.optimizer import lr_at, make_optimizer

    __version__: str

__all__ = ["RECIPES", "TrainConfig", "World", "find_checkpoint", "load_config", "lr_at", "make_optimizer", "train",
           "verify_checkpoint"]  # fmt: skip
_MODULE_OF = {
    **dict.fromkeys(("find_checkpoint", "verify_checkpoint"), "checkpoint"),
    **dict.fromkeys(("RECIPES", "TrainConfig", "load_config"), "config"),
    **dict.fromkeys(("lr_at", "make_optimizer"), "optimizer"),
    "World": "distributed",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-train")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
