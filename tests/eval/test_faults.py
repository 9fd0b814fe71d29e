"""Faults around an evaluation: another one beside it, no compiler, odd names, silence."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpt2_eval import progress
from gpt2_eval.cli import main
from gpt2_eval.resume import sole_writer


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def hellaswag(model_folder, items_file):
    return ("hellaswag", "-m", model_folder, "--data", items_file, "-d", "cpu")


def test_a_second_evaluation_with_the_same_out_is_refused_by_name(hellaswag, tmp_path):
    """Found by trying: two evaluations with one --out went on side by side."""
    out = tmp_path / "items.jsonl"
    with sole_writer(out):
        second = run(*hellaswag, "--out", out)
        assert second.exit_code == 1
        assert second.stderr.startswith(f"Error: {out} is in use by process {os.getpid()} on ")
        assert run(*hellaswag, "--out", tmp_path / "other.jsonl").exit_code == 0
    assert run(*hellaswag, "--out", out).exit_code == 0
    with pytest.raises(KeyError), sole_writer(out):
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "other.jsonl"]


def test_a_killed_evaluation_does_not_hold_its_out(hellaswag, tmp_path, environment):
    """Found by trying: two evaluations with one --out; one that was killed is none."""
    out = tmp_path / "items.jsonl"
    code = "import os, pathlib\nfrom gpt2_eval.resume import sole_writer\n"
    code += f"with sole_writer(pathlib.Path({str(out)!r})): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert (tmp_path / ".items.jsonl.lock").exists()
    assert run(*hellaswag, "--out", out).exit_code == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow  # a process of its own, since torch remembers what it knows of the compiler
def test_compiling_without_a_compiler_is_one_line(hellaswag, environment, tmp_path):
    """pytorch #92745: no C++ compiler, and 60 lines of traceback."""
    without = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, "-m", "gpt2_eval", *map(str, hellaswag), "--compile"]
    done = subprocess.run(words, env=environment | without, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    error = r"Error: torch\.compile does not work here \(.*\): install a C\+\+ compiler.*\n"
    assert re.fullmatch(rf"(loading .*: \d+ s\n)*{error}", done.stderr), (
        done.stderr
    )  # a slow machine is not silent


def test_names_that_are_not_utf_8(model_folder, items_file, tmp_path):
    """llama_index #10369: "surrogates not allowed"."""
    data, out = (tmp_path / os.fsdecode(b"caf\xe9" + ending) for ending in (b".jsonl", b"-out.jsonl"))
    data.write_bytes(Path(items_file).read_bytes())
    words = ("hellaswag", "-m", model_folder, "-d", "cpu", "--data", data, "--out", out)
    for extra in ((), ("--json",)):
        done = run(*words, *extra)
        assert (done.exit_code, out.exists()) == (0, True), done.output
        assert "caf\ufffd.jsonl" in done.stdout
    for record in ("{", "{}"):
        data.write_text(record)
        done = run(*words)
        assert (done.exit_code, done.stdout) == (1, "")
        assert re.match(r"Error: \S*caf\\udce9\.jsonl:1: not", done.stderr), done.stderr  # as Python's stderr does


@pytest.mark.parametrize("slow", ["gpt2_eval.hellaswag.load_hellaswag", "gpt2_eval.models.load_model"])
def test_nothing_is_silent_for_long(hellaswag, monkeypatch, slow):
    """walk.md 15: for 90 seconds nothing was said."""
    module, name = slow.rsplit(".", 1)
    whole = getattr(sys.modules[module], name)
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.setattr(slow, lambda *words, **options: time.sleep(0.2) or whole(*words, **options))
    done = run(*hellaswag, "--json")
    what = "reading and tokenizing HellaSwag" if name == "load_hellaswag" else "loading .*"
    assert re.search(rf"^{what}: \d+ s$", done.stderr, re.MULTILINE), done.stderr
    assert json.loads(done.stdout)["items"] == 17


def test_a_batch_that_takes_long_is_not_silent(hellaswag, monkeypatch, model):
    """walk.md 15: for 80 seconds nothing was said, in the first batch."""
    hidden = type(model).hidden
    monkeypatch.setattr("gpt2_eval.progress.SECONDS", 0.05)
    monkeypatch.setattr(type(model), "hidden", lambda *args: time.sleep(0.15) or hidden(*args))
    assert re.search(r"^scoring rows: 0 of \d+ batches$", run(*hellaswag).stderr, re.MULTILINE)
