"""Rows of a run: they survive kills, and wait for a disk that does not take them."""

import errno
import os
import resource
from contextlib import closing

import pytest
import torch
from run_rows import open_log, rows_of, train_row, write_run

from gpt2_model import PRESETS, flops_per_token
from gpt2_train.config import TrainConfig
from gpt2_train.metrics import peak_tflops


def test_speed_is_of_the_step_alone_and_mfu_follows_llm_c(tmp_path) -> None:
    log = open_log(tmp_path, world_size=2, peak_tflops=0.01)
    log.train(train_row(1, seconds=40.0))
    log.evaluation({"step": 1, "tokens": 1000, "val_loss": 3.0, "hellaswag_acc_norm": 0.25, "seconds": 9.0})
    log.train(train_row(2, seconds=0.5))
    first, evaluation, second = rows_of(tmp_path)
    assert first["tokens_per_second"] == 25
    assert second["tokens_per_second"] == 2000
    assert second["mfu"] == pytest.approx(2000 * flops_per_token(PRESETS["124M"], 1024) / (2 * 0.01e12))
    assert set(second) == {
        "step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds", "data_seconds",
        "peak_memory",
    }  # fmt: skip
    assert evaluation == {"step": 1, "tokens": 1000, "val_loss": 3.0, "hellaswag_acc_norm": 0.25, "seconds": 9.0}


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GB200", None),
    ],
)  # fmt: skip
def test_peak_is_of_exactly_that_gpu(monkeypatch, device, peak) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    known = peak_tflops(TrainConfig(precision="bf16"), torch.device("cuda"))
    assert (known[1] if known else None) == peak
    assert peak_tflops(TrainConfig(precision="fp32"), torch.device("cuda")) is None
    given = peak_tflops(TrainConfig(precision="fp32", peak_tflops=20.0), torch.device("cuda"))
    assert given == (device, 20.0)


def test_numbers_that_are_not_finite_stay_json(tmp_path, capsys) -> None:
    log = open_log(tmp_path)
    log.train(train_row(1, loss=float("nan"), grad_norm=float("inf"), skipped="loss not finite"))
    log.evaluation({"step": 1, "tokens": 1000, "val_loss": float("nan"), "seconds": 1.0})
    train, evaluation = rows_of(tmp_path)
    assert (train["loss"], train["grad_norm"]) == (None, None)
    assert train["skipped"] == "loss not finite (loss nan, grad_norm inf)"
    assert (evaluation["val_loss"], evaluation["not_finite"]) == (None, "val_loss nan")
    said = capsys.readouterr().err
    assert "update skipped: loss not finite (loss nan, grad_norm inf)" in said
    assert "validation loss not finite" in said


def test_only_rank_0_writes(tmp_path, capsys) -> None:
    log = open_log(tmp_path, enabled=False, tensorboard=True, wandb="p")
    write_run(log, 1, 5)
    log.say("hello")
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# Going on


def test_resume_drops_what_is_about_to_be_written_again(tmp_path) -> None:
    with closing(open_log(tmp_path / "undisturbed")) as log:
        write_run(log, 1, 20)
    with closing(open_log(tmp_path / "killed")) as log:
        write_run(log, 1, 18)  # killed after 18, its checkpoint is of 10
    with closing(open_log(tmp_path / "killed", first_step=10)) as log:
        assert log.evaluated == 10
        write_run(log, 11, 20)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    with closing(open_log(tmp_path / "killed")) as log:  # a fresh start
        assert log.evaluated is None
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "killed", "samples.jsonl") == []


