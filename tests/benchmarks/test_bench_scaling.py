"""bench_scaling.py on a model of a second, and what it says of a run that fails."""

import pytest

import bench_scaling as scaling
from gpt2_data import BuildConfig, build


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(['{"text": "a cat runs under the sun and sleeps"}'] * 400))
    build(BuildConfig(sources=(str(tmp_path / "text.jsonl"),), out=tmp_path / "data", val_tokens=100, workers=1))
    return str(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_beside_two_alone(data, tmp_path):
    settings = scaling.Settings(
        rounds=1, steps=5, micro_batch=2, seq_len=32, accumulations=(2,), data=data,
        model={"n_layer": 1, "n_head": 2, "n_embd": 64},
    )  # fmt: skip
    document = scaling.measure(settings, tmp_path / "work")
    (case,) = document["scaling"]
    assert (case["accumulation"], case["tokens_a_step"]) == (2, 2 * 2 * 32)
    speeds = case["tokens_per_second"]
    assert speeds.keys() == {"two ranks", "two alone", "one", "one, two threads"}
    assert all(speed["median"] > 0 for speed in speeds.values())
    assert case["efficiency"]["rounds"] == [speeds["two ranks"]["median"] / speeds["two alone"]["median"]]
    assert case["efficiency"]["median"] > 0.05  # so small a model sends more than it computes
    assert case["to_two_threads"]["median"] == speeds["two ranks"]["median"] / speeds["one, two threads"]["median"]
    assert document["gradient_bytes_sent"] == 4 * document["model"]["parameters"]
    assert list((tmp_path / "work").iterdir()) == []
    shown = scaling.table({**document, "machine": {"cpu": "a processor", "cores": 2}})
    assert f"two ranks to two alone: {case['efficiency']['median']:.1%}" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"data": "nowhere"}, "one, two threads: gpt2-train ended with 1: .*nowhere"), ({"steps": 2}, "use more")],
)
def test_a_run_that_fails(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        scaling.measure(scaling.Settings(**changes), tmp_path)
