"""Builds that are killed with SIGKILL, anywhere, any number of times, end with the same bytes."""

import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fineweb_like import OPTIONS, arguments, hashes

from gpt2_data import BuildConfig, build
from gpt2_data.building import plan, workers

CLI = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]

# Builds in a forked process each, since starting Python takes longer than most of what is to be interrupted.
SOAK = """
import json, os, random, signal, sys, time
from gpt2_data import BuildConfig, build, tokenizer

sources, out, options, kills = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
config = BuildConfig([sources], out, workers=1, tokenizer="tiktoken", **options)
tokenizer.get_tokenizer()
rng = random.Random(11)
killed = finished = 0
while killed < kills:
    child = os.fork()
    if child == 0:
        build(config)
        os._exit(0)
    # Most builds go on where one was; about one in twenty ends, and the next begins anew.
    time.sleep(rng.uniform(0, 0.35))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
    elif status:
        sys.exit("a build failed")
    else:
        finished += 1
        os.rename(out, f"{out}-{finished}")
print(json.dumps({"killed": killed, "finished": finished}))
"""


@pytest.mark.slow
def test_a_hundred_kills_at_random_instants(corpus, expected, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SOAK, f"{corpus}/*.parquet", str(out), json.dumps(OPTIONS), "100"]
    soak = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    counts = json.loads(soak.stdout.splitlines()[-1])
    assert counts["killed"] == 100
    build(BuildConfig([corpus / "*.parquet"], out, workers=1, **OPTIONS))
    for folder in [out, *(tmp_path / f"out-{i + 1}" for i in range(counts["finished"]))]:
        assert hashes(folder) == expected


