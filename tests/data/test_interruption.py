"""Builds that are killed, anywhere, any number of times, end with the same bytes; dead workers are noticed."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2_data import BuildConfig, build, engines, formats, plan, verify

CLI = "from gpt2_data.cli import main; main()"


class Killed(BaseException):
    """Stands for the end of the process."""


def command(source, out, *more):
    options = ["--val-tokens", "300", "--shard-size", "9k", "--order", "shuffled"]
    return [sys.executable, "-c", CLI, "build", f"{source}/*.jsonl", "--out", str(out), *options, *more]


@pytest.fixture
def source(write_jsonl, texts):
    return write_jsonl(texts * 3, files=6)


@pytest.fixture
def expected(source, tmp_path, files_of):
    out = tmp_path / "expected"
    build(BuildConfig([source / "*.jsonl"], out, 9000, 300, workers=1, order="shuffled"))
    return files_of(out)


def test_stopped_before_and_after_every_file(write_jsonl, texts, tmp_path, files_of, monkeypatch):
    """Every file is published by one rename and one fsync of its folder; stop at each of them in turn."""
    source, out = write_jsonl(texts, files=2), tmp_path / "out"
    config = BuildConfig([source / "*.jsonl"], out, 9000, 300, workers=1, order="shuffled")
    build(dataclasses.replace(config, out=tmp_path / "expected"))
    real_sync, real_replace = formats.fsync_folder, Path.replace
    step = stops = 0
    while True:
        left = step = step + 1

        def stop():
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        def replace(path, target):
            stop()
            return real_replace(path, target)

        def sync(folder):
            stop()
            real_sync(folder)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            patch.setattr(formats, "fsync_folder", sync)
            try:
                build(config)
                break
            except Killed:
                stops += 1
                finished = (out / "dataset.json").exists()
        if finished:  # stopped after the last rename: nothing is left to do but to say so
            assert build(config).already_built
            break
    assert stops > 20
    assert files_of(out) == files_of(tmp_path / "expected")
    assert verify(out, "full").ok


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_random_instants(source, tmp_path, files_of, expected, seed):
    rng = random.Random(seed)
    out = tmp_path / "out"
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(
            command(source, out, "--workers", "2"), stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.3, 1.7))
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.kill()
            process.wait()
            kills += 1
            wait_until(lambda pids=workers: not any(is_running(pid) for pid in pids))
    done = subprocess.run(command(source, out, "--workers", "2"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == expected
    assert kills or "already built" in done.stdout


def test_a_killed_worker_is_replaced(source, tmp_path, files_of, expected):
    out = tmp_path / "out"
    process = subprocess.Popen(command(source, out, "--workers", "2"), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: children(process.pid) or process.poll() is not None)
    for pid in children(process.pid)[:1]:
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert files_of(out) == expected


def test_a_task_that_kills_its_worker_is_named(tmp_path):
    started = tmp_path / "started"
    tasks = [f"echo >> {started}; kill -9 $PPID", "true"]
    with pytest.raises(OSError, match="unit 7: the process at work on it died 3 times"):
        engines.run(
            os.system, tasks, 2, lambda task: "unit 7" if "kill" in task else task, lambda task, result: None
        )
    assert len(started.read_text().splitlines()) == 3


def test_a_task_may_kill_its_worker_once(tmp_path):
    once = f"test -e {tmp_path}/flag || {{ touch {tmp_path}/flag; kill -9 $PPID; }}"
    results = engines.run(os.system, ["true", once, "exit 3", "true"], 2, str, lambda task, result: None)
    assert results == [0, 0, 3 << 8, 0]


def test_a_worker_s_error_comes_through(source, tmp_path):
    (source / "002.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    done = subprocess.run(
        command(source, tmp_path / "out", "--workers", "2"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"Error: {source}/002.jsonl:2: no key 'text'; the keys are title\n"


def test_units_of_another_plan_are_not_used(source, tmp_path, files_of, expected, monkeypatch):
    out = tmp_path / "out"
    config = BuildConfig([source / "*.jsonl"], out, 9000, 300, workers=1, order="shuffled")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "PLAN_VERSION", 0)
        with pytest.raises(ValueError, match="nothing is left"):
            build(BuildConfig([source / "*.jsonl"], out, workers=1))
    for receipt in (out / ".build").glob("unit-*.json"):
        receipt.write_text("{}")
    assert build(config).text_mb_per_second > 0
    assert files_of(out) == expected


def test_a_unit_whose_files_changed_is_made_again(source, tmp_path, files_of, expected):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="nothing is left"):
        build(BuildConfig([source / "*.jsonl"], out, workers=1))
    unit = out / ".build" / "unit-00001.u16"
    data = bytearray(unit.read_bytes())
    data[100] ^= 1
    unit.write_bytes(data)
    (out / "train_000099.bin").write_bytes(b"of an interrupted build with smaller shards")
    build(BuildConfig([source / "*.jsonl"], out, 9000, 300, workers=1, order="shuffled"))
    assert files_of(out) == expected


def children(pid):
    """The worker processes of a build."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
