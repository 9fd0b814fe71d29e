"""All four commands act alike on odd machines: paths, terminals, clusters, homes, locks, signals, Windows."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from gpt2_data import convert
from gpt2_model import command

MODULES = ("gpt2_data", "gpt2_model", "gpt2_eval", "gpt2_train")
TINY = (
    "--model n_layer=1 --model n_embd=16 --model n_head=2 --seq-len 16 --batch-tokens 32 --steps 1 --eval-every 0"
)


def invoke(name, *arguments, **options):
    """Run a command in this process."""
    return CliRunner().invoke(import_module(f"{name}.cli").main, [str(word) for word in arguments], **options)


def run(code, *arguments, **environment):
    """Run Python code, then a command: the first argument is its module."""
    code += "\nimport sys, importlib\nname = sys.argv.pop(1)\nimportlib.import_module(name + '.cli').main()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, env={k: v for k, v in variables.items() if v is not None})


def one_line(done, code, text):
    """Assert that a command ended with one line of error."""
    error = done.stderr if isinstance(done.stderr, str) else done.stderr.decode()
    exit_code = done.exit_code if hasattr(done, "exit_code") else done.returncode
    assert (exit_code, error.count("\n")) == (code, 1), error
    assert text in error


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a dataset of two splits, and a text file."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    for name in "train.bin", "val.bin":
        np.arange(100, dtype=np.uint16).tofile(tmp_path / "data" / name)
    (tmp_path / "text.txt").write_text("Grüße 🎉 豆腐\n", encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_home_in_every_path(home, tiny_hf_folder, monkeypatch) -> None:
    """transformers #33425: --out=~/d3 made a folder called ~."""
    (home / "model").symlink_to(tiny_hf_folder)
    (home / "run.toml").write_text('data = "~/data"\nout = "~/run"\ninit = "~/model"\nhellaswag = "~/none"\n')
    assert invoke("gpt2_data", "build", "~/te*.txt", env={"GPT2_DATA_BUILD_OUT": "~/built"}).exit_code == 0
    assert invoke("gpt2_data", "convert", "~/data", "~/npy", "--to", "npy").exit_code == 0
    assert invoke("gpt2_data", "info", "~/built").exit_code == 0
    assert invoke("gpt2_model", "convert", "~/model", "~/copy").exit_code == 0
    assert invoke("gpt2_model", "info", "~/copy").exit_code == 0
    said = invoke("gpt2_model", "generate", "-m", "~/model", "--file=~/text.txt", "--max-new-tokens", 1)
    assert said.stdout.startswith("Grüße")
    options = ("--data=~/data", "--out=~/items", "--json")
    assert invoke("gpt2_eval", "loss", *options, env={"GPT2_EVAL_LOSS_MODEL": "~/model"}).exit_code == 0
    for flags in ["--config=~/run.toml"], ["--data=~/data", "--out=~/run", "--init=~/model", "--hellaswag=~/none"]:
        plan = invoke("gpt2_train", *flags, "--dry-run", "--json", "--seq-len", 16)
        assert str(home / "none") in plan.stderr
        assert str(home / "model") not in plan.stderr
    names = {"built", "copy", "data", "here", "items", "model", "npy", "run.toml", "text.txt"}
    assert {path.name for path in home.iterdir()} == names
    assert list((home / "here").iterdir()) == []
    assert "path is empty" in invoke("gpt2_data", "build", "~/text.txt", "--out", "").stderr


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_terminal_that_cannot_show_a_character(home, tiny_hf_folder, monkeypatch, encoding) -> None:
    """openai/gpt-2 #52: text broke off at the first character that the terminal's encoding lacks."""
    invoke("gpt2_data", "build", "~/text.txt", "--out", "~/built", "--val-tokens", 0)
    shown = run("", "gpt2_data", "show", "~/built", PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"Gr" in shown.stdout
    assert shown.stdout.endswith(b"\n")
    as_json = run("", "gpt2_data", "show", "~/built", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(as_json.stdout)["text"] == "Grüße 🎉 豆腐\n"
    for flags in [], ["--json"]:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        words = ["generate", "-m", str(tiny_hf_folder), "--max-new-tokens", "40", "Grüße 🎉", *flags]
        with pytest.raises(SystemExit) as end:
            import_module("gpt2_model.cli").main(words)
        stdout.flush()
        assert end.value.code == 0
        text = stdout.buffer.getvalue()
        assert text.startswith(b"Gr") if not flags else json.loads(text)[0]["prompt"] == "Grüße 🎉"


def services(name):
    """The variables that Kubernetes makes for a Service with an unnamed port and one called http."""
    address = {"": "tcp://10.0.0.1:80", "_PROTO": "tcp", "_PORT": "80", "_ADDR": "10.0.0.1"}
    values = {f"PORT_80_TCP{end}": value for end, value in address.items()}
    values |= {"PORT": address[""], "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80"}
    return {f"{name}_{end}": value for end, value in values.items()}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("middle", ["", "_DATA", "_LOSS", "_INFO", "_2"])
def test_services_of_kubernetes_are_no_options(home, name, middle) -> None:
    """kubernetes #35189: a Service called gpt2-train puts GPT2_TRAIN_PORT=tcp://... into each container."""
    variables = services(name.upper() + middle)
    words = {
        "gpt2_data": ["show", "~/data"],
        "gpt2_model": ["info", "124M"],
        "gpt2_eval": ["compare", "a", "b"],
        "gpt2_train": ["--data=~/data", "--out=run", "--dry-run", *TINY.split()],
    }[name]
    with_them, without = invoke(name, *words, env=variables), invoke(name, *words)
    assert with_them.exit_code == without.exit_code != 2
    if name == "gpt2_train":
        assert "GPT2_TRAIN_PROT" in invoke(name, *words, env={"GPT2_TRAIN_PROT": "1"}).stderr
        shape = ["--seq-len", "16", "--data=~/data", "--out=run", "--dry-run", "--json"]
        plan = invoke(name, *shape, env=variables | {"GPT2_TRAIN_STEPS": "7"})
        assert json.loads(plan.stdout)["steps"] == 7


NO_HOME = "import pwd\ndef unknown(*_): raise KeyError('uid not found')\npwd.getpwuid = unknown"


NOBODY = {"HOME": None, "XDG_CACHE_HOME": None, "USER": None, "LOGNAME": None}


def test_a_user_without_a_name_or_a_home(home) -> None:
    """pytorch #140765: a container's unknown user id, no HOME: a traceback from Path.home."""
    built = run(NO_HOME, "gpt2_data", "build", "../text.txt", "--out", "built", "--val-tokens", 0, **NOBODY)
    assert (built.returncode, built.stderr) == (0, b"")
    words = "no home folder"
    one_line(run(NO_HOME, "gpt2_data", "build", "tinyshakespeare", "--out", "x", **NOBODY), 1, words)
    one_line(run(NO_HOME, "gpt2_eval", "task", "lambada", "-m", "x", **NOBODY), 1, words)


@pytest.mark.slow
def test_the_engine_in_c_without_a_cache(home, tiny_hf_folder) -> None:
    """pytorch #140765, too: compiled for this process alone, which takes seconds."""
    said = run(NO_HOME, "gpt2_model", "generate", "-m", tiny_hf_folder, "--max-new-tokens", 2, "Hi", **NOBODY)
    assert said.returncode == 0
    assert b"Generation is slow" not in said.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_locks_or_fsync(home, monkeypatch, capsys, number) -> None:
    """huggingface_hub #2399: `No locks available`. libgit2 #5356: fsync of a folder is EINVAL."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    def no_sync(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", no_sync)
    built = invoke("gpt2_data", "build", "~/text.txt", "--out", "~/built", "--val-tokens", 0)
    assert built.exit_code == 0
    where = home / "built" / ".build"
    reason = f"{where} cannot be locked ({os.strerror(number)})"
    assert built.stderr == f"warning: {reason}: see to it that no other process writes there\n"
    convert("~/built", "~/npy", "npy")
    assert f"warning: {home / 'npy'}.converting cannot be locked" in capsys.readouterr().err
    for _ in range(2):  # said once
        with command.locked(home / "run"):
            pass
    assert capsys.readouterr().err.count(f"warning: {home / 'run'} cannot be locked") == 1
    trained = invoke("gpt2_train", "--data=~/data", "--out=~/run2", *TINY.split(), "--device", "cpu")
    assert trained.exit_code == 0
    assert f"warning: {home / 'run2'} cannot be locked" in trained.stderr
    assert sorted(path.name for path in (home / "run2" / "checkpoints").iterdir()) == ["step-00000001"]


@pytest.mark.parametrize("module", ["gpt2_data.disk", "gpt2_model.command"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_passed_over(tmp_path, monkeypatch, module, number) -> None:
    """libgit2 #5356: of some network disks. An error of the disk itself is still one."""
    file, real = tmp_path / "a", os.open

    def no_folder(path, *rest, **options):
        if number == errno.EACCES and Path(path) == tmp_path:
            raise PermissionError(number, "Permission denied", str(path))
        return real(path, *rest, **options)

    def no_sync(descriptor):
        if number != errno.EACCES and os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", no_folder)
    monkeypatch.setattr(os, "fsync", no_sync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"), import_module(module).write_whole(file):
            pass
        return
    with import_module(module).write_whole(file) as out:
        out.write(b"whole")
    assert file.read_bytes() == b"whole"


COMMANDS = {
    "gpt2_data": ["build", "pydocs", "--out", "x"],
    "gpt2_model": ["generate", "-m", "x", "Hi"],
    "gpt2_eval": ["loss", "-m", "x", "--data", "../data"],
    "gpt2_train": ["--data=../data", "--out=run", "--seq-len", "16"],
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_modules_load(home, name, number) -> None:
    """Ctrl-C ends with 130, SIGTERM with 143 (or by it), with a line at most: also while torch is imported."""
    slow = home / "here" / ("numpy" if name == "gpt2_data" else "torch")
    slow.mkdir()
    (slow / "__init__.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    words = [sys.executable, "-m", name, *COMMANDS[name]]
    variables = {**os.environ, "PYTHONPATH": str(slow.parent)}
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=variables) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    assert process.returncode in (128 + number, -signal.SIGTERM), error
    assert (out, "Aborted" in error, "Traceback" in error) == ("", False, False)
    assert len(error.strip().splitlines()) <= 1


WINDOWS = "import sys, os\nsys.modules['fcntl'] = sys.modules['resource'] = None\ndel os.getuid, os.getgid"


@pytest.mark.parametrize("name", ["gpt2_data", "gpt2_eval", "gpt2_train"])
def test_windows_is_told_of_wsl(home, name) -> None:
    """ModuleNotFoundError: No module named 'fcntl'."""
    one_line(run(WINDOWS, name, *COMMANDS[name]), 1, "runs on Linux and macOS; on Windows use WSL")


def test_gpt2_model_runs_on_windows(home, tiny_hf_folder) -> None:
    """It has no locks, and asks for a user's id only where there is one."""
    said = run(WINDOWS, "gpt2_model", "generate", "-m", tiny_hf_folder, "--max-new-tokens", 2, "Hi")
    assert (said.returncode, said.stdout[:2]) == (0, b"Hi"), said.stderr


BAD = {
    "": "",
    "device": "/dev/null",
    "file": "~/text.txt",
    "folder": "~/here",
    "not UTF-8": os.fsdecode(b"caf\xe9"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_paths_are_one_line(home, kind) -> None:
    """llama_index #10369: "surrogates not allowed"; a folder where a file is wanted, and the other way round."""
    path = BAD[kind]
    Path(BAD["not UTF-8"]).mkdir()
    for words in (
        ["gpt2_model", "info", path], ["gpt2_model", "generate", "-m", path, "Hi"], ["gpt2_data", "info", path],
        ["gpt2_model", "generate", "-m", "x/y/z", "-f", path], ["gpt2_data", "verify", path],
        ["gpt2_data", "show", path], ["gpt2_data", "convert", path, "out", "--to", "npy"],
        ["gpt2_eval", "loss", "-m", path, "--data", "~/data"], ["gpt2_eval", "loss", "-m", "x", "--data", path],
        ["gpt2_eval", "compare", path, path], ["gpt2_eval", "task", "lambada", "-m", "x", "--data", path],
        ["gpt2_train", "--data", path, "--out", "run"],
        ["gpt2_train", "--data=~/data", "--out=r", "--config", path],
    ):  # fmt: skip
        result = invoke(*words)
        assert isinstance(result.exception, SystemExit), (words, result.exception)
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("Error: "), words
        assert (result.exit_code, len(lines)) == (1, 1) or result.exit_code == 2, words


def test_every_path_option_expands_the_home() -> None:
    """So that an option which is added is not forgotten."""

    def parameters(group):
        yield from group.params
        for one in getattr(group, "commands", {}).values():
            yield from parameters(one)

    for name in MODULES:
        for parameter in parameters(import_module(f"{name}.cli").main):
            if isinstance(parameter.type, click.Path | click.File):
                assert type(parameter.type).__name__.startswith("User"), (name, parameter.name)
