"""T4, T11, T17, T18: a disk that fills up, a folder that cannot be written, or is gone; a log nobody reads."""

import errno
import json
import os
import re
import shutil
import sys

import pytest
from test_disk import own_mounts
from train_faults import PLANTED, SHAPE, checkpoint, good_steps, planted, rows

from gpt2_model import GPT, GPTConfig
from gpt2_train.checkpoint import write_checkpoint

# In a mount namespace of its own: a small disk that somebody fills in mid-run and, in the second run, clears.
SCRIPT = """
import json, pathlib, subprocess, sys
disk, saved, faults = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=True)
report = {}
for name, faults in faults.items():
    command = [sys.executable, "-c", PLANTED, json.dumps(faults), *sys.argv[4:], "--on-save-error", name]
    done = subprocess.run(command, capture_output=True, text=True)
    report[name] = [done.returncode, done.stderr, sorted(str(p.relative_to(disk)) for p in disk.rglob("*"))]
    (disk / "filler").unlink(missing_ok=True)
subprocess.run(["cp", "-r", disk / "out", saved], check=True)
print(json.dumps(report))
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
    script = f"PLANTED = {PLANTED!r}\n{SCRIPT}"
    launcher = [
        "-c",
        f"import os, sys; os.execvp('unshare', ['unshare', '-rm', {sys.executable!r}, *sys.argv[1:]])",
    ]
    done = planted(faults, runs.data, disk / "out", *launcher, "-c", script, disk, saved)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    code, said, files = report["abort"]
    assert code == 1, said
    last = said.splitlines()[-1]
    assert last.startswith(f"Error: cannot write {disk}/out/checkpoints/step-00000021: ")
    assert "GB needed" in last
    assert "GB free" in last
    assert "Traceback" not in said
    assert not [name for name in files if ".tmp" in name]
    assert {name.split("/")[2] for name in files if name.count("/") == 2} >= {"step-00000012", "step-00000015"}
    code, said, files = report["continue"]
    assert code == 0, said
    assert "warning: cannot write" in said
    assert "training continues because of --on-save-error continue" in said
    runs.must_finish_as_whole(saved)


@pytest.mark.parametrize(
    ("fault", "options", "says", "ranks"),
    [
        ("in_save", {"do": "disk full"}, "cannot write STEP9: [Errno 28] No space left on device", 1),
        ("in_save", {"do": "disk full", "file": "manifest.json"}, "cannot write STEP9: [Errno 28]", 1),
        ("bad_disk", {}, "cannot write STEP9: what the disk returns is not what was written: ", 1),
        ("in_save", {"do": "bug"}, "saving failed: RuntimeError('planted')", 1),
        ("in_save", {"do": "bug", "rank": 0}, "saving failed: RuntimeError('planted')", 2),
    ],
    ids=["trainer.json", "manifest.json", "not what was written", "a bug", "a bug, two ranks"],
)
def test_a_save_that_fails_ends_the_run_at_the_next_step(tmp_path, runs, fault, options, says, ranks) -> None:
    """The one before it is not deleted: that is done when the next one has been read back."""
    out, says = tmp_path / "run", [says.replace("STEP9", str(checkpoint(tmp_path / "run", 9)))]
    said = runs.fail(out, (fault, {"number": 3, **options}), says=says, good=[6], ranks=ranks, keep=1)
    assert ("GB needed" in said) == (options.get("do") == "disk full"), said
    assert rows(out)[-1]["step"] <= 12
    runs.must_finish_as_whole(out, ranks=ranks)


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_save_that_fails_says_what_is_true(tmp_path, monkeypatch, is_gone) -> None:
    """A first save met EIO, or checkpoints was removed: "... GB free; the checkpoints before it are untouched"."""

    def fail(_model, folder) -> None:
        if is_gone:
            shutil.rmtree(folder.parent)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(GPT, "save_pretrained", fail)
    says = f"cannot write {checkpoint(tmp_path, 3)}: [Errno 5] Input/output error"
    if is_gone:
        says = f"{tmp_path}/checkpoints was removed: the run folder must stay while the run trains"
    with pytest.raises(OSError, match=f"^{re.escape(says)}$"):
        write_checkpoint(tmp_path, 3, GPT(GPTConfig(**SHAPE)), {}, {})


def test_weights_that_are_not_finite_push_out_no_checkpoint(tmp_path, runs) -> None:
    says = ["is not finite at step 15: the checkpoints before it are good"]
    fault = ("unsound_weight", {"step": 14})
    runs.fail(tmp_path / "run", fault, says=says, good=[6, 9, 12], max_skips=99)
    runs.must_finish_as_whole(tmp_path / "run")


@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_after_a_failed_save_by_choice(tmp_path, runs, ranks) -> None:
    out = tmp_path / "run"
    fault = ("in_save", {"number": 3, "do": "disk full", "rank": 0})
    said = runs.must_finish_as_whole(out, fault, ranks=ranks, on_save_error="continue")
    assert f"warning: cannot write {checkpoint(out, 9)}: " in said


def test_the_last_save_must_not_fail(tmp_path, runs) -> None:
    fault = ("in_save", {"number": 20, "do": "disk full"})
    runs.fail(tmp_path / "run", fault, on_save_error="continue", good=[51, 54, 57])
    runs.must_finish_as_whole(tmp_path / "run")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, runs) -> None:
    """The second one is written once three more steps are logged, and is of the state before them."""
    out = tmp_path / "run"
    faults = [
        ("in_save", {"number": 2, "do": "wait for step 9"}),
        ("in_save", {"number": 3, "do": "SIGKILL"}),
    ]
    assert runs.run(out, *faults) == -9, runs.said(out)
    assert good_steps(out) == [3, 6]
    runs.must_finish_as_whole(out)


def test_too_little_room_is_told_before_training(tmp_path, runs) -> None:
    out = tmp_path / "run"
    runs.fail(out, ("little_room", {"free": 100_000}), says=["will need", "0.1 MB are free"])
    assert rows(out) == []


BAD_PLACES = {
    "a file": lambda path: path.write_text("mine"),
    "below a file": lambda path: path.parent.write_text("mine"),
    "read-only": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_folder_that_cannot_be_is_told_before_torch_is_loaded(tmp_path, runs, place) -> None:
    out = tmp_path / "parent" / "run"
    if place != "below a file":
        out.parent.mkdir()
    BAD_PLACES[place](out)
    faults = [("without_torch", {}), ("no_access", {"path": str(out)})]
    if place == "read-only" and os.geteuid():
        out.chmod(0o555)
    (child,) = runs.begin(out, *faults, log=tmp_path / "log")
    assert child.wait() == 1
    said = child.output()
    assert said.count("\n") == 1
    assert said.startswith(f"Error: --out {out}: ")


def test_a_link_to_a_folder_and_a_parent_that_is_not_there(tmp_path, runs) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    runs.must_finish_as_whole(tmp_path / "link")
    assert good_steps(tmp_path / "real") == [54, 57, 60]
    (child,) = runs.begin(tmp_path / "not" / "there" / "run", log=tmp_path / "log", steps=3)
    assert child.wait() == 0, child.output()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_is_gone_ends_the_run(tmp_path, runs, ranks) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    fault = ("move_folder", {"step": 8, "to": str(elsewhere), "rank": 0})
    last = runs.fail(out, fault, ranks=ranks).splitlines()[-1]
    assert last == f"Error: {out} was removed: the run folder must stay while the run trains"
    assert not (out / "checkpoints").exists()
    shutil.rmtree(out, ignore_errors=True)
    elsewhere.rename(out)
    runs.must_finish_as_whole(out, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_metrics_file_that_cannot_grow(tmp_path, runs, ranks) -> None:
    """The kind of prime-rl #1763: what cannot be logged waits, and ends no run that trains and saves."""
    fault = ("in_log", {"text": "grad_norm", "do": "disk full", "number": 10, "rank": 0})
    said = runs.must_finish_as_whole(tmp_path / "run", fault, ranks=ranks)
    assert said.count("metrics.jsonl cannot be written (No space left on device): the run continues") == 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("code", ["ENOTEMPTY", "EBUSY", "EACCES"])
