import json

import pytest
from click.testing import CliRunner

from gpt2_model.cli import main


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_generate_as_text_and_json(tiny_hf_folder) -> None:
    options = ("generate", "-m", tiny_hf_folder, "-n", 2, "--max-new-tokens", 5, "--seed", 3)
    rows = json.loads(run(*options, "--json", "Hello", "World").stdout)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == ["Hello", "Hello", "World", "World"]
    fields = {"row", "prompt", "text", "tokens", "finish_reason", "tokens_per_second", "seconds_to_first_token"}
    assert fields <= rows[0].keys()
    text = run(*options, "Hello", "World").stdout
    assert all(row["prompt"] + row["text"] in text for row in rows)


def test_generate_from_nothing(tiny_hf_folder) -> None:
    rows = json.loads(run("generate", "-m", tiny_hf_folder, "--max-new-tokens", 3, "--json").stdout)
    assert len(rows) == 1
    assert rows[0]["prompt"] == "<|endoftext|>"


def test_info_of_a_preset_and_a_folder(tiny_hf_folder) -> None:
    assert json.loads(run("info", "1558M", "--json").stdout)["parameters"] == 1_557_611_200
    assert json.loads(run("info", tiny_hf_folder, "--json").stdout)["n_embd"] == 64
    assert "124,439,808" in run("info", "124M").stdout


def test_convert(tiny_hf_folder, tmp_path) -> None:
    run("convert", tiny_hf_folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    run("generate", "-m", tmp_path / "copy", "--max-new-tokens", 2, "Hi")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("generate", "-m", "./nowhere", "Hi"), 1, "./nowhere is neither a model folder"),
        (("info", "7B/of/nothing"), 1, "is neither a model folder"),
        (("generate", "Hi"), 2, "Missing option '-m'"),
        (("generate", "-m", "x", "--temperature", "-1", "Hi"), 1, "temperature must be 0"),
        (("generate", "-m", "x", "--dtype", "int3", "Hi"), 2, "'int3' is not one of"),
        (("generate", "-m", "x", "-d", "tpu", "Hi"), 1, "device 'tpu' is not to be had here"),
        ((), 2, "Usage"),
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
    result = CliRunner().invoke(main, ["--debug", "info", "./nowhere"])
    assert isinstance(result.exception, FileNotFoundError)
