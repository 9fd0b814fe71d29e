"""HellaSwag and validation loss for GPT-2: `evaluate_hellaswag(model, "hellaswag_val.jsonl")`.

Names are imported on first use, so that `gpt2-eval --help` does not wait two seconds for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_eval.hellaswag import HellaSwag as HellaSwag
    from gpt2_eval.hellaswag import evaluate_hellaswag as evaluate_hellaswag
    from gpt2_eval.hellaswag import load_hellaswag as load_hellaswag
    from gpt2_eval.loss import evaluate_loss as evaluate_loss
    from gpt2_eval.packing import Row as Row
    from gpt2_eval.packing import RowScore as RowScore
    from gpt2_eval.ranks import Interrupted as Interrupted
    from gpt2_eval.report import HellaSwagResult as HellaSwagResult
    from gpt2_eval.report import LossResult as LossResult
    from gpt2_eval.scoring import score_items as score_items

    __version__: str

_MODULE_OF = {
    "HellaSwag": "hellaswag",
    "HellaSwagResult": "report",
    "Interrupted": "ranks",
    "LossResult": "report",
    "Row": "packing",
    "RowScore": "packing",
    "evaluate_hellaswag": "hellaswag",
    "evaluate_loss": "loss",
    "load_hellaswag": "hellaswag",
    "score_items": "scoring",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-eval")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