def test_a_line_cut_anywhere_is_repaired(tmp_path) -> None:
    with closing(open_log(tmp_path)) as log:
        write_run(log, 1, 6)
    for name, at in (("metrics.jsonl", 6), ("samples.jsonl", 5)):
        whole = (tmp_path / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        for cut in range(1, len(lines[-1]), 4):
            (tmp_path / name).write_bytes(whole[:-cut])
            open_log(tmp_path, first_step=at).close()
            # Only the newline is gone where the row is whole.
            assert (tmp_path / name).read_bytes() == (whole if cut == 1 else b"".join(lines[:-1])), cut
        (tmp_path / name).write_bytes(whole)


def test_garbage_inside_is_dropped_and_told(tmp_path, capsys) -> None:
    with closing(open_log(tmp_path)) as log:
        write_run(log, 1, 5)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    garbage = [b"\x00\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:3], *garbage, *lines[3:]]))
    capsys.readouterr()
    open_log(tmp_path, first_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert "3 broken lines dropped" in capsys.readouterr().err


def test_samples_without_their_evaluation_are_dropped(tmp_path) -> None:
    with closing(open_log(tmp_path)) as log:
        write_run(log, 1, 5)
        log.sample({"step": 5, "row": 7, "prompt": "", "text": "committed with the rest"})
        log.sample({"step": 6, "row": 0, "prompt": "", "text": "killed before the evaluation's row"})
    log = open_log(tmp_path, first_step=6)
    assert log.evaluated == 5
    assert [row["step"] for row in rows_of(tmp_path, "samples.jsonl")] == [5, 5, 5]


# A disk that does not take rows


def test_a_full_disk_is_one_clear_line_and_no_half_row(tmp_path, capsys) -> None:
    """The kind of prime-rl #1763: rows wait in memory while the disk is full, and no run ends for it."""
    log = open_log(tmp_path)
    write_run(log, 1, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # 20 bytes of the next row go in
    try:
        write_run(log, 5, 6)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.train(train_row(7))
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7]  # 5 has an evaluation, too
    assert len(rows_of(tmp_path, "samples.jsonl")) == 2
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written (File too large): the run continues" in warning


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_does_not_take_rows_loses_none_and_is_opened_again(
    tmp_path, monkeypatch, capsys, code
) -> None:
    """Half of a row gets in and cannot be taken back; the old handle stays stale until all is well."""
    log, write = open_log(tmp_path), os.write
    write_run(log, 1, 2)
    stale = [os.fstat(log.metrics.file.fileno()).st_ino]

    def broken(descriptor, data):
        if stale and os.fstat(descriptor).st_ino == stale[0]:
            if len(data) > 20:
                return write(descriptor, data[:20])
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    class NoTruncate:
        def __init__(self, file) -> None:
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def truncate(self, size):
            if stale:
                raise OSError(code, os.strerror(code))
            return self.file.truncate(size)

    monkeypatch.setattr(os, "write", broken)
    monkeypatch.setattr(log.metrics, "file", NoTruncate(log.metrics.file))
    write_run(log, 3, 4)
    log.flush()
    stale.clear()
    write_run(log, 5, 6)
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 5, 6]
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("how", ["removed", "edited", "a folder"])
def test_a_log_that_goes_in_mid_run_is_begun_anew(tmp_path, capsys, how) -> None:
    """A user tidied up: the open descriptor took rows that nobody could read, in silence."""
    log, path = open_log(tmp_path), tmp_path / "metrics.jsonl"
    write_run(log, 1, 3)
    path.rename(tmp_path / "old")
    if how == "edited":  # as editors do, which may leave the last line without its end
        path.write_bytes((tmp_path / "old").read_bytes().rstrip(b"\n"))
    if how == "a folder":
        path.mkdir()
        write_run(log, 4, 4)
        path.rmdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    write_run(log, 4 + (how == "a folder"), 7)
    log.flush()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3] * (how == "edited") + [4, 5, 5, 6, 7]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl was removed or replaced: rows from here on are in the file there now") == 1
    assert said.count("warning") == 1 + (how == "a folder")


def test_rows_that_could_never_be_written_are_counted_at_the_end(tmp_path, monkeypatch, capsys) -> None:
    log = open_log(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    write_run(log, 1, 4)
    log.close()
    assert "metrics.jsonl lacks 4 rows, which could not be written" in capsys.readouterr().err


def test_no_descriptor_is_needed_later(tmp_path) -> None:
    log = open_log(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            (tmp_path / "other").open("w")
        write_run(log, 1, 5)
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows_of(tmp_path)) == 6


def test_a_file_that_cannot_be_opened_is_refused_at_the_start(tmp_path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(OSError, match=r"samples\.jsonl") as caught:
        open_log(tmp_path)
    assert "\n" not in str(caught.value)


def test_flush_has_rows_on_the_disk_or_says_so(tmp_path, monkeypatch, capsys) -> None:
    log, synced = open_log(tmp_path), []
    monkeypatch.setattr(os, "fsync", synced.append)
    log.flush()
    assert [os.readlink(f"/proc/self/fd/{number}") for number in synced] == [
        str(tmp_path / "metrics.jsonl"), str(tmp_path / "samples.jsonl"),
    ]  # fmt: skip

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    log.flush()
    assert "metrics.jsonl cannot be written (Input/output error)" in capsys.readouterr().err
