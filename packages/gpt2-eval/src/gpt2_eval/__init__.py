"""HellaSwag and validation loss for GPT-2: `evaluate_hellaswag(model, "hellaswag_val.jsonl")`.

Names are imported on first use, so that `gpt2-eval --help` does not wait two seconds for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_eval.hellaswag import HellaSwag, evaluate_hellaswag, load_hellaswag
    from gpt2_eval.loss import evaluate_loss
    from gpt2_eval.packing import Row, RowScore
    from gpt2_eval.ranks import Interrupted
    from gpt2_eval.rendezvous import join_ranks, read_ranks
    from gpt2_eval.report import HellaSwagResult, LossResult
    from gpt2_eval.scoring import score_items

    __version__: str

__all__ = ["HellaSwag", "HellaSwagResult", "Interrupted", "LossResult", "Row", "RowScore", "evaluate_hellaswag",
           "evaluate_loss", "join_ranks", "load_hellaswag", "read_ranks", "score_items"]  # fmt: skip
_MODULE_OF = {
    **dict.fromkeys(("HellaSwag", "evaluate_hellaswag", "load_hellaswag"), "hellaswag"),
    **dict.fromkeys(("HellaSwagResult", "LossResult"), "report"),
    **dict.fromkeys(("Row", "RowScore"), "packing"),
    **dict.fromkeys(("join_ranks", "read_ranks"), "rendezvous"),
    "Interrupted": "ranks",
    "evaluate_loss": "loss",
    "score_items": "scoring",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 20 ms, which help need not wait for

        return version("gpt2-eval")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
