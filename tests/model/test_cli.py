import codecs
import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from gpt2_model import cli
from gpt2_model.cli import main
from gpt2_model.cpu.engine import library

COMMAND = [sys.executable, "-c", "from gpt2_model.cli import main; main()"]


def run(*arguments, code=0, **options):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_generate_as_text_and_json(tiny_hf_folder) -> None:
    (nothing,) = json.loads(run("generate", "-m", tiny_hf_folder, "--max-new-tokens", 3, "--json").stdout)
    assert nothing["prompt"] == "<|endoftext|>"
    options = ("generate", "-m", tiny_hf_folder, "-n", 2, "--max-new-tokens", 5, "--seed", 3)
    rows = json.loads(run(*options, "--json", "Hello", "World").stdout)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == ["Hello", "Hello", "World", "World"]
    fields = {"row", "prompt", "text", "tokens", "finish_reason", "tokens_per_second", "seconds_to_first_token"}
    assert fields <= rows[0].keys()
    text = run(*options, "Hello", "World").stdout
    assert all(row["prompt"] + row["text"] in text for row in rows)


def test_every_option_reaches_the_model(tiny_hf_folder) -> None:
    """Against the Python function with the same options."""
    from gpt2_model import EOT, GPT, generate

    options = {"num_samples": 2, "max_new_tokens": 9, "temperature": 0.7, "top_k": None, "top_p": 0.9}
    options |= {"min_p": 0.01, "repetition_penalty": 1.5, "seed": 5}
    expected = generate(
        GPT.from_pretrained(tiny_hf_folder), ["Hello", "a"], **options, stop=[" the", "x"], stop_ids=(EOT, 13),
        logprobs=True,
    )  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={0 if value is None else value}" for name, value in options.items()]
    flags += ["--stop", " the", "--stop", "x", "--stop-id", "13", "--logprobs", "--json"]
    rows = json.loads(run("generate", "-m", tiny_hf_folder, *flags, "Hello", "a").stdout)
    for row, completion in zip(rows, expected, strict=True):
        assert row["tokens"] == completion.tokens
        assert row["logprobs"] == completion.logprobs
        assert (row["text"], row["finish_reason"]) == (completion.text, completion.finish_reason)
    again = json.loads(run("generate", "-m", tiny_hf_folder, *flags, "--no-compile", "Hello", "a").stdout)
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]
    int8 = json.loads(run("generate", "-m", tiny_hf_folder, *flags, "--dtype", "int8", "Hello", "a").stdout)
    assert len(int8) == 4
    long = run("generate", "-m", tiny_hf_folder, "--slide", "--max-new-tokens", 200, "--json", "Hello")
    assert len(json.loads(long.stdout)[0]["tokens"]) > 128


@pytest.mark.parametrize("content", ["Grüße,\n\nwie\n", ""])
def test_prompts_from_a_file_a_pipe_and_nowhere(tmp_path, monkeypatch, content) -> None:
    (tmp_path / "prompt.txt").write_text(content, encoding="utf-8")
    expected = [content[:-1]] if content else []
    with (tmp_path / "prompt.txt").open("rb") as file:
        assert cli._prompts((), file, False) == expected
    with (tmp_path / "prompt.txt").open() as redirected:
        monkeypatch.setattr("sys.stdin", redirected)
        assert cli._prompts((), None, False) == expected
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert cli._prompts((), None, False) == []


WINDOWS = "\ufeffGrüße,\r\n\r\nwie\r\n"


