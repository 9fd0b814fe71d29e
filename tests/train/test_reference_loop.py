"""50 steps of gpt2-train are those of a plain loop: transformers' model, torch's optimizers, a recipe in full."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
import transformers
from tiny_run import TINY, losses

from gpt2_data import TokenLoader, convert
from gpt2_model import GPT
from gpt2_train import TrainConfig, train

STEPS, WARMUP, PEAK, END = 50, 5, 1e-2, 1e-3
SEQ_LEN, MICRO_BATCH = 8, 2  # one shape in all runs, so that it is compiled once
VOCABULARY = 256  # the real one, of 50,257, would take most of the time
SETTINGS = {
    **TINY, "model": {**TINY["model"], "vocab_size": VOCABULARY}, "checkpoint_every": 0,
    "steps": STEPS, "warmup": WARMUP, "lr": PEAK, "min_lr": END,
    "seq_len": SEQ_LEN, "micro_batch": str(MICRO_BATCH),
}  # fmt: skip


def learning_rate(step: int, schedule: str) -> float:
    """Of the update number `step`, from 0: the line up, and one of three ways down."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    if schedule == "wsd":
        return PEAK + (END - PEAK) * max(0, step - 40) / 10  # the last fifth
    progress = (step - WARMUP) / (STEPS - WARMUP)
    if schedule == "linear":
        return PEAK + (END - PEAK) * progress
    return END + (PEAK - END) * (1 + math.cos(math.pi * progress)) / 2


def make_torch_optimizers(model: torch.nn.Module, muon: bool) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    of_blocks = [p for name, p in named.items() if name.startswith("transformer.h.") and p.ndim == 2]
    rest = [p for p in named.values() if not (muon and any(p is other for other in of_blocks))]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)]
    if muon:
        assert len(of_blocks) == 2 * 4
        optimizers.append(torch.optim.Muon(of_blocks, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """4,000 tokens by chance, of fifteen that the vocabulary has: that much can be learned in 50 steps."""
    folder = tmp_path_factory.mktemp("dataset")
    tokens = 17 * np.random.default_rng(0).integers(15, size=4000)
    tokens[:3600].astype("<u2").tofile(folder / "train.bin")
    tokens[3600:].astype("<u2").tofile(folder / "val.bin")
    convert(folder, folder / "data", "llmc")
    return folder / "data"


@pytest.fixture(scope="module")
def plain_loop(dataset, tmp_path_factory):
    """(rows of a batch, schedule, whether with Muon) -> the losses."""
    start = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    GPT(TrainConfig(**SETTINGS).model_config).save_pretrained(start)

    @cache
    def losses_of(rows: int, schedule: str = "cosine", muon: bool = False) -> list[float]:
        model = transformers.GPT2LMHeadModel.from_pretrained(start).eval()  # eval: without dropout
        optimizers = make_torch_optimizers(model, muon)
        found = []
        batches = TokenLoader(dataset, "train", batch_size=rows, seq_len=SEQ_LEN, seed=0)
        for step, (x, y) in zip(range(STEPS), batches, strict=False):
            logits = model(torch.from_numpy(x)).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, schedule)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        assert found[-1] < found[0] - 1.0  # it learned
        return found

    return losses_of


def settings_of(dataset: Path, out: Path, accumulation: int, ranks: int = 1, **changes) -> dict:
    rows = MICRO_BATCH * accumulation * ranks
    return {**SETTINGS, "batch_tokens": rows * SEQ_LEN, "data": str(dataset), "out": str(out), **changes}


def assert_same(run: Path, expected: list[float], rtol: float = 1e-5) -> None:
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in losses(run)], expected, rtol=rtol)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_rank(dataset, tmp_path, plain_loop, accumulation) -> None:
    train(TrainConfig(**settings_of(dataset, tmp_path / "run", accumulation)))
    assert_same(tmp_path / "run", plain_loop(2 * accumulation))


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_schedules(dataset, tmp_path, plain_loop, schedule) -> None:
    train(TrainConfig(**settings_of(dataset, tmp_path / "run", 1, schedule=schedule)))
    assert_same(tmp_path / "run", plain_loop(2, schedule))


def test_muon(dataset, tmp_path, plain_loop) -> None:
    """torch's Muon iterates in bf16, where gradients that differ by rounding may differ by 1/256: 1.1e-5 seen."""
    train(TrainConfig(**settings_of(dataset, tmp_path / "run", 4, optimizer="muon")))
    assert_same(tmp_path / "run", plain_loop(8, muon=True), rtol=1e-4)
    assert max(abs(a - b) for a, b in zip(plain_loop(8, muon=True), plain_loop(8), strict=True)) > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls torch.jit
def test_compiled(dataset, tmp_path, plain_loop, monkeypatch) -> None:
    # Two small graphs: a pool of compiling processes, each with its own torch, would take longer to start.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for accumulation in (1, 4):
        out = tmp_path / str(accumulation)
        train(TrainConfig(**settings_of(dataset, out, accumulation, compile="on")))
        assert_same(out, plain_loop(2 * accumulation))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # nothing is compiled that no step uses


@pytest.mark.slow
def test_two_ranks(dataset, tmp_path, plain_loop) -> None:
    """All of them in one torchrun."""
    cases = [(accumulation, compiled) for accumulation in (1, 4) for compiled in ("off", "on")]
    runs = [settings_of(dataset, tmp_path / f"{n}-{c}", accumulation=n, ranks=2, compile=c) for n, c in cases]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(Path(__file__).with_name("several_runs.py"), tmp_path / "runs.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    for accumulation, compiled in cases:
        assert_same(tmp_path / f"{accumulation}-{compiled}", plain_loop(4 * accumulation))
