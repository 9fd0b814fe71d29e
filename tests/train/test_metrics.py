"""What a run records and says: rows that survive kills, a terminal that may fail, trackers that may fail too."""

import errno
import gzip
import io
import json
import os
import pty
import resource
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gpt2_train import console, metrics
from gpt2_train.config import TrainConfig
from gpt2_train.console import TimeLeft
from gpt2_train.metrics import RunLog, peak_tflops
from gpt2_train.profiling import Profiler
from gpt2_train.trackers import check_trackers

CPU = torch.device("cpu")
FLOPS = 803_000_000


def open_log(folder: Path, first_step: int = -1, world_size: int = 1, enabled: bool = True, **settings) -> RunLog:
    folder.mkdir(exist_ok=True)
    settings = {"steps": 100, "batch_tokens": 1000, "precision": "bf16", "eval_every": 5, **settings}
    return RunLog(TrainConfig(**settings), folder, first_step, world_size, CPU, FLOPS, enabled)


def train_row(step: int, **changes):
    return {
        "step": step, "tokens": step * 1000, "loss": 10.0 / step, "grad_norm": 1.0, "lr": 1e-3, "seconds": 0.5,
        "data_seconds": 0.001, "peak_memory": 10**6, **changes,
    }  # fmt: skip


def write_run(log: RunLog, first: int, last: int) -> None:
    """Steps first to last, an evaluation with two samples after each fifth."""
    for step in range(first, last + 1):
        log.train(train_row(step))
        if step % 5 == 0:
            for row in range(2):
                log.sample({"step": step, "row": row, "prompt": "Hi", "text": "two\u2028lines\x85 \x1b[2J"})
            log.evaluation({"step": step, "tokens": step * 1000, "val_loss": 3.0, "seconds": 2.0})


def rows_of(folder: Path, name: str = "metrics.jsonl"):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_bytes().splitlines()]


# Rows


def test_speed_is_of_the_step_alone_and_mfu_follows_llm_c(tmp_path) -> None:
    log = open_log(tmp_path, world_size=2, peak_tflops=0.01)
    log.train(train_row(1, seconds=40.0))
    log.evaluation({"step": 1, "tokens": 1000, "val_loss": 3.0, "hellaswag_acc_norm": 0.25, "seconds": 9.0})
    log.train(train_row(2, seconds=0.5))
    first, evaluation, second = rows_of(tmp_path)
    assert first["tokens_per_second"] == 25
    assert second["tokens_per_second"] == 2000
    assert second["mfu"] == pytest.approx(2000 * FLOPS / (2 * 0.01e12))
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
    found = peak_tflops(TrainConfig(precision="bf16"), torch.device("cuda"))
    assert (found[1] if found else None) == peak
    assert peak_tflops(TrainConfig(precision="fp32"), torch.device("cuda")) is None
    told = peak_tflops(TrainConfig(precision="fp32", peak_tflops=20.0), torch.device("cuda"))
    assert told == (device, 20.0)


def test_start_names_the_formula_and_the_peak(tmp_path, monkeypatch, capsys) -> None:
    open_log(tmp_path)
    assert capsys.readouterr().err == (
        "MFU: 6N + 6LCT = 803 MFLOP a token; no peak known of CPU in bf16: --peak-tflops gives one\n"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    RunLog(TrainConfig(precision="bf16"), tmp_path, -1, 8, torch.device("cuda"), FLOPS, True)
    assert capsys.readouterr().err == (
        "MFU: 6N + 6LCT = 803 MFLOP a token of 8 x H100's 989 TFLOP/s (bf16 dense)\n"
    )


def test_numbers_that_are_not_finite_stay_json(tmp_path, capsys) -> None:
    log = open_log(tmp_path)
    log.train(train_row(1, loss=float("nan"), grad_norm=float("inf"), skipped="loss not finite"))
    log.evaluation({"step": 1, "tokens": 1000, "val_loss": float("nan"), "seconds": 1.0})
    train, evaluation = rows_of(tmp_path)
    assert (train["loss"], train["grad_norm"]) == (None, None)
    assert train["skipped"] == "loss not finite (loss nan, grad_norm inf)"
    assert (evaluation["val_loss"], evaluation["not_finite"]) == (None, "val_loss nan")
    said = capsys.readouterr().err
    assert "update left out: loss not finite (loss nan, grad_norm inf)" in said
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
    with open_log(tmp_path / "undisturbed") as log:
        write_run(log, 1, 20)
    with open_log(tmp_path / "killed") as log:
        write_run(log, 1, 18)  # killed after 18, its checkpoint is of 10
    with open_log(tmp_path / "killed", first_step=10) as log:
        assert log.last_evaluation == 10
        write_run(log, 11, 20)
        assert log.last_evaluation == 20
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    with open_log(tmp_path / "killed") as log:  # a fresh start
        assert log.last_evaluation is None
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "killed", "samples.jsonl") == []