@pytest.mark.parametrize(
    "data",
    [WINDOWS[1:].encode(), *map(WINDOWS.encode, ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"))],
)
def test_prompts_of_windows_editors(tmp_path, data) -> None:
    """continue #11876: a byte order mark and CR before each line end are the editor's, and change the text."""
    (tmp_path / "prompt.txt").write_bytes(data)
    with (tmp_path / "prompt.txt").open("rb") as file:
        assert cli._prompts((), file, False) == ["Grüße,\n\nwie"]


def test_a_prompt_that_breaks_off_in_utf16(tmp_path) -> None:
    """continue #11876: the message names the encoding that the mark asks for."""
    (tmp_path / "prompt.txt").write_bytes(codecs.BOM_UTF16_LE + b"abc")
    result = run("generate", "-m", "x", "-f", tmp_path / "prompt.txt", code=1)
    assert "is not UTF-16-LE text: byte" in result.stderr.replace("UTF-16 ", "UTF-16-LE ")


@pytest.mark.parametrize(
    ("typed", "text"),
    [(r"\n", "\n"), (r"\n\n", "\n\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\x41\u00e9", "Aé"),
     ("é\n", "é\n"), (r"\q \x4 \u12 \ud83d", r"\q \x4 \u12 \ud83d"), ("\\", "\\"), (r"C:\dir", r"C:\dir")],
)  # fmt: skip
def test_escapes_in_stop(tiny_hf_folder, monkeypatch, typed, text) -> None:
    """llama.cpp #1362: a shell passes a backslash and an n, which no text contains."""
    given: list = []
    monkeypatch.setattr(
        "gpt2_model.generation.generate", lambda *_, **options: given.append(options["stop"]) or []
    )
    run("generate", "-m", tiny_hf_folder, "--json", "--stop", typed, "--stop", ".", "Hi")
    assert given == [[text, "."]]


def test_a_pipe_and_an_output_that_is_not_utf8(tiny_hf_folder) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "generate", "-m", str(tiny_hf_folder), "--max-new-tokens", "2", "--json"]
    stdout = subprocess.run(command, input="é🎉\n".encode(), env=environment, capture_output=True).stdout
    assert json.loads(stdout)[0]["prompt"] == "é🎉"


def test_one_row_is_printed_as_it_comes(tiny_hf_folder) -> None:
    """The first words are there before the last are made: the text goes on long past what a pipe could buffer."""
    options = ["--max-new-tokens", "1000000", "--slide", "--no-compile", "--seed", "1"]
    command = [*COMMAND, "generate", "-m", str(tiny_hf_folder), *options, "Hi"]
    quiet = {"stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **quiet) as process:
        assert process.stdout is not None
        text = b""
        while len(text) < 200:
            text += os.read(process.stdout.fileno(), 100)
        assert text.startswith(b"Hi")
        assert process.poll() is None
        process.kill()


def test_a_reader_that_has_seen_enough(tiny_hf_folder) -> None:
    command = shlex.join([*COMMAND, "generate", "-m", str(tiny_hf_folder), "Hi"])
    done = subprocess.run(f"{command} | head -c 1", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "H"
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr


def test_interactive_keeps_what_was_written(tiny_hf_folder) -> None:
    """What the model saw at each turn is what is on the screen: /again takes a turn back, /reset all of it."""
    options = ("generate", "-m", tiny_hf_folder, "-i", "--max-new-tokens", 3, "--seed", 2)
    result = run(*options, input="One\n two\n/again\n/agian\n\n/reset\nThree\n")
    turns = [turn.strip() for turn in result.stdout.split("\n> ")]
    first, second, again, more, fresh = [turn for turn in turns if turn]
    assert first.startswith("One")
    assert second.startswith(first + " two")
    assert again.startswith(first + " two")
    assert again != second  # another seed
    assert more.startswith(again)
    assert fresh.startswith("Three")
    assert "/agian is not a command: use /again or /reset" in result.stderr


# What the model is asked to continue, instead of what it writes.
TALK = """
import sys, types
piece = types.SimpleNamespace
stream = lambda gpt, texts, **_: iter([piece(text=f"<{texts!r}>")])
sys.modules["gpt2_model.generation"] = types.SimpleNamespace(stream=stream, first_id=None)
from gpt2_model import cli
cli._converse(None, "", {"seed": 0})
"""
TURNS = {  # what is sent to the terminal, each after the prompt: what the model is given
    "pasted": ([b"one\rtwo\r\rthree\r"], "['one\\ntwo\\n\\nthree']"),
    "newlines": ([b"one\n  two\n"], "['one\\n  two']"),
    "typed": ([b"one\\\r", b"two\r"], "['one\\ntwo']"),
    "a_paste_without_its_end": ([b"one\rtw", b"o\r"], "['one\\ntwo']"),
    "commands_in_a_paste": ([b"/reset\rx\\\ry\r"], r"['/reset\nx\\\ny']"),
    "one_line": ([b"one\r"], "['one']"),
}


@pytest.mark.parametrize(("sent", "given"), TURNS.values(), ids=TURNS.keys())
def test_pasted_and_continued_lines_are_one_turn(sent, given) -> None:
    """Pasting three lines was three turns, each answered, without the line ends; none could be typed."""
    terminal, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    command = [sys.executable, "-c", TALK]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment) as process:
        os.close(other)
        screen = ""

        def read_until(end: str) -> str:
            nonlocal screen
            start = len(screen)
            while end not in screen[start:] and select.select([terminal], [], [], 20)[0]:
                screen += os.read(terminal, 10_000).decode()
            return screen[start:]

        read_until("\n> ")
        for keys in sent[:-1]:
            os.write(terminal, keys)
            read_until("> " if keys.endswith(b"\\\r") else "tw")
            time.sleep(0.2)  # a person is slower than a paste
        os.write(terminal, sent[-1])
        assert f"<{given}>" in read_until(">\x1b")
        process.kill()
    os.close(terminal)


def test_info_of_a_preset_and_a_folder(tiny_hf_folder) -> None:
    assert json.loads(run("info", "1558M", "--json").stdout)["parameters"] == 1_557_611_200
    assert json.loads(run("info", tiny_hf_folder, "--json").stdout)["n_embd"] == 64
    assert "124,439,808" in run("info", "124M").stdout == run("info", "117M").stdout  # the paper's name


def test_convert(tiny_hf_folder, tmp_path) -> None:
    run("convert", tiny_hf_folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    run("generate", "-m", tmp_path / "copy", "--max-new-tokens", 2, "Hi")
    before = (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns
    assert "already contains a model" in run("convert", tiny_hf_folder, tmp_path / "copy", code=1).output
    assert (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns == before
    run("convert", tiny_hf_folder, tmp_path / "copy", "--overwrite")
    assert (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns > before
    assert "OUT is empty" in run("convert", tiny_hf_folder, "", code=2).output


@pytest.mark.parametrize("options", [["--stop", ""], ["--stop-id", 99999], ["a word " * 200]])
def test_nothing_is_printed_before_all_is_known_to_be_right(tiny_hf_folder, options) -> None:
    result = run("generate", "-m", tiny_hf_folder, *options, *([] if len(options) == 1 else ["Hello"]), code=1)
    assert result.stdout == ""


@pytest.mark.parametrize("compiler", ["false", "'"])
def test_a_missing_compiler_is_said(tiny_hf_folder, tmp_path, monkeypatch, compiler) -> None:
    library.cache_clear()
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run("generate", "-m", tiny_hf_folder, "--max-new-tokens", 2, "Hi")
    assert result.stderr.startswith("Generation is slow without the engine in C: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "-m", "./nowhere", "Hi"), 1, "./nowhere is neither a model folder"),
        (("info", "7B/of/nothing"), 1, "is neither a model folder"),
        (("generate", "Hi"), 2, "Missing option '-m'"),
        (("generate", "-m", "x", "--temperature", "-1", "Hi"), 2, "temperature must be 0"),
        (("generate", "-m", "x", "--dtype", "int3", "Hi"), 2, "'int3' is not one of"),
        (("generate", "-m", "x", "-d", "tpu", "Hi"), 1, "this machine has no device 'tpu': use cpu"),
        (("generate", "-m", "x", "--file", "nowhere.txt"), 2, "'nowhere.txt': No such file"),
        (("generate", "-m", "x", "--file", sys.executable), 1, "is not UTF-8 text: byte"),
        (("generate", "-m", "x", "--file", "-", "Hi"), 2, "give prompts as arguments or with --file, not both"),
        (("generate", "-m", "x", "-i", "-n", "2"), 2, "--interactive takes at most one prompt, one sample"),
        (("generate", "-m", "x", "--repetition-penalty", "0", "Hi"), 2, "repetition_penalty must be above 0"),
        ((), 2, "Usage"),
        (("generate", "-m", "x", "-d", "meta", "Hi"), 1, "this machine has no device 'meta'"),
        (("generate", "-m", "x", "--max-new-tokens", "0", "Hi"), 2, "0 is not in the range"),
        (("generate", "-m", "x", "--logprobs", "Hi"), 2, "--logprobs needs --json"),
        (("generate", "-m", "345M", "Hi"), 1, "345M is a size, not a model: use OpenAI's gpt2-medium"),
        (("generate", "-m", __file__, "Hi"), 1, "is not a weights file of safetensors, torch.save or llm.c"),
    ],
)
def test_errors_are_one_line(arguments, code, message) -> None:
    result = run(*arguments, code=code)
    assert message in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert result.output.startswith("Error: ")
        assert result.output.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    assert isinstance(run("--debug", "info", "./nowhere", code=1).exception, FileNotFoundError)


def test_ctrl_c_ends_with_130(tiny_hf_folder, monkeypatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2_model.generation.stream", interrupted)
    run("generate", "-m", tiny_hf_folder, "Hello", code=130)


def test_rows_say_which_prompt_and_that_the_context_is_full(tiny_hf_folder) -> None:
    result = run("generate", "-m", tiny_hf_folder, "-n", 2, "--max-new-tokens", 999, "--stop-id", 50256, "A", "B")
    assert "--- row 3, sample 2 of prompt 2" in result.stdout
    assert "(the model's context of 128 tokens is full; add --slide to continue)" in result.stderr


def test_memory_that_is_used_up_is_one_line(tiny_hf_folder, monkeypatch) -> None:
    import torch

    monkeypatch.setattr("gpt2_model.GPT.from_pretrained", lambda *_, **__: torch.empty(2**60))
    result = run("generate", "-m", tiny_hf_folder, "Hello", code=1)
    assert result.output == "Error: out of memory: use fewer samples (-n), --dtype int8 or -d cpu\n"
    result = CliRunner().invoke(main, ["--debug", "generate", "-m", str(tiny_hf_folder), "Hello"])
    assert "can't allocate memory" in str(result.exception)
