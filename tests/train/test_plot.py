"""tools/plot.py on runs of any length and several sizes: what is drawn, and what is said not to be there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import plot


def write_run(folder: Path, steps: int, every: int = 0, accuracy: bool = False, shape=None, tokens=100) -> Path:
    """A run of that many steps, with an evaluation every so often."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps + 1):
        of_step = {"step": step, "tokens": step * tokens}
        if step:
            rows.append({**of_step, "loss": 3 + 8 / step, "lr": 1e-3})
        if every and step % every == 0:
            row = {**of_step, "val_loss": 3.1 + 7 / (1 + step)}
            rows.append({**row, "hellaswag_acc_norm": 0.25 + step / steps / 20} if accuracy else row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if shape:
        (folder / "config.toml").write_text("[model]\nn_layer = {}\nn_embd = {}\n".format(*shape))
    return folder


def drawn(monkeypatch, *arguments):
    """(figure, result) of the command."""
    figures, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda *given: figures.append(draw(*given)) or figures[-1])
    result = CliRunner().invoke(plot.main, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    return figures[0], result


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_runs_of_published_sizes_have_gpt_2_and_gpt_3_beside_them(tmp_path, monkeypatch) -> None:
    runs = [
        write_run(tmp_path / "small", 300, 100, True, (12, 768)),
        write_run(tmp_path / "medium", 200, 100, True, (24, 1024)),
        write_run(tmp_path / "other", 300, 100, True, (6, 384)),
    ]
    figure, result = drawn(monkeypatch, *runs, "--out", tmp_path / "a.png")
    loss, accuracy = figure.axes
    assert {"GPT-2 124M  3.29", "GPT-2 350M  3.08", "medium  3.13: validation"} < set(legend(loss))
    assert set(legend(accuracy)) == {
        "small  30.0", "medium  30.0", "other  30.0", "guessing  25",
        "GPT-2 124M  29.45", "GPT-3 125M  33.7", "GPT-2 350M  37.52", "GPT-3 350M  43.6",
    }  # fmt: skip
    levels = {line.get_ydata()[0] for line in accuracy.lines if len(set(line.get_ydata())) == 1}
    assert {25, 29.45, 33.7, 37.52, 43.6} == levels
    assert "build-nanogpt" in figure.get_supxlabel()
    assert result.stderr == ""
    assert accuracy.get_ylabel() == "accuracy on HellaSwag, %"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_another_size_alone_has_no_lines_and_another_test_is_called_by_its_file(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", 9, 3, True)
    (run / "config.toml").write_text('hellaswag = "quickstart/made.jsonl"\n[model]\nn_layer = 2\nn_embd = 16\n')
    figure, _ = drawn(monkeypatch, run, "--out", tmp_path / "a.png")
    assert not any("GPT" in text for axis in figure.axes for text in legend(axis))
    assert figure.get_supxlabel() == ""
    assert figure.axes[1].get_ylabel() == "accuracy on made.jsonl, %"


@pytest.mark.parametrize(("steps", "every"), [(1, 0), (1, 1), (2, 0), (20_000, 0), (20_000, 20)])
def test_runs_of_any_length(tmp_path, monkeypatch, steps, every) -> None:
    run = write_run(tmp_path / "run", steps, every, shape=(12, 768))
    figure, result = drawn(monkeypatch, run, "--out", tmp_path / "a.png")
    (axis,) = figure.axes
    assert result.stderr == ""
    low, high = axis.get_ylim()
    last = 3.1 + 7 / (1 + steps) if every else 3 + 8 / steps
    assert low < 3.2924 < high
    assert low < last < high
    assert 1 <= steps <= axis.get_xlim()[1]
    assert high < 5 or steps < 100  # the fall from 11 does not take the picture


def test_x_in_tokens_broken_lines_nulls_and_repeats(tmp_path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", 30, 10, tokens=10**6)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 31, "loss": null, "skipped": "loss nan"}\n\xff\xfe\n[1]\n{"step": 30, "loss": 7.5}\n'
        )
        file.write(b'{"step": 40, "val_loss": 3.0}\n{"step": 12, "lo')  # step 40 has no tokens
    figure, result = drawn(monkeypatch, run, "--x", "tokens", "--out", tmp_path / "a.png")
    axis = figure.axes[0]
    x, y = axis.lines[0].get_data()
    assert list(x) == [step * 10**6 for step in range(1, 31)]
    assert y[-1] == 7.5
    assert axis.get_xlabel() == "tokens"
    assert "30M" in [label.get_text() for label in axis.get_xticklabels()]
    assert "run: broken lines of metrics.jsonl skipped: 3" in result.stderr
    assert "run: val_loss of steps without tokens left out: 1" in result.stderr


def test_a_run_that_is_none_does_not_spoil_the_others(tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "run").mkdir(parents=True)
    (tmp_path / "b" / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 10.9}\n')
    runs = [tmp_path / "empty", write_run(tmp_path / "a" / "run", 5), tmp_path / "b" / "run"]
    figure, result = drawn(monkeypatch, *runs, "--out", tmp_path / "a.png")
    assert legend(figure.axes[0]) == ["a/run  4.60: training", "b/run  10.90: validation"]
    assert result.stderr.endswith("empty: no rows of a run to draw\n")
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "a" / "run").rename(tmp_path / "first")
    (tmp_path / "b" / "run").rename(tmp_path / "second")
    figure, result = drawn(monkeypatch, tmp_path, "--out", tmp_path / "a.png")  # all runs in a folder
    assert [text.split()[0] for text in legend(figure.axes[0])] == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        ("", "a.png", "{}: no run with a row in its metrics.jsonl"),
        ('{"a": 1}\n{cut', "a.png", "{}: no run with a row in its metrics.jsonl"),
        ('{"step": 1, "loss": 5}', "no/a.png", "{}/no/a.png cannot be written: "),
        ('{"step": 1, "loss": 5}', "a.what", "{}/a.what cannot be written: "),
    ],
)
def test_what_is_no_run_or_cannot_be_written_is_one_clear_line(tmp_path, content, out, message) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    result = CliRunner().invoke(plot.main, [str(tmp_path), "--out", f"{tmp_path}/{out}"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {message.format(tmp_path)}")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_mean_is_of_the_steps_around(tmp_path, monkeypatch) -> None:
    mean = plot.centred_mean(np.array([4.0, 2.0, 6.0, 8.0, 1.0]), 3)
    assert list(mean) == [3, 4, pytest.approx(16 / 3), 5, 4.5]
    figure, _ = drawn(monkeypatch, write_run(tmp_path / "run", 40), "--out", tmp_path / "a.png")
    assert legend(figure.axes[0])[0].endswith(": training, the mean of 10 steps")
