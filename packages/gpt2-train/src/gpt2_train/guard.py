"""Which updates are left out: a loss or gradient that is not finite, and, by choice, one that stands out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

WINDOW = 128  # steps, as in llm.c and OLMo
FEWEST = 20  # before so many, a deviation means nothing


@dataclass
class Guard:
    """Judges each step by its mean loss and gradient norm, which all processes share: so all decide alike.

    Attributes:
        sigma: leave out what is more than so many deviations above the mean of the window; 0 for no such test.
        losses: of the last steps that were not left out: an outlier must not widen what counts as usual.
        norms: likewise.
        skips: updates left out in a row.
        total_skips: updates left out in all.
    """

    sigma: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skips: int = 0
    total_skips: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Why this step's update must be left out; None, if it may be made. Takes note of the step."""
        reason = self._reason(loss, norm)
        if reason is not None:
            self.skips += 1
            self.total_skips += 1
            return reason
        self.skips = 0
        if self.sigma:
            self.losses = [*self.losses, loss][-WINDOW:]
            self.norms = [*self.norms, norm][-WINDOW:]
        return None

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        for name, value, usual in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if self.sigma and len(usual) >= FEWEST and (score := deviations(value, usual)) > self.sigma:
                return f"{name} {value:.4g} is {score:.1f} deviations above the last {len(usual)}"
        return None


def deviations(value: float, usual: Sequence[float]) -> float:
    """Standard deviations (a thousandth of the mean, at least) by which `value` lies above the mean."""
    mean = fmean(usual)
    return (value - mean) / max(pstdev(usual, mean), 1e-3 * abs(mean), 1e-12)
