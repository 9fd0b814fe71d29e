"""What the loop adds to the work of its steps."""

import time

import pytest
import torch

from gpt2_model import GPT
from gpt2_train import TrainConfig, train


@pytest.mark.slow
def test_the_host_adds_less_than_two_percent_to_a_step(dataset, tmp_path, monkeypatch) -> None:
    """The quickstart's model and batch. Its own work: gradients, clipping, the update; the rest is the loop's."""
    work, ends = [0.0], []

    def timed(owner, name) -> None:
        function = getattr(owner, name)

        def run(*arguments, **keywords):
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            work[0] += time.perf_counter() - started
            if name == "step":
                ends.append((time.perf_counter(), work[0]))
            return result

        monkeypatch.setattr(owner, name, run)

    timed(GPT, "forward")
    timed(torch.Tensor, "backward")
    timed(torch.nn.utils, "get_total_norm")
    timed(torch.nn.utils, "clip_grads_with_norm_")
    timed(torch.optim.AdamW, "step")
    train(TrainConfig(
        data=str(dataset), out=str(tmp_path), steps=5, batch_tokens=1024, seq_len=256, micro_batch="4", warmup=1,
        device="cpu", precision="fp32", eval_every=0, checkpoint_every=0,
        model={"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256},
    ))  # fmt: skip
    assert len(ends) == 5
    elapsed, working = (last - first for last, first in zip(ends[-1], ends[0], strict=True))
    assert 0 < elapsed - working < 0.02 * elapsed, f"{1 - working / elapsed:.2%} of {elapsed:.2f} s"
