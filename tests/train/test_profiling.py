"""A profile of the steps asked for, which stops no run."""

import gzip
import json

import pytest
import torch

from gpt2_train.trackers import profiling


@pytest.mark.parametrize(
    ("steps", "left", "name"),
    [(3, 30, "steps-111-113"), (3, 13, "steps-111-113"), (3, 12, "steps-102-104"), (9, 4, "steps-102-104"),
     (1, 1, "steps-101-101")],
)  # fmt: skip
def test_profile_is_a_chrome_trace_of_those_steps(tmp_path, steps, left, name) -> None:
    said: list[str] = []
    weight = torch.ones(16, 16, requires_grad=True)
    with profiling(tmp_path, steps, 101, 100 + left, said.append) as step_done:
        for _ in range(left):
            (weight @ weight).sum().backward()
            step_done()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"{name}.json.gz"
    assert said == [f"profile: {path}, for chrome://tracing and ui.perfetto.dev"]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    first, last = (int(part) for part in name.split("-")[1:])
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in annotations}
    assert set(spans) == {f"ProfilerStep#{step - 101}" for step in range(first, last + 1)}
    products = [event["ts"] for event in events if event.get("name") == "aten::mm"]
    for start, end in spans.values():
        assert sum(start <= moment <= end for moment in products) >= 3  # forward, and two of backward


def test_a_run_that_stops_early_has_its_trace(tmp_path) -> None:
    said: list[str] = []

    def run() -> None:
        with profiling(tmp_path, 5, 1, 100, said.append) as step_done:
            for step in range(1, 13):
                if step == 12:
                    raise RuntimeError
                step_done()

    with pytest.raises(RuntimeError):
        run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-11-11.json.gz"]


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path) -> None:
    (tmp_path / "profile").write_text("a file")
    said: list[str] = []
    with profiling(tmp_path, 1, 1, 1, said.append) as step_done:
        step_done()
    assert said
    assert said[0].startswith("warning: the profile cannot be written: ")


@pytest.mark.parametrize(("steps", "last"), [(0, 10), (3, 0)])
def test_no_profile_where_none_is_asked_for(tmp_path, steps, last) -> None:
    with profiling(tmp_path, steps, 1, last, pytest.fail) as step_done:
        for _ in range(last):
            step_done()
    assert list(tmp_path.iterdir()) == []
