"""Both tokenizer libraries; a source of more than 50,000 documents, and what a dataset of it must be."""

from pathlib import Path

import fineweb_like
import pytest

from gpt2_data import BuildConfig, build
from gpt2_data import gigatoken as fast

FILES = 12


def pytest_collection_modifyitems(items):
    """`make test-fast` leaves out this folder, which takes half of the suite's time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def documents():
    paragraphs = fineweb_like.paragraphs()
    assert len(paragraphs) >= 50_000
    return paragraphs


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory):
    """A folder of Parquet files in FineWeb-Edu's schema."""
    folder = tmp_path_factory.mktemp("corpus")
    size = -(-len(documents) // FILES)
    for i in range(FILES):
        fineweb_like.write_fineweb(folder / f"{i:03d}_00000.parquet", documents[i * size : (i + 1) * size])
    return folder


@pytest.fixture(scope="session")
def expected(corpus, tmp_path_factory):
    """name -> SHA-256 of the undisturbed build's files."""
    out = tmp_path_factory.mktemp("expected") / "out"
    options = {"workers": 1, "tokenizer": "tiktoken", **fineweb_like.OPTIONS}
    assert build(BuildConfig([corpus / "*.parquet"], out, **options)).documents >= 50_000
    return fineweb_like.hashes(out)


@pytest.fixture(params=["tiktoken", "gigatoken"])
def library(request):
    if request.param == "gigatoken":
        pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
        fast.find_proof()
    return request.param
