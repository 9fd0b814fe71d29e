"""A small dataset to train on."""

import json
import random
from pathlib import Path

import pytest

from gpt2_data import BuildConfig, build


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 short documents."""
    folder = tmp_path_factory.mktemp("dataset")
    draw = random.Random(0)
    vocabulary = ["the", "a", "of", "and", "in", "is", "it", "cat", "dog", "sun", "sea", "runs", "sleeps", "under"]
    lines = [json.dumps({"text": " ".join(draw.choices(vocabulary, k=draw.randint(5, 60)))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    build(
        BuildConfig(
            sources=(str(folder / "text.jsonl"),),
            out=str(folder / "data"),
            val_tokens=500,
            workers=1,
            order="source",
        )
    )
    return folder / "data"
