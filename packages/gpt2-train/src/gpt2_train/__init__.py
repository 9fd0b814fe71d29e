"""GPT-2 pretraining: `torchrun --standalone --nproc_per_node=8 -m gpt2_train --recipe 124M --data DIR --out RUN`.

Names are imported on first use, so that `gpt2-train --help` does not wait two seconds for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_train.checkpoint import find_checkpoint as find_checkpoint
    from gpt2_train.checkpoint import verify_checkpoint as verify_checkpoint
    from gpt2_train.config import RECIPES as RECIPES
    from gpt2_train.config import TrainConfig as TrainConfig
    from gpt2_train.config import load_config as load_config
    from gpt2_train.distributed import World as World
    from gpt2_train.loop import train as train
    from gpt2_train.optimizer import lr_at as lr_at
    from gpt2_train.optimizer import make_optimizer as make_optimizer

    __version__: str

_NAMES = {
    "checkpoint": ("find_checkpoint", "verify_checkpoint"),
    "config": ("RECIPES", "TrainConfig", "load_config"),
    "distributed": ("World",),
    "loop": ("train",),
    "optimizer": ("lr_at", "make_optimizer"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-train")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
