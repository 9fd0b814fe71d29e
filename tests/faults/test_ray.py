"""A build on a real Ray cluster of several nodes, one of which is killed in the middle of it."""

import sys

import pytest
from fineweb_like import OPTIONS, hashes

from gpt2_data import BuildConfig, build

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
CLI = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one CPU beside a head that has none: each has processes of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_is_killed_in_mid_build(corpus, expected, tmp_path, cluster):
    cluster, nodes = cluster
    out = tmp_path / "out"
    killed = []

    def kill(status):
        if status.phase == "tokenizing" and status.done and not killed:
            killed.append(status.done)
            cluster.remove_node(nodes[1], allow_graceful=False)

    result = build(BuildConfig([corpus / "*.parquet"], out, engine="ray", tokenizer="tiktoken", **OPTIONS), kill)
    assert killed
    assert killed[0] < result.documents * 100
    assert hashes(out) == expected
