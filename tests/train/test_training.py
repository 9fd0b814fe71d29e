"""What a run computes: over ranks and micro-batches, through kills and stops."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from tiny_run import TINY, flags, losses

from gpt2_data import TokenLoader
from gpt2_model import GPT
from gpt2_train import TrainConfig, make_optimizer, train, verify_checkpoint


def run_here(data, out, **changes) -> int:
    return train(TrainConfig(**{**TINY, **changes}, data=str(data), out=str(out)))


def start_elsewhere(data, out, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "gpt2_train", *flags(data, out, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """The uninterrupted run that others must equal."""
    out = tmp_path_factory.mktemp("reference")
    assert run_here(dataset, out) == 0
    return out


def test_decay_is_on_matrices_only() -> None:
    groups = make_optimizer(GPT(TrainConfig(**TINY).model_config), lr=1.0, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == 2 + 2 * 12 + 2


def test_metrics_and_files_of_a_run(dataset, tmp_path) -> None:
    run_here(dataset, tmp_path, eval_every=6, eval_tokens=64, num_samples=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train_rows, eval_rows = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [row["step"] for row in train_rows] == list(range(1, 13))
    assert [row["step"] for row in eval_rows] == [0, 6, 12]
    assert eval_rows[-1]["val_loss"] < eval_rows[0]["val_loss"] - 2
    fields = {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds"}
    assert fields <= train_rows[0].keys()
    assert train_rows[-1]["tokens"] == 12 * 64
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["row"]) for sample in samples] == [(s, r) for s in (0, 6, 12) for r in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000008", "step-00000012"
    ]  # fmt: skip
    # The resolved config reruns the run, from its own file alone.
    again = tmp_path / "again"
    command = [sys.executable, "-m", "gpt2_train", "--config", tmp_path / "config.toml", "--out", again]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    assert losses(again) == losses(tmp_path)


def test_batches_are_loaded_by_a_thread_that_ends_with_the_run(dataset, tmp_path, monkeypatch) -> None:
    loaded_by, next_into = [], TokenLoader.next_into
    monkeypatch.setattr(
        TokenLoader,
        "next_into",
        lambda *arguments: (loaded_by.append(threading.current_thread()), next_into(*arguments)),
    )
    run_here(dataset, tmp_path, steps=3, micro_batch="2", checkpoint_every=0)
    assert len(loaded_by) >= 3 * 2
    assert threading.main_thread() not in loaded_by
    assert not any(thread.is_alive() for thread in loaded_by)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU's driver")
def test_batches_for_a_gpu_are_page_locked(dataset, tmp_path, monkeypatch) -> None:
    from_numpy, pinned = torch.from_numpy, []
    monkeypatch.setattr(
        torch, "from_numpy", lambda a: (pinned.append(from_numpy(a).is_pinned()), from_numpy(a))[1]
    )
    run_here(dataset, tmp_path, steps=3, device="cuda", compile="off")
    assert pinned
    assert all(pinned)


def test_transformers_loads_a_checkpoint(reference) -> None:
    folder = reference / "checkpoints" / "step-00000012"
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), GPT.from_pretrained(folder)
    tokens = torch.randint(0, 50257, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], rtol=0, atol=1e-5)


def test_micro_batches_do_not_change_the_run(dataset, tmp_path, reference) -> None:
    run_here(dataset, tmp_path, micro_batch="1")
    np.testing.assert_allclose(losses(tmp_path), losses(reference), rtol=1e-5)


def test_a_signal_to_a_whole_process(dataset, tmp_path) -> None:
    """Python's own end is part of it; tests/faults has every signal at every time, on forks that leave sooner."""
    number = signal.SIGTERM
    process = start_elsewhere(dataset, tmp_path, checkpoint_every=0, steps=100_000)
    deadline = time.monotonic() + 60
    rows = tmp_path / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    last = losses(tmp_path)[-1][0]
    assert f"stopped by signal {number.value} at step {last}; the same command resumes from there" in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_weights_that_overflow_are_not_saved(dataset, tmp_path) -> None:
    """The updates themselves, and not a batch, are what makes these NaN: leaving some out does not help."""
    with pytest.raises(ValueError, match="updates in a row were left out|is not finite at step"):
        run_here(dataset, tmp_path, lr=1e20, warmup=0, steps=40, checkpoint_every=1, grad_clip=0.0)
    for folder in (tmp_path / "checkpoints").iterdir():
        assert verify_checkpoint(folder) == []
        assert all(tensor.isfinite().all() for tensor in GPT.from_pretrained(folder).parameters())


def test_bf16(dataset, tmp_path, reference) -> None:
    run_here(dataset, tmp_path, precision="bf16")
    np.testing.assert_allclose(losses(tmp_path), losses(reference), rtol=0.02)
    assert losses(tmp_path) != losses(reference)


def test_from_given_weights(dataset, tmp_path, reference) -> None:
    start = reference / "checkpoints" / "step-00000012"
    run_here(dataset, tmp_path / "on", init=str(start), model={}, steps=1, warmup=0)
    assert losses(tmp_path / "on")[0][1] < losses(reference)[0][1] - 2
    # The same command goes on: the shape is that of the weights, which nobody asked for by name.
    run_here(dataset, tmp_path / "on", init=str(start), model={}, steps=2, warmup=0)
    assert [step for step, _ in losses(tmp_path / "on")] == [1, 2]
    with pytest.raises(ValueError, match="has another shape than"):
        run_here(dataset, tmp_path / "other", init=str(start), model={"n_layer": 1, "block_size": 32})
