import tomllib
from dataclasses import replace

import pytest
from click.testing import CliRunner

import gpt2_train.loop
from gpt2_model import PRESETS
from gpt2_train import RECIPES, TrainConfig, load_config, lr_at
from gpt2_train.cli import main
from gpt2_train.config import micro_batches, to_toml


def test_toml_of_a_config_is_that_config() -> None:
    config = TrainConfig(
        data='a "quoted"\\path\n', out="b", lr=1e-4, model={"n_layer": 3, "tie_word_embeddings": False}
    )
    again = TrainConfig(**tomllib.loads(to_toml(config)))
    assert again.model_config == config.model_config
    assert replace(again, model=config.model) == config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_models(name) -> None:
    config = TrainConfig(**load_config(recipe=name))
    preset = {"GPT-3-125M": replace(PRESETS["124M"], block_size=2048)}.get(name) or PRESETS[name]
    assert config.model_config == preset
    assert config.batch_tokens % (8 * config.seq_len) == 0
    assert config.warmup < config.steps


def test_124m_is_build_nanogpt_s() -> None:
    config = TrainConfig(**load_config(recipe="124M"))
    assert (config.steps, config.batch_tokens, config.seq_len) == (19073, 524288, 1024)
    assert (config.lr, config.min_lr, config.warmup) == (6e-4, 6e-5, 715)
    assert (config.weight_decay, config.grad_clip, config.eval_every) == (0.1, 1.0, 250)


def test_learning_rate() -> None:
    schedule = {"lr": 6e-4, "min_lr": 6e-5, "warmup": 715, "steps": 19073}
    assert lr_at(0, **schedule) == 6e-4 / 715
    assert lr_at(714, **schedule) == 6e-4
    assert lr_at(715, **schedule) == 6e-4
    assert lr_at(715 + (19073 - 715) // 2, **schedule) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr_at(19072, **schedule) == pytest.approx(6e-5, rel=1e-3)
    assert lr_at(30000, **schedule) == 6e-5
    assert lr_at(0, lr=1.0, min_lr=0.0, warmup=0, steps=10) == 1.0


@pytest.mark.parametrize(
    ("world_size", "largest", "expected"),
    [(1, 16, (16, 32)), (8, 64, (64, 1)), (8, 50, (32, 2)), (512, 64, (1, 1))],
)
def test_micro_batches_share_out_the_batch(world_size, largest, expected) -> None:
    config = TrainConfig()
    micro, accumulation = micro_batches(config, world_size, largest)
    assert (micro, accumulation) == expected
    assert micro * accumulation * world_size * config.seq_len == config.batch_tokens


def test_batches_that_do_not_divide_say_what_would() -> None:
    with pytest.raises(ValueError, match="524,288 tokens does not divide into sequences of 1,024 on 3 processes: "
                       "use --batch-tokens 525312"):  # fmt: skip
        micro_batches(TrainConfig(), 3, 64)
    with pytest.raises(ValueError, match="512 sequences of each process do not divide into micro-batches of 48: "
                       "use --micro-batch 32"):  # fmt: skip
        micro_batches(TrainConfig(micro_batch="48"), 1, 64)


def test_the_rate_at_the_end_follows_a_low_peak() -> None:
    """Runs of 0.1 that did not name it had 6e-5: where that is possible it stays, so that they resume."""
    assert [TrainConfig(lr=lr).min_lr for lr in (6e-4, 1e-4, 6e-5, 3e-5)] == [6e-5, 6e-5, 6e-5, 3e-5 / 10]


def test_help_has_groups_and_the_defaults_a_person_types() -> None:
    usual, full = (CliRunner().invoke(main, [flag]).output for flag in ("--help", "--help-all"))
    groups = ("Data and run folder:", "Model:", "Optimisation:", "Hardware:")
    defaults = ("[default: 512Ki]", "[default: 10Mi]", "[default: 0.0006]")
    for text in (*groups, *defaults, "--steps SIZE", "--keep INTEGER", "--seed INTEGER"):
        assert text in usual
    assert ("--spike-sigma" in usual, "--spike-sigma" in full) == (False, True)
    assert "[default: 300]" in full


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a finite number of at least 1, not 0"),
        ({"seed": 2**53}, "seed must be a finite number of at least 0 and below 9007199254740992, not 90"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0, not nan"),
        ({"lr": 1e-5, "min_lr": 6e-5}, "min_lr 6e-05 is above lr 1e-05: add --min-lr 1e-06"),
        ({"micro_batch": "many"}, "micro_batch must be auto or a positive whole number, not 'many'"),
        ({"grad_compression": "fp16"}, "grad_compression must be one of none, bf16, not 'fp16'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16"),
        (
            {"seq_len": 2048},
            "seq_len 2048 is longer than the model's context of 1024: add --model block_size=2048",
        ),
        ({"model": {"layers": 3}}, "unknown model field 'layers'"),
    ],
)
def test_nonsense_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "is not valid TOML"),
        ("learning_rate = 1.0", "unknown key 'learning_rate': choose from data, out, steps"),
        ("steps = 'many'", "steps must be a whole number, not 'many'"),
        ("lr = true", "lr must be a number, not True"),
        (f"lr = 1{'0' * 400}", "lr must be below 9007199254740992, not 1000"),
        ("out = 3", "out must be text in quotes, not 3"),
        ("compile = true", "compile must be text in quotes, not True"),
        ("model = 3", "model must be a table, not 3"),
        ("[model]\nn_layers = 2", "unknown model field 'n_layers'"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message) -> None:
    (tmp_path / "c.toml").write_text(text)
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "c.toml"), "--data", "d", "--out", "o"])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ("--data again", {}, "--data is given more than once: a run trains on one dataset"),
        ("--json", {}, "--json needs --dry-run"),
        ("--model n_layer", {}, "--model 'n_layer' must be FIELD=VALUE"),
        ("", {"GPT2_TRAIN_STEPSS": "3"}, "unknown environment variable GPT2_TRAIN_STEPSS"),
    ],
)
def test_wrong_usage(words, env, message) -> None:
    result = CliRunner().invoke(main, ["--data", "d", "--out", "o", *words.split()], env=env)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_flag_before_environment_before_file_before_recipe(dataset, tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(gpt2_train.loop, "train", lambda config: seen.append(config) or 0)
    (tmp_path / "c.toml").write_text("lr = 0.2\nwarmup = 20\nsteps = 2000\n[model]\nn_layer = 2\nn_head = 2\n")
    monkeypatch.setenv("GPT2_TRAIN_WARMUP", "30")
    monkeypatch.setenv("GPT2_TRAIN_STEPS", "3000")
    arguments = [
        "--recipe", "350M", "--config", str(tmp_path / "c.toml"), "--steps", "4k", "--data", str(dataset),
        "--out", str(tmp_path / "o"),
    ]  # fmt: skip
    result = CliRunner().invoke(main, [*arguments, "--model", "n_head=4"])
    assert result.exit_code == 0, result.output
    config = seen[0]
    assert (config.steps, config.warmup, config.lr, config.min_lr) == (4000, 30, 0.2, 0.0)
    shape = config.model_config
    assert (shape.n_head, shape.n_layer, shape.n_embd) == (4, 2, 1024)
