"""What crosses two processes in a step of gpt2-train, read from a profiler's trace of it, and what comes out."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import TINY

from gpt2_data import convert
from gpt2_train import TrainConfig, loop, train

pytestmark = pytest.mark.slow  # torch and the packages take two processes ten seconds to import

ACCUMULATION = 3
# 28 MB of gradients are in three of DDP's buckets: the first is closed at 1 MB, the others at 25.
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 512, "block_size": 32, "vocab_size": 256}
RUN = {
    **TINY, "model": SHAPE, "steps": 2, "warmup": 1, "seq_len": 8, "micro_batch": "2",
    "batch_tokens": ACCUMULATION * 2 * 2 * 8,
}  # fmt: skip
SIZES = {"float": 4, "c10::BFloat16": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """4,000 tokens of a vocabulary of 256."""
    folder = tmp_path_factory.mktemp("dataset")
    tokens = np.random.default_rng(0).integers(256, size=4000)
    for name, part in (("train", tokens[:3600]), ("val", tokens[3600:])):
        part.astype("<u2").tofile(folder / f"{name}.bin")
    convert(folder, folder / "data", "llmc")
    return folder / "data"


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> Path:
    """Folder of the runs `none`, `bf16` and `compiled`, of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {"none": {}, "bf16": {"grad_compression": "bf16"}, "compiled": {"compile": "on"}}
    settings = [
        {**RUN, **changes, "data": str(dataset), "out": str(folder / name)} for name, changes in cases.items()
    ]
    (folder / "runs.json").write_text(json.dumps(settings))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(Path(__file__).with_name("traced_steps.py"), folder / "runs.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def gradients(run: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(run / f"gradients-{rank}.pt")


# Compiled, it is so also after trying micro-batches, which compiles a backward that would send all at its end.
@pytest.mark.parametrize(("run", "bytes_each"), [("none", 4), ("bf16", 2), ("compiled", 4)])
def test_every_gradient_crosses_once_a_step_beside_the_last_backward(runs, run, bytes_each) -> None:
    trace = json.loads((runs / run / "trace-0.json").read_text())["traceEvents"]
    events = sorted((event for event in trace if event.get("ph") == "X"), key=lambda event: event["ts"])
    sent = [event for event in events if event["name"].startswith("gloo:")]
    asked = [event["ts"] for event in events if event["name"].startswith("c10d::")]
    assert {event["name"] for event in sent} == {"gloo:all_reduce"}
    assert len(sent) == len(asked) == 4  # three buckets and the scalars
    kinds = [(math.prod(event["args"]["Input Dims"][0]), SIZES[event["args"]["Input type"][0]]) for event in sent]
    scalars, *buckets = sorted(kinds)
    assert scalars == (4, 4)  # loss, norm and two flags
    assert sum(elements for elements, _ in buckets) == TrainConfig(**RUN).model_config.num_parameters
    assert {size for _, size in buckets} == {bytes_each}

    forwards = [event["ts"] for event in events if event["name"] == "DistributedDataParallel.forward"]
    functions = ("EmbeddingBackward", "CompiledFunctionBackward")  # the last that compute gradients are of these
    backwards = [event["ts"] for event in events if event["name"].startswith(functions)]
    assert len(forwards) == ACCUMULATION
    assert min(asked) > forwards[-1]
    assert sum(moment < backwards[-1] for moment in asked) == 2  # all buckets but the last are under way


def test_gradients_are_those_of_one_process(dataset, runs, tmp_path, monkeypatch) -> None:
    """50 steps of two ranks beside a plain loop are in test_reference_loop.py."""
    alone, backward = {}, loop._backward

    def kept(run):
        result = backward(run)
        alone.update({name: parameter.grad.clone() for name, parameter in run.model.named_parameters()})
        return result

    monkeypatch.setattr(loop, "_backward", kept)
    train(
        TrainConfig(
            **{**RUN, "steps": 1, "warmup": 0, "micro_batch": "12", "data": str(dataset), "out": str(tmp_path)}
        )
    )
    shared = gradients(runs / "none")
    assert shared.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_gradients_in_bf16_are_close_and_the_same_on_all_ranks(runs) -> None:
    exact, rounded = gradients(runs / "none"), gradients(runs / "bf16")
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() < 1e-2 * gradient.norm(), name
    assert not any(torch.equal(rounded[name], exact[name]) for name in exact)
    for run in (runs / "none", runs / "bf16"):
        ours, theirs = gradients(run, 0), gradients(run, 1)
        assert all(torch.equal(ours[name], theirs[name]) for name in exact)
