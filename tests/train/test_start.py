"""What stops or warns a start, and that `--dry-run` sees the same: each case is planned, then started."""

import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_run import TINY, flags, losses

import gpt2_train.memory
from gpt2_model import GPT
from gpt2_model.command import locked
from gpt2_train import TrainConfig, load_config, train
from gpt2_train.cli import main
from gpt2_train.config import default_warmup, to_toml

SHORT = {"steps": 1, "warmup": 1, "peak_tflops": 1.0}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def both(folder, /, out="run", **changes):
    """Plan a run, then start it; return (exit status, stderr) of each. The plan leaves no file."""
    settings = {**SHORT, "data": folder, **changes}
    words, here = flags(settings.pop("data"), out, **settings), sorted(Path().rglob("*"))
    planned = CliRunner().invoke(main, [*words, "--dry-run"])
    assert sorted(Path().rglob("*")) == here
    assert planned.exit_code == 2 or "parameters" in planned.stdout  # the plan, whatever check has failed
    started = CliRunner().invoke(main, words)
    return [(result.exit_code, result.stderr) for result in (planned, started)]


def busy(stack, _monkeypatch):
    stack.enter_context(locked(Path("run")))
    return {}, "run is in use by process"


def of_another_user(_stack, monkeypatch):
    Path("run/checkpoints").mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, _: str(path) != "run/checkpoints")
    return {}, "--out run: run/checkpoints cannot be written to: choose another --out"


def link_to_nothing(_stack, _monkeypatch):
    Path("run").symlink_to("unmounted")
    return {}, "--out run: run is not a folder"


def hub_unreachable(_stack, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "empty")
    return {"init": "gpt2", "model": {}}, "gpt2 is not a local model folder, is not in Hugging Face's cache"


def folder_that_hides_the_hub(_stack, _monkeypatch):
    """build-nanogpt #103: a local folder hides the hub's model of that name."""
    Path("gpt2").mkdir()
    Path("gpt2/README.md").touch()
    return {"init": "gpt2", "model": {}}, "gpt2 holds no weights"


def too_little_memory(_stack, monkeypatch):
    monkeypatch.setattr(gpt2_train.memory, "available_memory", lambda: 10**6)
    return {}, "of this machine's memory, and 1.0 MB are free: use a smaller model"


def full_disk(_stack, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": 10**6}))
    return {}, "run will need 4.1 MB for 1 checkpoints"


def no_compiler(_stack, monkeypatch):
    """pytorch #92745: no C++ compiler, and 60 lines of traceback."""
    from torch._inductor import cpp_builder

    def missing(command, **_options):
        raise FileNotFoundError(command[0])

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setattr(subprocess, "check_output", missing)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path.cwd().parent / "inductor"))
    return {"compile": "on"}, "install a C++ compiler (g++), or use gpt2-train --compile off"


