"""A build on a real Ray cluster of several nodes, one of which is killed in the middle of it."""

import os

import pytest
from fineweb_like import OPTIONS, hashes

from gpt2_data import BuildConfig, build
from gpt2_data.building import workers

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one CPU beside a head that has none: each has processes of its own."""
    cluster, nodes = start_cluster()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def start_cluster(tries=3):
    """Ray gives a node 30 seconds to start, a constant, which on busy cores is too little now and then."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        return cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    except Exception as error:
        cluster.shutdown()
        if "timed out during startup" not in str(error) or tries == 1:
            raise
        return start_cluster(tries - 1)


@pytest.mark.slow
def test_a_node_is_killed_in_mid_build(corpus, expected, tmp_path, cluster):
    cluster, nodes = cluster
    killed = []

    def kill(phase, done, *_):
        if phase == "tokenizing" and done and not killed:
            killed.append(done)
            cluster.remove_node(nodes[1], allow_graceful=False)

    options = {"engine": "ray", "tokenizer": "tiktoken", **OPTIONS}
    result = build(BuildConfig([corpus / "*.parquet"], tmp_path / "out", **options), kill)
    assert killed[0] < result.documents * 100
    assert hashes(tmp_path / "out") == expected


@pytest.mark.slow
def test_errors_and_killers_come_through(cluster):
    def run(function, tasks):
        return workers.run(workers.Job(function, lambda task: "unit 7"), tasks, None, on_ray=True)

    def shell(command, careful):
        return os.system(command)

    assert run(shell, ["true", "exit 3", "true"]) == [0, 3 << 8, 0]
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda text, careful: int(text), ["1", "x"])
    with pytest.raises(OSError, match="unit 7: the process that worked on it died twice"):
        run(shell, ["true", "kill -9 $PPID"])


def test_without_a_cluster_that_answers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(OSError, match="no Ray cluster answers at 127.0.0.1:1"):
        workers.run(workers.Job(int, str), ["1"], None, on_ray=True)
