"""The whole way of FineWeb-Edu, from a hub on this machine with its troubles to verified shards."""

import contextlib
import json
import subprocess
import sys
import time

import fineweb_like
import pyarrow.parquet as pq
import pytest
from hub_server import SECOND, Drop, HubServer, Refuse, Spoil, until

from gpt2_data import BuildConfig, build, open_dataset, verify

REPO = "HuggingFaceFW/fineweb-edu"
CONFIGS = [{"config_name": "sample-10BT", "data_files": "sample/10BT/*"}]
CLI = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]


@pytest.fixture
def hub(corpus):
    with HubServer() as hub:
        files = {f"sample/10BT/{path.name}": path for path in sorted(corpus.iterdir())}
        hub.add(REPO, files, configs=CONFIGS)
        yield hub


def command(out, *more):
    """The build of fineweb_like.arguments, from the hub: fineweb-edu is the default source."""
    source, *options = fineweb_like.arguments("", out, *more)[1:]
    assert source == "/*.parquet"
    return [*CLI, "build", *options]


def run(hub, arguments, code=0):
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=hub.environment)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_dry_run_estimates_without_a_download(hub, corpus, expected, tmp_path):
    facts = json.loads(run(hub, [*command(tmp_path / "out"), "--dry-run", "--json"]))
    tables = [pq.read_table(path, columns=["token_count"]) for path in sorted(corpus.iterdir())]
    rows = sum(len(table) for table in tables)
    tokens = rows + sum(sum(table["token_count"].to_pylist()) for table in tables)
    assert facts["documents"] == rows
    assert facts["tokens_estimated"] is True
    assert 0.6 * tokens < facts["tokens"] < 1.2 * tokens  # it counts on prose, and half of this is code
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert facts["bytes_to_download"] == size
    assert facts["bytes_while_building"] > facts["bytes"] + size
    assert 0.6 < facts["shards"] / sum(name.endswith(".bin") for name in expected) < 1.2
    assert facts["minutes"] > 0
    assert hub.sent(".parquet") <= 2**16 * len(tables) < size / 9  # a footer each
    assert not (tmp_path / "out").exists()
    less = json.loads(run(hub, [*command(tmp_path / "out"), "--dry-run", "--json", "--delete-downloads"]))
    assert less["bytes_while_building"] < facts["bytes_while_building"]


@pytest.mark.slow
def test_rate_limits_drops_spoiled_files_and_a_kill(hub, corpus, expected, tmp_path):
    """429, a connection that drops, a file that comes wrong once, kill -9 in mid-download, a push to main."""
    out = tmp_path / "out"
    sizes = {path.name: path.stat().st_size for path in corpus.iterdir()}
    limit = {"status": 429, "headers": {"Retry-After": "1"}}
    hub.faults = [Refuse(store=False, path="api", **limit), Refuse(path="001_", **limit)]
    hub.bytes_a_second = 1e6
    build_it = [*command(out), "--delete-downloads"]
    killed = subprocess.Popen(build_it, env=hub.environment, stderr=subprocess.DEVNULL)
    parts = out / "downloads"
    until(lambda: is_planned(out), killed)  # the footers are read: what follows meets the files themselves
    hub.faults = [Drop(path="002_", at=sizes["002_00000.parquet"] // 2), Spoil(path="004_")]
    until(lambda: list(parts.rglob("003_*.part")), killed)
    killed.kill()
    killed.wait()
    hub.add(REPO, {"sample/10BT/000_00000.parquet": b"something else"}, SECOND, CONFIGS)
    hub.bytes_a_second = None
    most = 0
    with subprocess.Popen(build_it, env=hub.environment, stderr=subprocess.PIPE, text=True) as done:
        while done.poll() is None:
            with contextlib.suppress(OSError):  # one may be deleted under it
                most = max(most, sum(path.suffix in (".parquet", ".part") for path in parts.rglob("*")))
            time.sleep(0.005)
        assert done.returncode == 0, done.stderr.read()
    assert fineweb_like.hashes(out) == expected  # those of a build from local files
    assert verify(out, "full").ok
    assert most == 2  # fetched files at a time
    assert not list(parts.rglob("*.parquet"))
    # Nothing came twice: what was dropped or killed went on, and only the spoiled file was fetched again.
    for name, size in sizes.items():
        times = hub.sent(name) / size
        assert times < (2.3 if name.startswith("004_") else 1.35), (name, times)


def test_downloads_are_kept_for_the_next_build(hub, expected, tmp_path):
    out = tmp_path / "out"
    run(hub, command(out))
    assert fineweb_like.hashes(out) == expected
    asked = len(hub.requests)
    assert "already built" in run(hub, command(out))
    assert len(hub.requests) == asked
    more = ["--seed", "4", "--downloads", str(out / "downloads")]
    sent = hub.sent(".parquet")
    run(hub, [*command(tmp_path / "other"), *more])
    assert hub.sent(".parquet") - sent < sent / 4  # footers
    assert fineweb_like.hashes(tmp_path / "other") != expected


def test_what_stays_wrong_ends_the_build_in_a_line(hub, tmp_path):
    hub.bytes_a_second = 1e6
    two = [*command(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(two, env=hub.environment, stderr=subprocess.PIPE, text=True)
    until(lambda: is_planned(tmp_path / "out"), process)
    hub.faults = [Spoil(path="003_", times=100)]
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert "003_00000.parquet" in errors
    assert "SHA-256" in errors
    assert not (tmp_path / "out" / "dataset.json").exists()
    hub.faults, hub.bytes_a_second = [], None
    run(hub, command(tmp_path / "out"))


def test_parts_fetch_what_is_theirs(hub, expected, tmp_path):
    out = tmp_path / "out"
    for part in "2/2", "1/2":
        run(hub, [*command(out), "--part", part, "--delete-downloads"])
    assert fineweb_like.hashes(out) == expected
    assert hub.sent("011_") < 1.2 * hub.sent("000_") * 1.5
    assert not list(out.rglob("*.parquet"))


def test_a_dataset_that_is_not_parquet(hub, documents, tmp_path):
    lines = [json.dumps({"body": text}).encode() + b"\n" for text in documents[:2000]]
    hub.add("some/lines", {"a.jsonl": b"".join(lines[:900]), "b.jsonl": b"".join(lines[900:])})
    build_lines = [*CLI, "build", "hf:some/lines", "--val-tokens", "0", "--workers", "2"]
    run(hub, [*build_lines, "--column", "body", "--out", str(tmp_path / "out")])
    (tmp_path / "local.jsonl").write_bytes(b"".join(lines))
    build(BuildConfig([tmp_path / "local.jsonl"], tmp_path / "local", val_tokens=0, column="body", workers=1))
    ours, same = (open_dataset(tmp_path / name).manifest.shards for name in ("out", "local"))
    assert [shard.tokens_sha256 for shard in ours] == [shard.tokens_sha256 for shard in same]
    error = run(hub, [*build_lines, "--out", str(tmp_path / "none")], code=1)
    assert error.count("\n") == 1
    assert "body" in error


def is_planned(out):
    return list((out / ".build").glob("hub-*.json"))
