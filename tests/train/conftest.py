"""A small dataset to train on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def dataset(runs) -> Path:
    """6,000 tokens below 256 for training, and 600 for validation."""
    return runs.data
