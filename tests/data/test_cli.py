"""The commands as a person types them."""

import json
import re
import time

import click
import pytest
from click.testing import CliRunner

from gpt2_data import console
from gpt2_data.building import estimate
from gpt2_data.cli import main, size


@pytest.fixture
def run():
    return lambda *arguments, **environment: CliRunner().invoke(main, list(map(str, arguments)), env=environment)


@pytest.fixture
def source(write_jsonl, texts):
    return write_jsonl(texts) / "000.jsonl"


def test_build_verify_info_show(run, source, texts, tmp_path):
    out = tmp_path / "out"
    options = ["--val-tokens", "1k", "--shard-size", "5k", "--order", "source", "--workers", 1]
    arguments = ["build", source, "--out", out, *options]
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) >= {"tokens", "documents", "shards", "seconds", "text_mb_per_second", "out"}
    assert result["documents"] == 120
    assert result["out"] == str(out)
    assert result["text_mb_per_second"] > 0
    assert "already built" in run(*arguments).stdout
    assert "nothing wrong (full)" in run("verify", out, "--level", "full").stdout
    assert json.loads(run("verify", out, "--level", "fast", "--json").stdout)["ok"] is True
    assert "120 documents" in run("info", out).stdout
    totals = json.loads(run("info", out, "--json").stdout)["totals"]
    assert totals["train"]["tokens"] == result["tokens"] - result["val_tokens"]
    assert "document 0 of" in run("show", out, "--split", "val").stdout
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
    facts = json.loads(run("build", "pydocs", "--out", out, "--dry-run", "--json").stdout)
    assert facts["units"] > 2
    assert 3_000_000 < facts["tokens"] < 12_000_000
    assert not out.exists()


def test_what_a_user_can_mend_is_one_line(run, source, make, texts, tmp_path):
    (tmp_path / "datasets").mkdir()
    out = make(texts).rename(tmp_path / "datasets" / "one")
    (tmp_path / "bad.jsonl").write_text("{]\n")
    (tmp_path / "file").touch()
    for arguments, message in [
        (["build", source, "--out", tmp_path / "out", "--val-tokens", "1M"], "nothing is left for training"),
        (["build", tmp_path / "bad.jsonl", "--out", tmp_path / "out2"], "bad.jsonl:1: not JSON"),
        (["build", tmp_path / "no.txt", "--out", tmp_path / "out2"], "no file matches"),
        (["build", "wikipedia", "--out", tmp_path / "out2"], "unknown source 'wikipedia': choose from fineweb-"),
        (["build", source, "--out", tmp_path / "file"], "is a file: choose another --out"),
        (["build", source, "--out", tmp_path / "file" / "x", "--val-tokens", 0], "Not a directory"),
        (["build", source, "--out", tmp_path / "out2", "--shard-size", 0], "shard_size is 0"),
        (["verify", tmp_path / "none"], "is not a dataset"),
        (["info", tmp_path], "is not a dataset"),
        (["info", source], f"000.jsonl is a file: name its folder, {source.parent}"),
        (["show", tmp_path], "is not a dataset"),
        (["verify", out.parent], f"{out.parent} is not a dataset but holds one: use {out}"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 1, (arguments, done.output)
        assert done.stderr.startswith("Error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_shard_size_without_its_m_is_refused(run, source, tmp_path, monkeypatch, dry):
    monkeypatch.setattr(estimate, "MAX_SHARDS", 1000)
    arguments = ["build", source, "--out", tmp_path / "out", "--workers", 1, *dry]
    done = run(*arguments, "--shard-size", 10)
    assert done.exit_code == 1
    assert "shard_size 10 would make about " in done.stderr
    assert "shards: use a larger one, such as 100M" in done.stderr
    assert run(*arguments, "--shard-size", 100).exit_code == 0


def test_one_document_is_singular_and_sources_are_not_listed_without_end(run, tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02d}.txt").write_text("some text")
    done = run("build", tmp_path / "00.txt", "--out", tmp_path / "one")
    assert "tokens of 1 document in 1 shard (" in done.stdout
    done = run("build", tmp_path / "00.txt", "--out", tmp_path / "x", "--dry-run")
    assert "shards     about 1 of" in done.stdout
    run("build", tmp_path / "*.txt", "--out", tmp_path / "many")
    info = run("info", tmp_path / "many").stdout
    assert (info.count("\nsource"), "and 5 more" in info) == (20, True)


def test_numbers_are_for_reading():
    counts = {0: "0", 9_999: "9,999", 12_345: "12.3k", 999_800: "1M", 38_700_000: "38.7M", 9_950_000_000: "9.95B"}
    assert list(map(console.format_count, counts)) == list(counts.values())
    times = {0.01: "a second", 40: "40 seconds", 3000: "50 minutes", 12_600: "3.5 hours", 37_528_200: "434 days"}
    assert list(map(console.format_seconds, times)) == list(times.values())


def test_a_bar_fits_into_80_columns_and_a_log_says_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    for terminal in False, True:
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", "80")
        with console.bar() as show:
            for done in 0, 38_700_000, 39_700_000:
                show("tokenizing", done, 266_000_000, 9_200_000)
                time.sleep(0.11)  # tqdm draws ten times a second
        shown = capsys.readouterr().err
        lines = shown.split("\r") if terminal else shown.splitlines()
        assert any(re.search(r"tokenizing:? +15%.*left, 9.2M tokens", line) for line in lines), lines
        assert max(map(len, lines)) <= 80


def test_wrong_usage_is_2(run, tmp_path):
    (tmp_path / "a.txt").touch()
    for arguments, message in [
        (["build", tmp_path / "a.txt"], "Missing option '--out'"),
        (["build", "pydocs", "--shard-size", "many"], "'many' is not a count: write 100M, 1.5B, 64k"),
        (["build", "pydocs", "--order", "random"], "--order"),
        (["build", "pydocs", "--engine", "dask"], "--engine"),
        (["build", "pydocs", "--part", "5/4"], "'5/4' is not a part: write 1/4 to 4/4"),
        (["build", "pydocs", "--compat", "llm.c"], "--compat"),
        (["build", "pydocs", "--workers", "0"], "--workers"),
        (["verify", tmp_path, "--level", "some"], "--level"),
        (["frobnicate"], "No such command"),
        ([], "Usage"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in done.stderr


def test_options_come_from_the_environment(run, source, tmp_path):
    environment = {"GPT2_DATA_BUILD_OUT": str(tmp_path / "env"), "GPT2_DATA_BUILD_VAL_TOKENS": "2k"}
    done = run("build", source, "--workers", 1, "--json", "--val-tokens", "1k", **environment)
    assert json.loads(done.stdout)["out"] == str(tmp_path / "env")
    assert 1000 <= json.loads(done.stdout)["val_tokens"] < 2000  # a flag goes before


def test_sizes():
    values = {"100M": 10**8, "1.5B": 15 * 10**8, "64k": 64_000, "64K": 64_000, "0": 0, "1_000": 1000}
    assert list(map(size, values)) == list(values.values())
    for text in "", "k", "1.5", "-1", "1T", "nan", "inf", "1kk", "0x10":
        with pytest.raises(click.BadParameter, match="is not a count"):
            size(text)


def test_help_version_and_debug(run, tmp_path):
    assert run("-h").exit_code == run("build", "--help").exit_code == 0
    assert run("--version").stdout.split()[-1].count(".") == 2
    done = run("--debug", "info", tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)