def no_tracker(_stack, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    return {"wandb": "p"}, "--wandb needs a package that is not installed"


def bad_hellaswag(_stack, _monkeypatch):
    Path("h.jsonl").write_text('{"ind": 0}\n')
    return {"hellaswag": "h.jsonl"}, "h.jsonl"


def folder_for_a_file(name):
    def fault(_stack, _monkeypatch):
        Path("run", name).mkdir(parents=True)
        return {}, f"--out run: run/{name} is a folder, where the run keeps a file: move it away"

    return fault


def settings(message, **changes):
    return lambda _stack, _monkeypatch: (changes, message)


@pytest.mark.parametrize(
    "fault",
    [
        busy, of_another_user, link_to_nothing, hub_unreachable, folder_that_hides_the_hub, too_little_memory,
        full_disk, no_compiler, no_tracker, bad_hellaswag,
        settings("this machine has no device 'cuda:7'", device="cuda:7"),
        settings("has a token beyond the vocabulary of 256", sample_prompt="Hello", eval_every=1),
        settings("use --model vocab_size=118", model={**TINY["model"], "vocab_size": 99}),
        settings("a batch of 72 tokens does not divide into sequences of 16 on 1 process: use --batch-tokens 64",
                 batch_tokens=72),
        settings("do not divide into micro-batches of 3", micro_batch="3"),
        settings("nowhere", data="nowhere"),
        *map(folder_for_a_file, ("metrics.jsonl", "samples.jsonl", "config.toml")),
        settings("--hellaswag missing.jsonl is not a file: name one", hellaswag="missing.jsonl"),
        settings("--hellaswag / is not a file: name one in HellaSwag's format (JSONL)", hellaswag="/"),
        settings(f"{__file__} is not a folder", out=f"{__file__}/run"),
        settings("a sample of seq_len 8192 needs 8,193", seq_len=8192, batch_tokens=8192, micro_batch="1",
                 model={"block_size": 8192}),
        settings("./no-model is neither a model folder", init="./no-model"),
        settings("gpt2-nosuch", model={}, init="gpt2-nosuch"),
        settings("has another shape than --model", model={**TINY["model"], "n_layer": 3}, init="START"),
        settings("longer than the context of START, 32: use --seq-len 32", model={}, init="START", seq_len=64),
        settings("was trained with other settings (lr: 0.01 -> 0.5)", out="DONE", lr=0.5),
        settings("already contains a run, and --resume is never", out="DONE", resume="never"),
    ],
)  # fmt: skip
def test_what_stops_a_run_stops_its_dry_run(dataset, monkeypatch, fault) -> None:
    """--dry-run passed runs that stopped at once. A start that fails leaves no folder behind."""
    with ExitStack() as stack:
        changes, message = fault(stack, monkeypatch)
        if changes.get("init") == "START":
            GPT(TrainConfig(**TINY).model_config).save_pretrained(Path("START"))
        if done := changes.get("out") == "DONE":
            assert train(TrainConfig(**{**TINY, **SHORT}, data=str(dataset), out="DONE")) == 0
        before = sorted(Path().rglob("*"))
        (planned, plan), (started, said) = both(dataset, **changes)
        assert sorted(Path().rglob("*")) == before
    assert (planned, started) == ((2, 2) if done else (1, 1)), plan + said
    (line,) = [line for line in plan.splitlines() if message in line]
    assert line.startswith("Error: ")
    assert line in said
    assert "Traceback" not in plan + said


def test_a_colleague_resumes_a_run(dataset, monkeypatch) -> None:
    """The folder is the group's, and .lock and the logs are writable for their owner alone."""
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to others
        monkeypatch.chdir(shared)
        shutil.copytree(dataset, "data")
        settings = {**TINY, "data": "data", "out": "run", "eval_every": 4}
        assert train(TrainConfig(**{**settings, "steps": 4})) == 0
        for path in (Path(), Path("run"), *Path("run").rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o444)
        try:
            if os.geteuid() == 0:
                os.seteuid(65534)
            assert train(TrainConfig(**{**settings, "steps": 8})) == 0
        finally:
            os.seteuid(os.getuid())
        assert [step for step, _ in losses(Path("run"))] == list(range(1, 9))


def test_no_validation_and_a_run_that_is_done_are_said_by_both(dataset, runs) -> None:
    """--dry-run was silent about 0 validation tokens; a done run is no error of either."""
    Path("raw").mkdir()
    Path("raw/train.bin").write_bytes((dataset.parent / "raw/train.bin").read_bytes())
    model = {**TINY["model"], "vocab_size": 50257}
    for code, said in both("raw", eval_every=1, num_samples=0, model=model):
        assert (code, "warning: the dataset has no tokens for validation" in said) == (0, True), said
    assert [code for code, _ in both("raw", eval_every=1, num_samples=0, model=model)] == [0, 0]


def test_advice_is_followed_and_holds(dataset) -> None:
    """A new user: the advice for --init was to add --model block_size=1024, which then failed."""
    GPT(TrainConfig(**TINY).model_config).save_pretrained(Path("START"))
    wrong = {"init": "START", "model": {}, "seq_len": 64, "batch_tokens": 80, "micro_batch": "1"}
    (planned, plan), _ = both(dataset, **wrong)
    assert planned == 1
    assert "use --seq-len 32 --batch-tokens 64" in plan
    for result in both(dataset, **{**wrong, "seq_len": 32, "batch_tokens": 64}):
        assert result[0] == 0, result[1]


def test_memory_and_space_are_advised_as_far_as_they_help(monkeypatch) -> None:
    config = TrainConfig(**load_config(recipe="124M"), micro_batch="8", precision="fp32", keep=9)
    need = gpt2_train.memory.peak_memory(config, 4, 1, "cpu").host_bytes
    with pytest.raises(ValueError, match="use --micro-batch 4 or --micro-batch 1 or a smaller model"):
        gpt2_train.memory.check_memory(config, 8, 1, "cpu", (None, need))
    each = gpt2_train.memory.checkpoint_bytes(config)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": 3 * each}))
    with pytest.raises(OSError, match="choose another --out or --keep 2$"):
        gpt2_train.memory.check_space(config)


def test_a_laptop_with_the_defaults_of_eight_gpus_is_warned(dataset, monkeypatch) -> None:
    """A new user: 19,073 steps of 524,288 tokens on 6,000 tokens and a CPU began without a word."""
    monkeypatch.setattr("gpt2_train.start.assumed_speed", lambda *_, **__: (1e10, "assumed"))
    words = ["--data", str(dataset), "--out", "run", "--seq-len", "16", "--model", "n_layer=2", "--dry-run"]
    plan = CliRunner().invoke(main, [*words, "--sample-prompt", "a"]).stderr
    (line,) = [line for line in plan.splitlines() if "days here and each text is seen" in line]
    advice = line.split(": ")[2].split(" makes it ")[0]
    assert advice == "--batch-tokens 64 --steps 937"
    assert "days here" not in CliRunner().invoke(main, [*words, *advice.split()]).stderr


def test_a_warmup_follows_the_steps_where_it_is_not_given(dataset) -> None:
    """A new user: with --steps 60 and 715 steps of warmup the rate ended at 8e-5 of 1e-3."""
    assert [default_warmup(steps) for steps in (1, 60, 1000, 19073, 38146)] == [1, 2, 37, 715, 1430]
    assert TrainConfig().warmup == 715
    assert "default: --steps times 715 / 19073, at least 1" in " ".join(
        CliRunner().invoke(main, ["--help"]).output.split()
    )
    settings = {**TINY, "data": str(dataset), "out": "run", "checkpoint_every": 1}
    del settings["warmup"]
    # Of an older version, whose default was 715 whatever the steps; it goes on with other steps as well.
    assert train(TrainConfig(**{**settings, "steps": 1, "warmup": 715})) == 0  # as the default was
    assert train(TrainConfig(**{**settings, "steps": 80})) == 0
    assert load_config("run/config.toml")["warmup"] == 715
    assert train(TrainConfig(**{**settings, "steps": 40, "out": "new"})) == 0
    assert "warmup = 1\n" in Path("new/config.toml").read_text()
    (code, said), _ = both(dataset, out="new", steps=80, warmup=5)
    assert (code, "warmup: 1 -> 5" in said) == (2, True)


def test_divergence_is_said_once(dataset, capfd) -> None:
    """A new user: with --lr 30 the loss rose to 26 million; "done", and no other word."""
    settings = {**TINY, "data": str(dataset), "steps": 10, "warmup": 1, "checkpoint_every": 0}
    assert train(TrainConfig(**settings, out="calm")) == 0
    assert "diverged" not in capfd.readouterr().err
    assert train(TrainConfig(**{**settings, "lr": 30.0, "min_lr": 30.0}, out="wild")) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "diverged" in line]
    assert "above that of guessing (5.55): the run has probably diverged: lower --lr or lengthen --warmup" in line


