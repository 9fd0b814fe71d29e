"""The quickest cases of `bench.py run` under pytest-benchmark, with floors that a tenfold regression breaks.

`make test` runs them alone, before all others: beside other tests they would say nothing.
"""

from pkgutil import resolve_name

import pytest

from benchmarks.harness import Bench, rate
from benchmarks.suite import CASES

# Of what bounds it, in the same process; where nothing does, units a second.
FLOORS = {
    "train-7M-fp32": 0.1,  # 0.40 to 0.56 measured
    "generate-fp32": 0.15,  # 0.7 to 0.9
    "eval-hellaswag": 0.15,  # 0.6 to 0.7
    "data-load": 0.1,  # 0.4 to 0.8
    "data-verify": 0.1,  # 0.3 to 0.5
    "checkpoint-load": 0.02,  # 0.1 to 0.3
    "tokenize-tiktoken": 0.7e6,  # 3 to 8 million bytes
    "tokenize-gigatoken": 10e6,  # 70 to 200 million
    "start-data": 1.0,  # 7 to 10
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What several cases read, a model and a dataset, lies in its folder."""
    return Bench(str(tmp_path_factory.mktemp("bench")), 2, "cpu", 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FLOORS], ids=lambda case: case.name)
def test_is_no_slower_than_its_floor(benchmark, bench, case) -> None:
    ready = resolve_name(case.prepare)(bench, **case.options)
    benchmark.pedantic(ready.call, rounds=1, warmup_rounds=1)
    speed = (ready.cost or ready.amount) / benchmark.stats.stats.min
    if ready.ceiling:
        speed /= rate(ready.ceiling, bench.threads, bench.device)
    benchmark.extra_info["measured"] = speed
    assert speed >= FLOORS[case.name], f"{speed:.3g}, at least {FLOORS[case.name]:g} holds on any machine"
