"""What a run leaves and reads: its files, its weights for others, others' weights; a signal to a process."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from fork_server import environment
from tiny_run import TINY, flags, losses
from train_faults import good_steps, read_rows, wait_for_step

from gpt2_data import TokenLoader
from gpt2_model import GPT
from gpt2_train import TrainConfig, train
from gpt2_train.cli import main


def run_here(data, out, **changes) -> int:
    return train(TrainConfig(**{**TINY, **changes}, data=str(data), out=str(out)))


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory):
    """The run that others are compared to."""
    out = tmp_path_factory.mktemp("reference")
    assert run_here(dataset, out, eval_every=6) == 0
    return out


def test_metrics_and_files_of_a_run(tmp_path, reference) -> None:
    rows = read_rows(reference / "metrics.jsonl")
    train_rows, eval_rows = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [row["step"] for row in train_rows] == list(range(1, 13))
    assert [row["step"] for row in eval_rows] == [0, 6, 12]
    assert eval_rows[-1]["val_loss"] < 0.7 * eval_rows[0]["val_loss"]
    fields = {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds"}
    assert fields <= train_rows[0].keys()
    assert train_rows[-1]["tokens"] == 12 * 64
    samples = read_rows(reference / "samples.jsonl")
    assert [(sample["step"], sample["row"]) for sample in samples] == [(s, r) for s in (0, 6, 12) for r in (0, 1)]
    assert good_steps(reference) == [4, 8, 12]
    # All files may be read by whoever may read the first.
    folder = reference / "checkpoints" / "step-00000012"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    # The resolved config reruns the run, from its own file alone.
    again = tmp_path / "again"
    done = CliRunner().invoke(main, ["--config", str(reference / "config.toml"), "--out", str(again)])
    assert done.exit_code == 0, done.output
    assert losses(again) == losses(reference)


def test_batches_are_loaded_by_a_thread_that_ends_with_the_run(dataset, tmp_path, monkeypatch) -> None:
    threads, next_into = [], TokenLoader.next_into
    monkeypatch.setattr(
        TokenLoader, "next_into", lambda *args: (threads.append(threading.current_thread()), next_into(*args))
    )
    with pytest.raises(ValueError, match="skipped") as _error:  # its traceback keeps all that is not closed alive
        run_here(dataset, tmp_path, micro_batch="2", lr=1e39, warmup=0, max_skips=1)
    assert len(threads) >= 2 * 2
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


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
    tokens = torch.randint(0, 256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_a_whole_process(dataset, tmp_path) -> None:
    """Python's own end is part of it; tests/faults has every signal at every time, on forks that leave sooner."""
    command = [sys.executable, "-m", "gpt2_train", *flags(dataset, tmp_path, checkpoint_every=0, steps=100_000)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    last = losses(tmp_path)[-1][0]
    assert f"stopped by signal 15 at step {last}; the same command resumes from there" in output
    assert good_steps(tmp_path) == [last]


def test_bf16(dataset, tmp_path, reference) -> None:
    run_here(dataset, tmp_path, precision="bf16")
    np.testing.assert_allclose(losses(tmp_path), losses(reference), rtol=0.02)
    assert losses(tmp_path) != losses(reference)


def test_from_given_weights(dataset, tmp_path, reference) -> None:
    start = reference / "checkpoints" / "step-00000012"
    run_here(dataset, tmp_path / "on", init=str(start), model={}, steps=1, warmup=0)
    assert losses(tmp_path / "on")[0][1] < 0.7 * losses(reference)[0][1]
    # The same command goes on: the shape is that of the weights, which nobody asked for by name.
    run_here(dataset, tmp_path / "on", init=str(start), model={}, steps=2, warmup=0)
    assert [step for step, _ in losses(tmp_path / "on")] == [1, 2]
    with pytest.raises(ValueError, match=r"has another shape than .*: n_layer 2, not 1$"):
        run_here(dataset, tmp_path / "other", init=str(start), model={"n_layer": 1, "block_size": 32})