@pytest.mark.parametrize("name", ["data", "out", "init", "resume", "hellaswag"])
def test_a_name_that_is_not_utf_8_is_refused_by_name(dataset, name) -> None:
    """llama_index #10369: surrogates not allowed, after all the work."""
    Path("caf\udce9").mkdir()
    for code, said in both(dataset, **{"out": "run", name: "caf\udce9"}):
        assert (code, f"{name} 'caf\\udce9' is not UTF-8: rename it" in said) == (2, True), said
    assert not Path("run").exists()


def test_a_config_of_a_windows_editor_is_read(dataset) -> None:
    """continue #11876: a TOML file with a BOM was an invalid statement."""
    text = to_toml(TrainConfig(**{**TINY, **SHORT, "data": str(dataset), "out": "run"}))
    Path("c.toml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    result = CliRunner().invoke(main, ["--config", "c.toml"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps = 3\r\nout = 'caf\xe9'\n".encode("latin-1"), "line 2, is not UTF-8 text: save the file as"),
        ("steps = 3".encode("utf-16"), "c.toml, line 1, is not UTF-8 text"),
        (b"steps = 3\nlr =", "(at end of document)"),
        (b"steps = 3\nlr = \n", "(at line 2, column 6)"),
        (b"lr = " + b"[" * 5000, "c.toml is not valid TOML"),
        (None, "--config c.toml cannot be read (Is a directory): name a TOML file, such as a run's config.toml"),
    ],
)
def test_a_config_that_cannot_be_read_names_the_line(content, message) -> None:
    Path("c.toml").mkdir() if content is None else Path("c.toml").write_bytes(content)
    result = CliRunner().invoke(main, ["--config", "c.toml", "--data", "d", "--out", "o"])
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
