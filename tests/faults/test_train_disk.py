"""T4, T11, T18: a disk that fills up, a folder that cannot be written, or is gone; a log nobody reads."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_disk import own_mounts
from train_faults import checkpoint, good_steps, rows, snapshot

import soak

# In a mount namespace of its own: a small disk that somebody fills in mid-run and, in the second run, clears.
SCRIPT = """
import json, pathlib, subprocess, sys, os
disk, saved, faults = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
told = {}
for name, faults in faults.items():
    command = [sys.executable, "-c", PLANTED, json.dumps(faults), *sys.argv[4:]]
    if name.startswith("continue"):
        command += ["--on-save-error", "continue"]
    done = subprocess.run(command, capture_output=True, text=True)
    told[name] = [done.returncode, done.stderr, sorted(str(p.relative_to(disk)) for p in disk.rglob("*"))]
    (disk / "filler").unlink(missing_ok=True)
subprocess.run(["cp", "-r", disk / "out", saved], check=True)
print(json.dumps(told))
"""
PLANTED = """
import json, sys, inside
for name, options in json.loads(sys.argv.pop(1)):
    getattr(inside, name)(**options)
from gpt2_model.command import run_command as run
from gpt2_train.cli import main
run(main, "gpt2-train")
"""


@pytest.mark.slow
@pytest.mark.skipif(not own_mounts(), reason="no mount namespace for this user, so no small disk to fill")
def test_a_disk_that_fills_up(tmp_path, runs) -> None:
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    filler = str(disk / "filler")
    faults = {
        "abort": [["fill_disk", {"step": 20, "path": filler}]],
        "continue": [["fill_disk", {"step": 30, "path": filler, "clear": 40}]],
    }
    words = soak.command_line(runs.data, disk / "out")
    script = f"PLANTED = {PLANTED!r}\n{SCRIPT}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script, disk, saved, json.dumps(faults), *words],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    code, said, files = told["abort"]
    assert code == 1, said
    last = said.splitlines()[-1]
    assert last.startswith(f"Error: cannot write {disk}/out/checkpoints/step-00000021: ")
    assert "GB needed" in last
    assert "GB free" in last
    assert "Traceback" not in said
    assert not [name for name in files if ".tmp" in name]
    assert {name.split("/")[2] for name in files if name.count("/") == 2} >= {"step-00000012", "step-00000015"}
    code, said, files = told["continue"]
    assert code == 0, said
    assert "warning: cannot write" in said
    assert "training goes on, as on_save_error asks for" in said
    runs.must_equal_whole(saved)


def test_a_write_that_fails_in_the_middle_of_a_file(tmp_path, runs) -> None:
    """RLIMIT_FSIZE: every file of a checkpoint in turn cannot be written whole."""
    out = runs.wind_back(tmp_path / "run", 57)
    before = snapshot(out / "checkpoints")
    assert runs.run(out, ("limit_at", {"step": 59, "size": 30_000})) == 1
    said = runs.said(out)
    assert f"Error: cannot write {checkpoint(out, 60)}: " in said
    assert "the checkpoints before it are untouched" in said
    assert "Traceback" not in said
    assert snapshot(out / "checkpoints") == before
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("file", ["trainer.json", "manifest.json"])
def test_an_error_in_each_file_of_a_save(tmp_path, runs, file) -> None:
    out = tmp_path / "run"
    assert runs.run(out, ("in_save", {"number": 3, "do": "disk full", "file": file})) == 1
    said = runs.said(out)
    assert f"Error: cannot write {checkpoint(out, 9)}: " in said
    assert "No space left on device" in said
    assert good_steps(out) == [3, 6]
    assert not list((out / "checkpoints").glob(".tmp*"))
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_after_a_failed_save_by_choice(tmp_path, runs, ranks) -> None:
    out = tmp_path / "run"
    fault = ("in_save", {"number": 3, "do": "disk full", "rank": 0})
    runs.must_finish_as_whole(out, fault, ranks=ranks, on_save_error="continue")
    assert f"warning: cannot write {checkpoint(out, 9)}: " in runs.said(out)


def test_the_last_save_must_not_fail(tmp_path, runs) -> None:
    out = tmp_path / "run"
    assert runs.run(out, ("in_save", {"number": 20, "do": "disk full"}), on_save_error="continue") == 1
    assert good_steps(out) == [51, 54, 57]
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bug_in_the_saver_s_thread_ends_the_run(tmp_path, runs, ranks) -> None:
    """T17."""
    out = tmp_path / "run"
    children = runs.begin(out, ("failing_writer", {"number": 3, "do": "bug"}), ranks=ranks)
    assert runs.codes(children, 20) == [1] * ranks
    assert "saving failed: RuntimeError('planted')" in runs.said(out)
    assert good_steps(out) == [3, 6]
    assert rows(out)[-1]["step"] <= 12
    runs.must_finish_as_whole(out, ranks=ranks)


def test_too_little_room_is_told_before_training(tmp_path, runs) -> None:
    """A run whose checkpoints cannot fit: 124M parameters on a disk that is said to have 1 GB."""
    out = tmp_path / "run"
    assert runs.run(out, ("little_room", {"free": 100_000})) == 1
    said = runs.said(out)
    assert "free" in said
    assert "Traceback" not in said
    assert rows(out) == []


BAD_PLACES = {
    "a file": lambda path: path.write_text("mine"),
    "below a file": lambda path: path.parent.write_text("mine"),
    "read-only": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_folder_that_cannot_be_is_told_before_torch_is_loaded(tmp_path, runs, place) -> None:
    out = tmp_path / "parent" / "run"
    out.parent.parent.mkdir(exist_ok=True)
    if place != "below a file":
        out.parent.mkdir()
    BAD_PLACES[place](out)
    faults = [("without_torch", {})]
    if place == "read-only":
        if os.geteuid() == 0:
            faults.append(("no_access", {"path": str(out)}))
        else:
            out.chmod(0o555)
    log = tmp_path / "log"
    child = runs.server.start(soak.command_line(runs.data, out), log, faults)
    assert child.wait() == 1
    said = log.read_text()
    assert said.count("\n") == 1
    assert said.startswith(f"Error: --out {out}: ")


def test_a_link_to_a_folder_and_a_parent_that_is_not_there(tmp_path, runs) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    runs.must_finish_as_whole(tmp_path / "link")
    assert good_steps(tmp_path / "real") == [54, 57, 60]
    deep = tmp_path / "not" / "there" / "run"
    log = tmp_path / "log"
    child = runs.server.start(soak.command_line(runs.data, deep), log)
    assert child.wait() == 0, log.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_is_gone_ends_the_run(tmp_path, runs, ranks) -> None:
    out = tmp_path / "run"
    fault = (
        "in_step",
        {"step": 8, "call": "rename", "arguments": [str(out), str(tmp_path / "elsewhere")], "rank": 0},
    )
    assert runs.codes(runs.begin(out, fault, ranks=ranks), 20) == [1] * ranks
    said = runs.said(out)
    assert str(out) in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in said
    assert not out.exists() or not (out / "checkpoints").exists()
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "elsewhere").rename(out)
    runs.must_finish_as_whole(out, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_metrics_file_that_cannot_grow(tmp_path, runs, ranks) -> None:
    out = tmp_path / "run"
    fault = ("in_log", {"text": "grad_norm", "do": "disk full", "number": 10})
    assert runs.codes(runs.begin(out, fault, ranks=ranks), 20) == [1] * ranks
    said = runs.said(out)
    assert "No space left on device" in said.splitlines()[-1]
    assert "metrics.jsonl" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert good_steps(out) == [3, 6, 9]
    runs.must_finish_as_whole(out, ranks=ranks)


def test_a_metrics_line_cut_short_is_repaired(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 61, "lo')
    runs.must_finish_as_whole(out)


def test_nobody_reads_what_it_says(tmp_path, runs) -> None:
    out = tmp_path / "run"
    runs.must_finish_as_whole(out, ("closed_stderr", {}))


def test_no_free_descriptors(tmp_path, runs) -> None:
    """RLIMIT_NOFILE reached in mid-run: an error, and the same command goes on."""
    out = tmp_path / "run"
    assert runs.run(out, ("no_descriptors", {"step": 11})) == 1
    assert "Too many open files" in runs.said(out)
    runs.must_finish_as_whole(out)