def test_a_folder_that_cannot_be_emptied_does_not_end_the_run(tmp_path, runs, code, ranks) -> None:
    """prime-rl #1763, transformers #13035: NFS keeps a file that somebody reads, and rmdir fails."""
    out = tmp_path / "run"
    fault = ("stuck_folder", {"text": "step-00000009", "code": code, "rank": 0})
    stop = ("in_update", {"step": 40, "do": "SIGTERM"})
    assert runs.run(out, fault, stop, ranks=ranks) == 143, runs.said(out)
    # The same command starts, and saves, while the folder stays.
    assert runs.run(out, fault, ranks=ranks) == 0, runs.said(out)
    (stuck,) = (out / "checkpoints").glob(".tmp*")
    assert runs.said(out).count(f"warning: {stuck} cannot be deleted") == 2  # once a start
    assert good_steps(out) == [54, 57, 60]
    runs.must_finish_as_whole(out, ranks=ranks)  # which deletes it


def test_a_folder_that_cannot_be_renamed_stays_whole_and_is_not_counted(tmp_path, runs) -> None:
    """transformers #13035: EBUSY, as of a folder that something is mounted on."""
    out = tmp_path / "run"
    assert runs.run(out, ("stuck_folder", {"text": "/step-00000009", "code": "EBUSY"})) == 0, runs.said(out)
    assert good_steps(out) == [9, 54, 57, 60]
    assert runs.said(out).count(f"{checkpoint(out, 9)} cannot be deleted (Device or resource busy)") == 1
    runs.must_finish_as_whole(out)


