"""The commands as a person types them."""

import json

import click
import pytest
from click.testing import CliRunner

from gpt2_data.cli import main, size


@pytest.fixture
def run():
    def run(*arguments, **environment):
        return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)

    return run


@pytest.fixture
def source(write_jsonl, texts):
    return write_jsonl(texts) / "000.jsonl"


def test_build_verify_info_show(run, source, texts, tmp_path):
    out = tmp_path / "out"
    arguments = ["build", source, "--out", out, "--val-tokens", "1k", "--shard-size", "5k", "--order", "source"]
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) >= {"tokens", "documents", "shards", "seconds", "text_mb_per_second", "out"}
    assert result["documents"] == 120
    assert result["out"] == str(out)
    assert result["text_mb_per_second"] > 0
    again = run(*arguments)
    assert again.exit_code == 0
    assert "already built" in again.stdout
    assert "nothing wrong (full)" in run("verify", out, "--level", "full").stdout
    assert json.loads(run("verify", out, "--level", "fast", "--json").stdout)["ok"] is True
    info = run("info", out)
    assert f"{result['documents']:,} documents" in info.stdout
    assert (
        json.loads(run("info", out, "--json").stdout)["totals"]["train"]["tokens"]
        == result["tokens"] - result["val_tokens"]
    )
    shown = run("show", out, "--split", "val")
    assert shown.exit_code == 0
    assert "document 0 of" in shown.stdout
    shown = json.loads(run("show", out, 2, "--split", "val", "--json").stdout)
    assert shown["text"] == texts[2]
    assert shown["tokens"][0] == 50256


def test_a_damaged_dataset_ends_verify_with_1(run, make, texts):
    folder = make(texts)
    (folder / "train_000000.bin").unlink()
    done = run("verify", folder)
    assert done.exit_code == 1
    assert done.stdout == "train_000000.bin: missing\n"
    assert done.stderr.count("\n") == 1
    done = run("verify", folder, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"] == ["train_000000.bin: missing"]


def test_dry_run_builds_nothing(run, source, tmp_path):
    out = tmp_path / "out"
    done = run("build", source, "--out", out, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "estimate" in done.stdout
    facts = json.loads(run("build", source, "--out", out, "--dry-run", "--json").stdout)
    assert facts["documents"] == 120
    assert facts["bytes_free"] > facts["bytes_while_building"] > facts["bytes"] > 0
    assert not out.exists()


def test_what_a_user_can_mend_is_one_line(run, source, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{]\n")
    (tmp_path / "file").touch()
    for arguments, message in [
        (
            ["build", source, "--out", tmp_path / "out", "--workers", 1, "--val-tokens", "1M"],
            "nothing is left for training",
        ),
        (["build", tmp_path / "bad.jsonl", "--out", tmp_path / "out2"], "bad.jsonl:1: not JSON"),
        (["build", tmp_path / "no.txt", "--out", tmp_path / "out2"], "no file matches"),
        (["build", "wikipedia", "--out", tmp_path / "out2"], "unknown source 'wikipedia': known are fineweb-edu"),
        (["build", source, "--out", tmp_path / "file"], "is a file: choose another --out"),
        (["build", source, "--out", tmp_path / "file" / "x", "--val-tokens", 0], "Not a directory"),
        (["build", source, "--out", tmp_path / "out2", "--shard-size", 0], "shard_size is 0"),
        (["verify", tmp_path / "none"], "is not a dataset"),
        (["info", tmp_path], "is not a dataset"),
        (["show", tmp_path], "is not a dataset"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 1, (arguments, done.output)
        assert done.stderr.startswith("Error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_wrong_usage_is_2(run, tmp_path):
    (tmp_path / "a.txt").touch()
    for arguments, message in [
        (["build", tmp_path / "a.txt"], "Missing option '--out'"),
        (["build", "pydocs", "--shard-size", "many"], "'many' is no count: write 100M, 1.5B, 64k"),
        (["build", "pydocs", "--order", "random"], "--order"),
        (["build", "pydocs", "--engine", "dask"], "--engine"),
        (["build", "pydocs", "--part", "5/4"], "'5/4' is no part: write 1/4 to 4/4"),
        (["build", "pydocs", "--compat", "llm.c"], "--compat"),
        (["build", "pydocs", "--workers", "0"], "--workers"),
        (["verify", tmp_path, "--level", "some"], "--level"),
        (["frobnicate"], "No such command"),
        ([], "Usage"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in done.stderr


def test_debug_shows_where(run, tmp_path):
    done = run("--debug", "info", tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)


def test_options_come_from_the_environment(run, source, tmp_path):
    environment = {"GPT2_DATA_BUILD_OUT": str(tmp_path / "env"), "GPT2_DATA_BUILD_VAL_TOKENS": "2k"}
    done = run("build", source, "--workers", 1, "--json", "--val-tokens", "1k", **environment)
    assert json.loads(done.stdout)["out"] == str(tmp_path / "env")
    assert 1000 <= json.loads(done.stdout)["val_tokens"] < 2000  # a flag goes before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100M", 100_000_000),
        ("1.5B", 1_500_000_000),
        ("64k", 64_000),
        ("64K", 64_000),
        ("0", 0),
        ("1_000", 1000),
        ("1e6", 10**6),
    ],
)
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "-1", "1T", "nan", "inf", "1kk", "0x10"])
def test_sizes_that_are_none(text):
    with pytest.raises(click.BadParameter, match="is no count"):
        size(text)


def test_help_and_version(run):
    assert run("-h").exit_code == run("build", "--help").exit_code == 0
    assert run("--version").stdout.split()[-1].count(".") == 2
