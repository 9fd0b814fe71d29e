"""The commands as a person runs them, on one process and under torchrun."""

import json
import sys
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from lm_eval.tasks import TaskManager

from gpt2_eval.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1, (arguments, result.output)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_hellaswag(model_folder, items_file, tmp_path):
    common = ("hellaswag", "-m", model_folder, "--data", items_file, "-d", "cpu")
    table = run(*common)
    assert table.exit_code == 0, table.output
    lines = table.stdout.splitlines()
    assert [" ".join(line.split()[:2]) for line in lines[1:6]] == [
        "karpathy acc", "karpathy acc_norm", "lm-eval acc", "lm-eval acc_norm", "lm-eval acc_bytes",
    ]  # fmt: skip
    assert "17 items of hellaswag" in table.stdout
    assert "PARTIAL" not in table.stdout
    assert "Not the published file (SHA-256" in table.stdout
    partial = run(*common, "--limit", 5, "--protocol", "karpathy").stdout
    assert "PARTIAL: the first 5 of 17 items; not comparable" in partial
    assert "lm-eval  " not in partial

    out = tmp_path / "items.jsonl"
    document = json.loads(run(*common, "--limit", 9, "--out", out, "--json").stdout)
    assert (document["task"], document["items"], document["partial"]) == ("hellaswag", 9, True)
    assert (len(document["data_sha256"]), document["published_file"]) == (64, False)
    assert set(document["karpathy"]) >= {"acc", "acc_norm", "stderr"}
    assert set(document["lm-eval"]) >= {"acc", "acc_norm", "acc_bytes", "stderr"}
    assert document["karpathy"]["stderr"] == document["karpathy"]["acc_norm_stderr"]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 9
    for record in records:
        assert set(record) == {"ind", "label", "hash", "karpathy", "lm-eval"}
        assert {kind: len(values) for kind, values in record["karpathy"].items()} == {"sum": 4, "mean": 4}
        lengths = {kind: len(values) for kind, values in record["lm-eval"].items()}
        assert lengths == {"sum": 4, "char": 4, "byte": 4}


def test_loss(model_folder, dataset_folder):
    arguments = ("loss", "-m", model_folder, "--data", dataset_folder, "--tokens", "0.5k", "--batch-size", 2)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "nats per token" in result.stdout
    assert "first 500 tokens of val, 4 windows of 128" in result.stdout
    document = json.loads(run(*arguments, "--json").stdout)
    assert set(document) >= {"loss", "stderr", "perplexity", "bits_per_byte", "tokens", "seconds"}
    assert document["tokens"] == 500
    assert (document["task"], document["data"], len(document["dataset"])) == ("loss", str(dataset_folder), 64)
    assert result.stdout.splitlines()[-1] == f"model {model_folder}, data {dataset_folder}"
    whole = run("loss", "-m", model_folder, "--data", dataset_folder, "--seq-len", 64)
    assert "val is smaller than the 10,485,760 tokens asked for" in whole.stdout


def test_user_errors_are_one_line(model_folder, items_file, dataset_folder, tmp_path, monkeypatch):
    # To list the harness' thousands of tasks takes it ten seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    debugged = run("--debug", "hellaswag", "-m", "x", "--data", tmp_path / "none.jsonl")
    assert isinstance(debugged.exception, FileNotFoundError)
    hellaswag, loss = ((name, "-m", model_folder, "--data") for name in ("hellaswag", "loss"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    for arguments, message in [
        ((*hellaswag, tmp_path / "none.jsonl"), "No such file"),
        ((*hellaswag, tmp_path / "bad.jsonl"), "bad.jsonl:1: not JSON"),
        ((*hellaswag, tmp_path), "Is a directory"),
        ((*hellaswag, items_file, "--out", tmp_path), "is a folder"),
        ((*hellaswag, items_file, "--out", items_file), "is the file of --data"),
        ((*hellaswag, items_file, "--out", "/dev/full"), "is a device"),
        ((*hellaswag, items_file, "--out", tmp_path / "no" / "items.jsonl"), "does not exist"),
        ((*hellaswag, items_file, "-d", "abacus"), "no device 'abacus'"),
        (("hellaswag", "-m", tmp_path / "none", "--data", items_file), "none"),
        (("hellaswag", "--hf", tmp_path / "none", "--data", items_file), "transformers cannot load"),
        (("hellaswag", "--hf", "x", "--compile", "--data", items_file), "--compile works with --model alone"),
        (("lm-eval", "-m", model_folder, "--tasks", f"nonsense,{items_file}"), "has no task nonsense:"),
        ((*loss, tmp_path / "none"), "none"),
        ((*loss, dataset_folder, "--split", "test"), "test"),
        ((*loss, dataset_folder, "--seq-len", "999"), "seq_len must be 1 to 128"),
    ]:
        assert_one_line(arguments, message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *[(f"loss -m x --data y --tokens {size}", "is not a whole number") for size in ("ten", "1.2", "-5", "1T")],
        ("loss -m x --data y --tokens 0", "is too small: the smallest is 1"),
        ("loss -m x", "Missing option '--data'"),
        ("hellaswag", "give either --model"),
        ("hellaswag -m x --hf y", "give either --model"),
        ("hellaswag -m x --limit 0", "0 is not in the range"),
        ("task -m x", "Missing argument 'NAME'"),
        ("task mmlu -m x", "'mmlu' is not one of"),
        ("task wikitext2 -m x --limit 3", "is one text"),
        ("task ptb -m x --out y", "is one text"),
        ("task piqa -m x --stride 3", "--stride does not apply"),
        ("compare one.jsonl", "Missing argument 'B'"),
        ("--nonsense", "No such option"),
    ],
)
def test_wrong_usage(command, message):
    result = run(*command.split())
    assert result.exit_code == 2
    assert message in result.stderr


def test_ctrl_c_says_how_to_resume(model_folder, items_file, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2_eval.hellaswag.score_items", interrupt)
    common, out = ("hellaswag", "-m", model_folder, "--data", items_file, "-d", "cpu"), tmp_path / "out.jsonl"
    stopped = run(*common, "--out", out)
    assert stopped.exit_code == 130
    assert f"stopped: the same command resumes, from the scores beside {out}" in stopped.stderr
    assert (run(*common).exit_code, run(*common).stderr.strip()) == (130, "")


def test_what_is_missing_is_one_line(model_folder, items_file, monkeypatch):
    """Memory, and packages that are not installed."""
    monkeypatch.setattr("gpt2_eval.hellaswag.score_items", lambda *_, **__: torch.empty(2**60))
    for module in ("lm_eval", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    for arguments, message in (
        (("lm-eval", "-m", "x", "--tasks", "sciq"), "pip install 'gpt2-eval[lm-eval]'"),
        (("hellaswag", "--hf", "x", "--data", items_file), "pip install 'gpt2-eval[transformers]'"),
        (("hellaswag", "-m", model_folder, "--data", items_file, "-d", "cpu"),
         "Error: out of memory: use a smaller --batch-size, or --dtype bf16"),
    ):  # fmt: skip
        assert_one_line(arguments, message)
