"""What the loop adds to the work of its steps."""

import time

import torch

from gpt2_train import TrainConfig, loop, train
from gpt2_train.metrics import RunLog


def test_the_host_adds_less_than_two_percent_to_a_step(dataset, tmp_path, monkeypatch) -> None:
    """The quickstart's model and batch. Its own work: gradients, clipping, the update; the rest is the loop's."""
    spent = {"work": 0.0, "all": 0.0}

    def timed(function, name):
        def run(*arguments, **keywords) -> object:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.perf_counter() - started

        return run

    backward, waits = loop._backward, []

    def gradients(run) -> tuple[torch.Tensor, float]:
        loss, data_seconds = backward(run)
        waits.append(data_seconds)
        return loss, data_seconds

    monkeypatch.setattr(loop, "_backward", timed(gradients, "work"))
    for name in ("get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, timed(getattr(torch.nn.utils, name), "work"))
    monkeypatch.setattr(torch.optim.AdamW, "step", timed(torch.optim.AdamW.step, "work"))
    for owner, name in (
        (loop, "_update"),
        (RunLog, "flush"),
        (loop, "_evaluation_is_due"),
        (loop, "_checkpoint_is_due"),
    ):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name), "all"))
    train(TrainConfig(
        data=str(dataset), out=str(tmp_path), steps=6, batch_tokens=1024, seq_len=256, micro_batch="4", warmup=1,
        device="cpu", precision="fp32", eval_every=0, checkpoint_every=0,
        model={"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256},
    ))  # fmt: skip
    assert len(waits) == 6
    host = spent["all"] - spent["work"] + sum(waits)
    assert 0 < host < 0.02 * spent["all"], f"{host / spent['all']:.2%} of {spent['all']:.2f} s"
