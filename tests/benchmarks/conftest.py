"""What the benchmarks' tests share."""


def pytest_ignore_collect(collection_path, config):
    """Leave the micro benchmarks to `make test`, which runs them alone: beside other tests they say nothing."""
    return True if collection_path.name == "test_micro.py" and hasattr(config, "workerinput") else None
