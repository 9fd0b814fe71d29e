"""Which updates are left out. tests/faults has it in whole runs, and the hangs and the signals."""

import math
import random

import pytest

from gpt2_train.faults import FEWEST, WINDOW, Guard, deviations


def filled(sigma: float = 6.0) -> Guard:
    """A guard that has seen a window of ordinary steps."""
    guard, draw = Guard(sigma), random.Random(0)
    for _ in range(WINDOW):
        assert guard.judge(draw.gauss(3.0, 0.05), draw.gauss(1.0, 0.1)) is None
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "norm"])
def test_what_is_not_finite_is_left_out_and_leaves_no_trace(bad, place) -> None:
    guard = filled()
    losses, norms = list(guard.losses), list(guard.norms)
    assert guard.judge(**{"loss": 3.0, "norm": 1.0, place: bad}) == "not finite"
    assert (guard.losses, guard.norms) == (losses, norms)
    assert (guard.skips, guard.total_skips) == (1, 1)
    assert guard.judge(3.0, 1.0) is None
    assert (guard.skips, guard.total_skips) == (0, 1)


def test_without_sigma_a_finite_step_is_never_left_out() -> None:
    guard = Guard()
    assert [guard.judge(value, value) for value in (1.0, 1e30, 1e-30, 1e300)] == [None] * 4
    assert guard.judge(math.nan, 1.0) is not None
    assert guard.losses == []


def test_an_outlier_is_left_out_and_the_step_after_it_is_not() -> None:
    guard = filled()
    assert (guard.judge(3000.0, 1.0) or "").startswith("loss 3000 is ")
    assert (guard.judge(3.0, 90.0) or "").startswith("gradient norm 90 is ")
    assert guard.judge(3.05, 1.1) is None
    assert max(guard.losses) < 4
    assert max(guard.norms) < 2
    assert guard.judge(0.1, 0.01) is None  # below is no spike


def test_a_few_steps_are_no_measure() -> None:
    guard = Guard(3.0)
    for _ in range(FEWEST):
        assert guard.judge(3.0, 1.0) is None
        assert len(guard.losses) <= FEWEST
    assert guard.judge(3.0 + 4 * 0.003, 1.0) is not None  # equal ones: a thousandth of the mean is a deviation
    assert deviations(5.0, [1.0, 3.0]) == 3.0