def test_a_line_cut_anywhere_is_repaired(tmp_path) -> None:
    with open_log(tmp_path) as log:
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
    with open_log(tmp_path) as log:
        write_run(log, 1, 5)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    garbage = [b"\x00\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:3], *garbage, *lines[3:]]))
    capsys.readouterr()
    open_log(tmp_path, first_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert "3 broken lines dropped" in capsys.readouterr().err


def test_samples_without_their_evaluation_are_dropped(tmp_path) -> None:
    with open_log(tmp_path) as log:
        write_run(log, 1, 5)
        log.sample({"step": 5, "row": 7, "prompt": "", "text": "committed with the rest"})
        log.sample({"step": 6, "row": 0, "prompt": "", "text": "killed before the evaluation's row"})
    log = open_log(tmp_path, first_step=6)
    assert log.last_evaluation == 5
    assert [row["step"] for row in rows_of(tmp_path, "samples.jsonl")] == [5, 5, 5]


def test_a_kill_while_repairing_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    with open_log(tmp_path) as log:
        write_run(log, 1, 12)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, first_step=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    open_log(tmp_path, first_step=5)
    assert rows_of(tmp_path)[-1]["step"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


# A disk that does not take rows


def test_a_full_disk_is_one_clear_line_and_no_half_row(tmp_path) -> None:
    log = open_log(tmp_path)
    write_run(log, 1, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # 20 bytes of the next row go in
    try:
        with pytest.raises(OSError) as caught:
            log.train(train_row(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written (File too large)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.train(train_row(5))
    assert rows_of(tmp_path)[-1]["step"] == 5


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


def test_flush_has_rows_on_the_disk_or_fails(tmp_path, monkeypatch) -> None:
    log, synced = open_log(tmp_path), []
    monkeypatch.setattr(os, "fsync", synced.append)
    log.flush()
    assert [os.readlink(f"/proc/self/fd/{number}") for number in synced] == [
        str(tmp_path / "metrics.jsonl"), str(tmp_path / "samples.jsonl"),
    ]  # fmt: skip

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(Input/output error\)"):
        log.flush()


# The terminal


class Terminal:
    """A pseudo-terminal as sys.stderr, and what was written to it."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch = monkeypatch
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        termios.tcsetwinsize(slave, (24, 100))
        self.file = os.fdopen(slave, "w", buffering=1)
        monkeypatch.setattr(sys, "stderr", self.file)

    def read(self) -> str:
        text = b""
        try:
            while piece := os.read(self.master, 65536):
                text += piece
        except BlockingIOError:
            return text.decode()
        return text.decode()

    def close(self) -> None:
        self.monkeypatch.undo()
        self.file.close()
        os.close(self.master)


class Clock:
    """A monotonic clock that the test moves; the clock of the day runs backwards meanwhile."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: 1e9 - 10 * self.now)
        monkeypatch.setattr(time, "time", lambda: 1e9 - 10 * self.now)


def test_on_a_terminal_a_line_a_second_above_a_bar(tmp_path, monkeypatch) -> None:
    terminal, clock, said = Terminal(monkeypatch), Clock(monkeypatch), ""
    log = open_log(tmp_path, steps=100, eval_every=0, checkpoint_every=0)
    for step in range(1, 101):
        clock.now += 0.25
        log.train(train_row(step, seconds=0.25, **({"skipped": "loss spike"} if step == 50 else {})))
        said += terminal.read()
    lines = [part for part in said.replace("\r", "\n").split("\n") if part.startswith("step ")]
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert shown == sorted({1, 2, *range(3, 48, 4), 50, *range(54, 99, 4), 98, 100})
    assert "update left out: loss spike" in said
    bars = [part for part in said.replace("\r", "\n").split("\n") if "%|" in part]
    # The clock of the day goes back, and the bar moves on: each step is 0.25 s after the one before.
    assert [int(bar.split("| ")[1].split("/")[0]) for bar in bars if " left" in bar][-1] == 100
    assert " 50%|" in said
    assert "50/100, 0:12 left" in said
    log.close()
    log.say("after the bar")
    assert terminal.read().endswith("after the bar\r\n")
    terminal.close()


def test_in_a_pipe_plain_lines_every_ten_seconds(tmp_path, monkeypatch, capsys) -> None:
    clock = Clock(monkeypatch)
    log = open_log(tmp_path, steps=100, eval_every=0, checkpoint_every=0)
    for step in range(1, 101):
        clock.now += 1.0
        log.train(train_row(step, seconds=1.0))
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "%|" not in said
    lines = said.splitlines()[1:]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 3, *range(13, 100, 10), 100]
    assert lines[3] == (
        "step  13/100   loss 0.7692   norm 1.000   lr 1.00e-03   1.00 s   1,000 tokens/s   1:27 left"
    )


def test_a_text_cannot_drive_the_terminal(tmp_path, capsys) -> None:
    log = open_log(tmp_path)
    log.sample({"step": 0, "row": 0, "prompt": "Hi", "text": "\x1b]0;owned\x07\nnext\u202e"})
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "  Hi|\\x1b]0;owned\\x07\\nnext\\u202e"
    assert rows_of(tmp_path, "samples.jsonl")[0]["text"] == "\x1b]0;owned\x07\nnext\u202e"


def dead_stream(kind: str):
    """stderr, and what must stay open: one nobody reads, a stuck pipe, a full disk, a closed one, none at all."""
    if kind == "closed by the shell":
        return None, None
    if kind == "closed":
        stream = io.StringIO()
        stream.close()
        return stream, None
    if kind == "full disk":
        return open("/dev/full", "w", buffering=1), None
    reader, writer = os.pipe()
    if kind == "nobody reads":
        os.close(reader)
    else:  # stuck
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
    return os.fdopen(writer, "w", buffering=1), reader


@pytest.mark.parametrize("kind", ["nobody reads", "stuck", "full disk", "closed", "closed by the shell"])
@pytest.mark.parametrize("on_terminal", [False, True])
def test_no_terminal_stops_a_run(tmp_path, monkeypatch, kind, on_terminal) -> None:
    stream, _ = dead_stream(kind)
    if on_terminal and stream is not None and kind != "closed":
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    started = time.monotonic()
    with open_log(tmp_path, first_step=-1) as log:
        write_run(log, 1, 50)
        log.say("x" * 3000)
        log.flush()
    log.say("after its end")
    assert len(rows_of(tmp_path)) == 60
    assert time.monotonic() - started < 5
    if stream is not None and kind != "closed":
        stream.close()  # what is left in its buffer fails no more


def test_a_full_disk_behind_stderr_leaves_the_exit_status_alone() -> None:
    program = (
        "from gpt2_train.config import TrainConfig; from gpt2_train.console import Console\n"
        "c = Console(TrainConfig())\n"
        "for _ in range(3): c.say('hello')\n"
        "c.close()"
    )
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full, check=False).returncode == 0


def test_a_closed_stderr_is_not_taken_by_the_next_file(tmp_path) -> None:
    program = (
        "import os, gpt2_train.cli as cli; cli._fill_standard_streams()\n"
        f"file = open({str(tmp_path / 'checkpoint')!r}, 'w'); os.write(2, b'from C++'); file.write('good')"
    )
    command = f'exec "{sys.executable}" -c "$0" 2>&-'
    subprocess.run(["bash", "-c", command, program], check=True)
    assert (tmp_path / "checkpoint").read_text() == "good"


def test_time_left_has_evaluations_and_checkpoints_in_it() -> None:
    config = TrainConfig(steps=203, eval_every=10, checkpoint_every=20, warmup=1)
    ends, now = {}, 0.0
    left, estimates = TimeLeft(config), {}
    for step in range(1, 204):
        now += 60.0 if step == 1 else 2.0  # the first compiles
        now += 3600.0 if step == 101 else 0.0  # suspended for an hour
        estimates[step] = left.after(step, None if step == 1 else 2.0, now)
        ends[step] = now
        if step % 10 == 0 or step == 203:
            now += 30.0
            left.evaluated(30.0)
        now += 50.0 if step % 20 == 0 or step == 203 else 0.0
    assert estimates[1] is None
    for step in (21, 50, 99, 103, 120, 150, 202, 203):
        true = now - ends[step] - (3600 if step < 101 else 0)
        assert estimates[step] == pytest.approx(true, rel=0.001), step


# Trackers


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path) -> None:
    with open_log(tmp_path, tensorboard=True) as log:
        write_run(log, 1, 12)
    killed = open_log(tmp_path, first_step=10, tensorboard=True)
    for step in range(11, 14):
        killed.train(train_row(step, loss=77.0))
    killed.flush()
    newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    killed.close()
    os.truncate(newest, newest.stat().st_size - 5)  # killed while it was written
    with open_log(tmp_path, first_step=10, tensorboard=True) as log:
        write_run(log, 11, 15)
    assert scalars(tmp_path, "train/loss") == [(step, pytest.approx(10 / step)) for step in range(1, 16)]
    assert scalars(tmp_path, "val/loss") == [(5, 3.0), (10, 3.0), (15, 3.0)]
    assert scalars(tmp_path, "train/tokens_per_second")[0] == (1, 2000.0)
    with open_log(tmp_path, tensorboard=True) as log:  # a fresh start in the same folder
        write_run(log, 1, 2)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2]


def scalars(folder: Path, tag: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class FakeRun:
    """A run of W&B as far as it is used: wandb.init returns it, `step` is the newest that it has."""

    def __init__(self, settings) -> None:
        self.settings, self.step, self.rows, self.finished, self.fails = settings, 0, [], False, None

    def log(self, values, step):
        if self.fails:
            raise self.fails
        assert step >= self.step
        self.step = step
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: runs by id, as its server keeps them."""
    module, runs = ModuleType("wandb"), {}
    module.__version__, module.Settings = "0", SimpleNamespace
    module.init = lambda **settings: runs.setdefault(settings["id"], FakeRun(settings))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return SimpleNamespace(module=module, runs=runs)


def test_wandb_goes_on_in_the_same_run(tmp_path, wandb) -> None:
    with open_log(tmp_path, wandb="gpt2") as log:
        write_run(log, 1, 12)
    with open_log(tmp_path, first_step=10, wandb="gpt2") as log:
        write_run(log, 11, 15)
    (run,) = wandb.runs.values()
    assert run.finished
    assert run.settings["project"] == "gpt2"
    assert run.settings["config"]["batch_tokens"] == 1000
    assert run.settings["dir"] == str(tmp_path)
    losses = [(step, row["train/loss"]) for step, row in run.rows if "train/loss" in row]
    assert losses[:11] == [(step, 10.0 / step) for step in range(1, 12)]
    assert losses[-1] == (15, 10.0 / 15)
    assert (15, {"val/loss": 3.0}) in run.rows
    open_log(tmp_path, wandb="gpt2").close()
    assert len(wandb.runs) == 2  # a fresh start is another run


def test_wandb_that_fails_on_the_way_stops_nothing(tmp_path, wandb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 7)
    log = open_log(tmp_path, wandb="gpt2")
    log.train(train_row(1))
    (run,) = wandb.runs.values()
    run.fails = ConnectionError(f"no route for\n{'s3cret' * 7}")
    write_run(log, 2, 6)
    log.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: W&B failed (ConnectionError: no route for <WANDB_API_KEY>): the run goes on without it; "
        "metrics.jsonl has all rows"
    ]
    assert len(rows_of(tmp_path)) == 7


def test_wandb_that_does_not_start_ends_a_fresh_run_alone(tmp_path, wandb, capsys) -> None:
    def fail(**_):
        raise PermissionError("No API key configured.\nUse `wandb login`")

    wandb.module.init = fail
    with pytest.raises(
        ValueError, match="W&B does not start .*No API key configured. Use `wandb login`"
    ) as caught:
        open_log(tmp_path, wandb="gpt2")
    assert "\n" not in str(caught.value)
    with open_log(tmp_path, first_step=3, wandb="gpt2") as log:
        log.train(train_row(4))
    assert "warning: W&B does not start" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_at_the_start(tmp_path, monkeypatch, name) -> None:
    config = TrainConfig(**{name: True if name == "tensorboard" else "p"})
    folder_of_that_name = ModuleType(name)
    for there in (None, folder_of_that_name):
        monkeypatch.setitem(sys.modules, name, there)
        with pytest.raises(ValueError, match=f"--{name} needs .* pip install {name}$"):
            check_trackers(config)
        with pytest.raises(ValueError, match=f"--{name} needs .* pip install {name}$"):
            RunLog(config, tmp_path, -1, 1, CPU, FLOPS, True)


def test_secrets_are_in_no_file(tmp_path, monkeypatch, wandb, capfd) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "0123456789" + name)
    with open_log(tmp_path, tensorboard=True, wandb="gpt2") as log:
        write_run(log, 1, 5)
        log.flush()
        with Profiler(tmp_path, 1, 2, True, log.say) as profiler:
            for step in (1, 2):
                with profiler.step(step):
                    torch.ones(8, 8) @ torch.ones(8, 8)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".jsonl", ".gz"}
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert b"0123456789" not in content, path
    assert "0123456789" not in "".join(capfd.readouterr())


# The profiler


@pytest.mark.parametrize(
    ("steps", "left", "name"),
    [(3, 30, "steps-111-113"), (3, 13, "steps-111-113"), (3, 12, "steps-102-104"), (9, 4, "steps-102-104"),
     (1, 1, "steps-101-101")],
)  # fmt: skip
def test_profile_is_a_chrome_trace_of_those_steps(tmp_path, steps, left, name) -> None:
    said: list[str] = []
    weight = torch.ones(16, 16, requires_grad=True)
    with Profiler(tmp_path, steps, left, True, said.append) as profiler:
        for step in range(101, 101 + left):
            with profiler.step(step):
                (weight @ weight).sum().backward()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"{name}.json.gz"
    assert said == [f"profile: {path}, for chrome://tracing and ui.perfetto.dev"]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    first, last = (int(part) for part in name.split("-")[1:])
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in annotations}
    assert set(spans) == {f"step {step}" for step in range(first, last + 1)}
    products = [event["ts"] for event in events if event.get("name") == "aten::mm"]
    for start, end in spans.values():
        assert sum(start <= moment <= end for moment in products) >= 3  # forward, and two of backward


def test_a_run_that_stops_early_has_its_trace(tmp_path) -> None:
    said: list[str] = []

    def run() -> None:
        with Profiler(tmp_path, 5, 100, True, said.append) as profiler:
            for step in range(1, 13):
                with profiler.step(step):
                    if step == 12:
                        raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-11-11.json.gz"]


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path) -> None:
    (tmp_path / "profile").write_text("a file")
    said: list[str] = []
    with Profiler(tmp_path, 1, 1, True, said.append) as profiler, profiler.step(1):
        pass
    assert said
    assert said[0].startswith("warning: no profile: ")


@pytest.mark.parametrize(("steps", "left", "enabled"), [(0, 10, True), (3, 0, True), (3, 10, False)])
def test_no_profile_where_none_is_asked_for(tmp_path, steps, left, enabled) -> None:
    with Profiler(tmp_path, steps, left, enabled, pytest.fail) as profiler:
        for step in range(1, left + 1):
            with profiler.step(step):
                pass
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_peaks_is_read_from_the_narrow_to_the_wide() -> None:
    names = list(metrics.PEAK_TFLOPS)
    for number, name in enumerate(names):
        assert not [wide for wide in names[:number] if name.startswith(f"{wide} ")], name
