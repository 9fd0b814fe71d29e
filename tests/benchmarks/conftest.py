"""What the benchmarks' tests share."""

from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench

    return bench


def pytest_ignore_collect(collection_path, config):
    """Beside other tests a micro benchmark says nothing, and pytest-benchmark does not time it: `make test` runs
    them alone."""
    return True if collection_path.name == "test_micro.py" and hasattr(config, "workerinput") else None
