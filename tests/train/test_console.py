"""What a run says: on a terminal that may fail, in a pipe, and how long it will take."""

import io
import os
import pty
import subprocess
import sys
import termios
import time
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from run_rows import open_log, rows_of, train_row, write_run

from gpt2_train import console


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
        pieces = []
        with suppress(BlockingIOError):
            while piece := os.read(self.master, 65536):
                pieces.append(piece)
        return b"".join(pieces).decode()

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
    assert "update skipped: loss spike" in said
    bars = [part for part in said.replace("\r", "\n").split("\n") if "%|" in part]
    # The clock of the day goes back, and the bar moves on: each step is 0.25 s after the one before.
    assert [int(bar.split("| ")[1].split("/")[0]) for bar in bars if " left" in bar][-1] == 100
    assert " 50%|" in said
    assert "50/100, 00:12 left" in said
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
    lines = said.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 3, *range(13, 100, 10), 100]
    assert lines[3] == ("step  13/100  loss 0.7692  norm 1.000  lr 1.00e-03  1.00k tok/s  01:27 left")


def test_a_line_of_a_long_run_fits_80_columns(tmp_path, capsys) -> None:
    log = open_log(tmp_path, steps=19073, batch_tokens=524288, peak_tflops=2000.0)
    log.train(train_row(12345, loss=10.1234, seconds=0.3))
    (line,) = capsys.readouterr().err.splitlines()
    assert "MFU" in line
    assert len(line) < 80, line


@pytest.mark.parametrize("on_terminal", [False, True])
def test_long_work_is_shown_while_it_lasts(monkeypatch, capsys, on_terminal) -> None:
    """Nothing was said in a step of 128 micro-batches, nor in a validation, for over a minute."""
    monkeypatch.setattr(console, "QUIET_SECONDS", 1.0)
    terminal = Terminal(monkeypatch) if on_terminal else None
    with closing(console.Console(100)) as shown:
        shown.doing("step 1: micro-batch", 3, 128)
        time.sleep(1.8)
    said = terminal.read() if terminal else capsys.readouterr().err
    assert "step 1: micro-batch 3 of 128, 1 s" in said
    assert ("%|" in said) == on_terminal
    if terminal:
        terminal.close()


def test_short_steps_are_no_long_work(monkeypatch, capsys) -> None:
    """A user's log: between lines of steps of 1.5 s stood "step 10: micro-batch 1 of 1, 1 s"."""
    clock, shown = Clock(monkeypatch), console.Console(100)

    def tick(_seconds: float) -> bool:
        clock.now += 0.5
        if clock.now <= 1030:
            shown.doing(f"step {clock.now // 1.5:.0f}: micro-batch", 1, 1)
        return clock.now > 1042

    monkeypatch.setattr(shown, "_thread", SimpleNamespace(ident=1))
    monkeypatch.setattr(shown, "_closed", SimpleNamespace(wait=tick))
    shown._watch()
    assert capsys.readouterr().err == "step 686: micro-batch 1 of 1, 9 s\n"


def test_hours_are_said_in_their_unit() -> None:
    assert [console.duration(hours) for hours in (0.01, 0.5, 1, 72)] == [
        "1 minute", "30 minutes", "1.0 hours", "3.0 days",
    ]  # fmt: skip


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
    with closing(open_log(tmp_path, first_step=-1)) as log:
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
        "from gpt2_train.console import Console\nc = Console(100)\nfor _ in range(3): c.say('hello')\nc.close()"
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


def test_time_left_is_of_the_mean_pace_with_evaluations_in_it(tmp_path, monkeypatch, capsys) -> None:
    clock, log = Clock(monkeypatch), open_log(tmp_path, steps=200, eval_every=0, checkpoint_every=0)
    for step in range(51, 148):  # resumed at 50; 51 compiles
        clock.now += 60.0 if step == 51 else 2.0
        log.train(train_row(step, seconds=2.0))
        clock.now += 30.0 if step % 10 == 1 else 0.0
    first, *_, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("step "))
    assert "left" not in first
    # 96 steps of 2 s and 10 evaluations of 30 s since step 51: 492 s, and 53 of 96 steps are to come.
    assert last.startswith("step 147/200")
    assert last.endswith("  04:31 left")
