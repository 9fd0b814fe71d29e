from pathlib import Path

import pytest
from checkpoint_files import random_model

from gpt2_model import GPT


@pytest.fixture
def model() -> GPT:
    return random_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"
