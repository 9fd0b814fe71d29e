"""50 steps of gpt2-train are those of a plain loop: transformers' model, torch's optimizers, a recipe in full."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from tiny_run import losses
from train_faults import SHAPE

from gpt2_data import TokenLoader
from gpt2_model import GPT, GPTConfig

STEPS, WARMUP, PEAK, END = 50, 5, 1e-2, 1e-3
SEQ_LEN, MICRO_BATCH = 8, 2  # one shape in all runs, so that it is compiled once


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
def plain_loop(dataset, tmp_path_factory):
    """(rows of a batch, schedule, whether with Muon) -> the losses."""
    start = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    GPT(GPTConfig(**SHAPE)).save_pretrained(start)

    @cache
    def losses_of(rows: int, schedule: str = "cosine", muon: bool = False) -> list[float]:
        model = transformers.GPT2LMHeadModel.from_pretrained(start).eval()  # eval: without dropout
        optimizers, values = make_torch_optimizers(model, muon), []
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
            values.append(loss.item())
        assert values[-1] < values[0] - 1.0  # it learned
        return values

    return losses_of


@pytest.fixture
def assert_same(runs, tmp_path, plain_loop):
    """Train 50 steps, and compare the losses with those of the plain loop."""

    def check(*faults, accumulation=1, ranks=1, rtol=1e-5, **changes) -> None:
        rows = MICRO_BATCH * accumulation * ranks
        settings = {
            "steps": STEPS, "warmup": WARMUP, "lr": PEAK, "min_lr": END, "seq_len": SEQ_LEN, "eval_every": 0,
            "micro_batch": str(MICRO_BATCH), "batch_tokens": rows * SEQ_LEN, "checkpoint_every": 0, **changes,
        }  # fmt: skip
        out = tmp_path / "run"
        assert runs.run(out, *faults, ranks=ranks, seconds=300, **settings) == 0, runs.said(out)
        expected = plain_loop(rows, changes.get("schedule", "cosine"), changes.get("optimizer") == "muon")
        assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
        np.testing.assert_allclose([loss for _, loss in losses(out)], expected, rtol=rtol)

    return check


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 4}, {"schedule": "linear"}, {"schedule": "wsd"}, {"ranks": 2}], ids=str
)
def test_one_rank_or_two(assert_same, changes) -> None:
    assert_same(**changes)


def test_muon(assert_same, plain_loop) -> None:
    """torch's Muon iterates in bf16, where gradients that differ by rounding may differ by 1/256: 1.1e-5 seen."""
    assert_same(accumulation=4, optimizer="muon", rtol=1e-4)
    assert max(abs(a - b) for a, b in zip(plain_loop(8, muon=True), plain_loop(8), strict=True)) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "accumulation"),
    [(1, 4), (2, 4), pytest.param(1, 1, marks=pytest.mark.long), pytest.param(2, 1, marks=pytest.mark.long)],
)
def test_compiled(assert_same, tmp_path, ranks, accumulation) -> None:
    count = ("count_graphs", {"path": str(tmp_path / "graphs")})
    assert_same(count, ranks=ranks, accumulation=accumulation, compile="on")
    if ranks == 1:
        assert (tmp_path / "graphs").read_text() == "1"  # nothing is compiled that no step uses
