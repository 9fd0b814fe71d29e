"""What tests of several packages share: small random models and runs."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub that may not be there
# A job in a shell's background ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker of pytest-xdist a core; the models are tiny


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers on two cores: for a quarter of their time tests wait, for a kill, a timeout or a process."""
    return (os.cpu_count() or 1) * 3 // 2


@pytest.fixture(scope="session")
def tiny_hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 with the real vocabulary, made and saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=128)
    # transformers' own initialisation leaves logits within 0.1 of each other; wider weights tell errors apart.
    config.initializer_range = 0.2
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def words() -> random.Random:
    """A seeded generator for texts."""
    return random.Random(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Runs of a small model, as forks of one process that has imported torch."""
    import train_faults

    yield train_faults.Runs(tmp_path_factory.mktemp("runs"))
    for child in multiprocessing.active_children():
        child.kill()
