"""What crosses two processes in a step of gpt2-train, read from a profiler's trace of it, and what comes out."""

import json
import math
from pathlib import Path

import pytest
import torch

from gpt2_model import GPTConfig

ACCUMULATION = 3
# 28 MB of gradients are in three of DDP's buckets: the first is closed at 1 MB, the others at 25.
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 512, "block_size": 32, "vocab_size": 256}
SETTINGS = {
    "model": SHAPE, "steps": 2, "warmup": 1, "seq_len": 8, "micro_batch": "2", "eval_every": 0,
    "batch_tokens": ACCUMULATION * 2 * 2 * 8, "checkpoint_every": 0,
}  # fmt: skip
SIZES = {"float": 4, "c10::BFloat16": 2}


@pytest.fixture(scope="module")
def traced(runs, tmp_path_factory) -> Path:
    """Folder of the runs `none`, `bf16` and `compiled`, of two ranks, and `alone`, of one."""
    folder = tmp_path_factory.mktemp("traced")
    cases = {
        "none": {"ranks": 2}, "bf16": {"ranks": 2, "grad_compression": "bf16"},
        "compiled": {"ranks": 2, "compile": "on"}, "alone": {"micro_batch": "12"},
    }  # fmt: skip
    for name, changes in cases.items():
        out = folder / name
        out.mkdir()
        fault = ("trace_exchange", {"folder": str(out)})
        assert runs.run(out, fault, **{**SETTINGS, **changes}) == 77, runs.said(out)  # without a checkpoint
    return folder


@pytest.mark.slow
# Compiled, it is so also after trying micro-batches, which compiles a backward that would send all at its end.
@pytest.mark.parametrize(("run", "bytes_each"), [("none", 4), ("bf16", 2), ("compiled", 4)])
def test_every_gradient_crosses_once_a_step_beside_the_last_backward(traced, run, bytes_each) -> None:
    trace = json.loads((traced / run / "trace-0.json").read_text())["traceEvents"]
    events = sorted((event for event in trace if event.get("ph") == "X"), key=lambda event: event["ts"])
    sent = [event for event in events if event["name"].startswith("gloo:")]
    asked = [event["ts"] for event in events if event["name"].startswith("c10d::")]
    assert {event["name"] for event in sent} == {"gloo:all_reduce"}
    assert len(sent) == len(asked) == 4  # three buckets and the scalars
    kinds = [(math.prod(event["args"]["Input Dims"][0]), SIZES[event["args"]["Input type"][0]]) for event in sent]
    scalars, *buckets = sorted(kinds)
    assert scalars == (4, 4)  # loss, norm and two flags
    assert sum(elements for elements, _ in buckets) == GPTConfig(**SHAPE).num_parameters
    assert {size for _, size in buckets} == {bytes_each}

    forwards = [event["ts"] for event in events if event["name"] == "DistributedDataParallel.forward"]
    functions = ("EmbeddingBackward", "CompiledFunctionBackward")  # the last that compute gradients are of these
    backwards = [event["ts"] for event in events if event["name"].startswith(functions)]
    assert len(forwards) == ACCUMULATION
    assert min(asked) > forwards[-1]
    assert sum(moment < backwards[-1] for moment in asked) == 2  # all buckets but the last are under way


def test_gradients_are_those_of_one_process_in_bf16_nearly_and_the_same_on_all_ranks(traced) -> None:
    """50 steps of two ranks beside a plain loop are in test_reference_loop.py."""

    def gradients(run: str, rank: int = 0) -> list[torch.Tensor]:
        return torch.load(traced / run / f"gradients-{rank}.pt")

    for alone, exact, rounded in zip(gradients("alone"), gradients("none"), gradients("bf16"), strict=True):
        torch.testing.assert_close(exact, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).norm() < 1e-2 * exact.norm()
    for run in ("none", "bf16"):
        assert all(map(torch.equal, gradients(run, 0), gradients(run, 1)))
