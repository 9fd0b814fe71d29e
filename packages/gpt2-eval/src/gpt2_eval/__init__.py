"""HellaSwag and validation loss for GPT-2: `evaluate_hellaswag(model, "hellaswag_val.jsonl")`.

Names are imported on first use, so that `gpt2-eval --help` does not wait two seconds for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss import evaluate_loss as evaluate_loss
    from .report import HellaSwagResult as HellaSwagResult
    from .report import LossResult as LossResult
    from .scoring import Interrupted as Interrupted
    from .scoring import Row as Row
    from .scoring import score_rows as score_rows
    from .tasks import evaluate_hellaswag as evaluate_hellaswag
    from .tasks import load_hellaswag as load_hellaswag

__version__ = version("gpt2-eval")

_MODULE_OF = {
    "HellaSwagResult": "report",
    "Interrupted": "scoring",
    "LossResult": "report",
    "Row": "scoring",
    "evaluate_hellaswag": "tasks",
    "evaluate_loss": "loss",
    "load_hellaswag": "tasks",
    "score_rows": "scoring",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