def test_the_command_and_all_its_workers_killed(corpus, expected, tmp_path):
    rng = random.Random(2)
    out = tmp_path / "out"
    for _ in range(4):
        process = subprocess.Popen([*CLI, *arguments(corpus, out, "--workers", "2")], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 4))
        pids = children(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda pids=pids: not any(map(is_running, pids)))  # they do not stay behind
    done = subprocess.run([*CLI, *arguments(corpus, out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == expected


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(corpus, expected, tmp_path, sent):
    """One line, 128 + its number, no worker left behind, and nothing of Python's own housekeeping."""
    out = tmp_path / "out"
    command = [*CLI, *arguments(corpus, out, "--workers", "2", "--tokenizer", "tiktoken")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any((out / ".build").rglob("unit*")) or process.poll() is not None)
    pids = children(process.pid)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, errors
    assert errors.splitlines()[-1] == f"stopped by {sent.name}: run the same command again to resume"
    assert "Traceback" not in errors
    assert "leaked" not in errors
    wait_until(lambda: not any(map(is_running, pids)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == expected


def test_workers_killed_at_random_instants(corpus, expected, tmp_path):
    """Not so often that one unit is hit twice: that is taken for the unit's fault."""
    out = tmp_path / "out"
    command = [*CLI, *arguments(corpus, out, "--workers", "2", "--tokenizer", "tiktoken")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(children(process.pid)) == 2 or process.poll() is not None)
    time.sleep(random.Random(4).uniform(0.5, 1.5))
    pids = children(process.pid)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(pids) == 2
    assert hashes(out) == expected


def test_a_unit_that_kills_twice_is_named_with_its_document(corpus, tmp_path):
    """A worker that meets a certain document dies, as a bug in a library or a lack of memory would make it."""
    (tmp_path / "sitecustomize.py").write_text(  # each Python, of the command and its workers, begins with this
        "import os, signal\n"
        "from gpt2_data import console, tokenizer\n"
        "console.SECONDS_BETWEEN_LINES = float('inf')\n"  # a slow machine would show its progress
        "real = tokenizer.encode_texts\n"
        "def encode_texts(texts, backend, first=0):\n"
        "    if any('Two of the most useful' in text for text in texts.to_pylist()):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(texts, backend, first)\n"
        "tokenizer.encode_texts = encode_texts\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    bad = tmp_path / "bad.jsonl"
    lines = [f"document {i}" for i in range(300)]
    lines[217] = "Two of the most useful things"
    bad.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    command = ["build", str(bad), f"{corpus}/000*.parquet", "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run([*CLI, *command], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    where = f"unit 0 ({bad}): document 217 of it, counted from 0: the process that worked on it died twice"
    assert where in done.stderr
    assert done.stderr.count("\n") == 1


def job(**more):
    """A job whose tasks are commands of the shell."""
    shell = functools.partial(subprocess.call, shell=True)  # `careful` is its buffer size, which does not matter
    return workers.Job(shell, lambda task: "unit 7", **more)


def test_a_task_may_kill_its_worker_once_but_not_twice(tmp_path):
    once = f"test -e {tmp_path}/flag || {{ touch {tmp_path}/flag; kill -9 $PPID; }}"
    assert workers.run(job(), ["true", once, "exit 3", "true"], 2) == [0, 0, 3, 0]
    started = tmp_path / "started"
    with pytest.raises(OSError, match="unit 7: the process that worked on it died twice"):
        workers.run(job(), [f"echo >> {started}; kill -9 $PPID", "true"], 2)
    assert len(started.read_text().splitlines()) == 2


def test_tasks_wait_until_they_are_ready(tmp_path):
    flag = tmp_path / "flag"
    order = []
    tasks = [f"sleep 0.3; touch {flag}", f"test -e {flag}"]
    waiting = job(
        done=lambda task, result: order.append(task), ready=lambda task: task == tasks[0] or flag.exists()
    )
    for count in 1, 2:
        flag.unlink(missing_ok=True)
        assert workers.run(waiting, tasks, count) == [0, 0]
        assert order[-2:] == tasks


class Stopped(BaseException):
    """Stands for the end of the process."""


def test_stopped_before_and_after_every_file(corpus, tmp_path, monkeypatch):
    """Every file is published by one rename, and those that stay by an fsync; stop at each of them in turn."""
    out = tmp_path / "out"
    config = BuildConfig([corpus / "00[0-2]*.parquet"], out, 100_000, 10_000, workers=1, order="shuffled")
    build(dataclasses.replace(config, out=tmp_path / "expected"))

    def stopping(real, calls):
        def call(*arguments):
            if next(calls) == 0:
                raise Stopped
            return real(*arguments)

        return call

    for step in itertools.count(1):
        calls = itertools.count(step - 1, -1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping(Path.replace, calls))
            patch.setattr(os, "fsync", stopping(os.fsync, calls))
            try:
                build(config)
                break
            except Stopped:
                finished = (out / "dataset.json").exists()
        if finished:  # stopped after the last rename: what remains is to say so
            assert build(config).already_built
            break
    assert step > 11
    assert hashes(out) == hashes(tmp_path / "expected")


def test_units_of_another_plan_are_not_used(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = BuildConfig([corpus / "00[01]*.parquet"], out, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "PLAN_VERSION", 0)
        interrupt(config)
    for receipt in (out / ".build").glob("unit-*.json"):
        receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"tokens": 5}))
    assert build(config).text_mb_per_second > 0
    build(dataclasses.replace(config, out=tmp_path / "expected"))
    assert hashes(out) == hashes(tmp_path / "expected")


def test_damaged_units_and_shards_are_made_again_and_whole_units_kept(corpus, tmp_path):
    sources, out = [corpus / "00[0-2]*.parquet"], tmp_path / "out"
    config = BuildConfig(sources, out, 200_000, 10_000, workers=1)
    interrupt(config, "writing", 3)
    for path in out / ".build" / "unit-00001.u16", out / "train_000001.bin":
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    (out / "train_000099.bin").write_bytes(b"of an interrupted build with smaller shards")

    def units():
        return {path.name: path.stat().st_ino for path in (out / ".build").glob("*.u16")}

    before, seen = units(), {}
    build(config, lambda phase, *_: seen.update(units()) if phase == "writing" else None)
    assert len(before) > 2
    assert [name for name in before if seen[name] != before[name]] == ["unit-00001.u16"]
    build(dataclasses.replace(config, out=tmp_path / "expected"))
    assert hashes(out) == hashes(tmp_path / "expected")


def interrupt(config, phase="tokenizing", calls=None):
    """Build, and stop in the phase when something is done for the `calls`th time; without it when all is done."""
    due = itertools.count(1)

    def stop(now, done, total, tokens):
        if now == phase and done and (next(due) == calls if calls else done == total):
            raise Stopped

    with pytest.raises(Stopped):
        build(config, stop)


def children(pid):
    """Return the worker processes of a build."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in pids if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []  # one of them ended


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