def test_an_unwritten_folder_that_cannot_be_emptied_does_not_stop_the_next_save(tmp_path, runs) -> None:
    """prime-rl #1763: what a failed save left stays, and the same step is saved beside it."""
    out = tmp_path / "run"
    runs.fail(
        out,
        ("in_save", {"number": 3, "do": "disk full"}),
        ("stuck_folder", {"text": ".tmp-step", "code": "EIO"}),
        leaves=True,
    )
    assert runs.run(out, ("stuck_folder", {"text": ".tmp-step-00000009", "code": "EIO"})) == 0, runs.said(out)
    assert good_steps(out) == [54, 57, 60]


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_and_validations_that_fail_do_not_end_the_run(tmp_path, runs, ranks) -> None:
    """The kind of prime-rl #1763: on the last rank alone generation raises, then a shard is gone."""
    out = tmp_path / "run"
    faults = [
        ("broken_samples", {"rank": ranks - 1}),
        ("broken_validation", {"number": 4 // ranks + 1, "rank": ranks - 1}),
    ]
    assert runs.run(out, *faults, ranks=ranks, eval_tokens=512) == 0, runs.said(out)
    assert runs.said(out).count("no samples (RuntimeError: planted); training continues") == 1
    assert "warning: step 12: no validation loss (" in runs.said(out)
    assert [row["step"] for row in rows(out, "val_loss")] == [0, 24, 36, 48, 60]  # 4 batches each
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(runs.whole(ranks))]


def test_a_metrics_line_cut_short_is_repaired_though_nobody_reads_what_is_said(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 61, "lo')
    runs.must_finish_as_whole(out, ("closed_stderr", {}))


def test_no_free_descriptors(tmp_path, runs) -> None:
    """RLIMIT_NOFILE reached in mid-run: an error, and the same command resumes."""
    out = tmp_path / "run"
    assert runs.run(out, ("no_descriptors", {"step": 11})) == 1
    assert "Too many open files" in runs.said(out)
    runs.must_finish_as_whole(out)
