"""The tools, on data of a few kilobytes; quickstart as a whole is what `make quickstart` runs."""

import json
import random
from contextlib import nullcontext

import click
import pytest

import quickstart
from gpt2_data import BuildConfig, build
from gpt2_eval import load_hellaswag

WORDS = ["the", "function", "returns", "a", "list", "of", "open", "files", "and", "then", "closes", "each", "one"]


@pytest.mark.parametrize(("loss", "learnt"), [(5.3, True), (8.9, False)])
def test_quickstart_says_whether_the_model_has_learnt(tmp_path, capsys, loss, learnt) -> None:
    (tmp_path / "run").mkdir()
    rows = [{"step": 0, "val_loss": 10.8, "hellaswag_acc_norm": 0.28}, {"step": 1, "loss": 10.7}]
    rows.append({"step": 220, "val_loss": loss, "hellaswag_acc_norm": 0.32})
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with nullcontext() if learnt else pytest.raises(click.ClickException, match="hardly better"):
        quickstart.summary(tmp_path, tmp_path / "checkpoint", 159.0)
    shown = capsys.readouterr().out
    assert f"10.80{loss:10.2f}   nats" in shown
    assert "28.0%     32.0%   +- 3.3%" in shown


def test_quickstart_items_are_hellaswag_s_and_have_their_own_ending(tmp_path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=400)) for _ in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = BuildConfig(
        sources=(str(tmp_path / "t.jsonl"),), out=str(tmp_path / "d"), val_tokens=3000, workers=1, order="source"
    )
    build(config)
    quickstart.write_items(tmp_path / "d", tmp_path / "items.jsonl")

    assert len(load_hellaswag(tmp_path / "items.jsonl").items) == quickstart.HELLASWAG_ITEMS
    labels = set()
    for item in map(json.loads, (tmp_path / "items.jsonl").read_text().splitlines()):
        whole = f"{item['ctx']} {item['endings'][item['label']]}"
        assert sum(whole in text for text in texts) == 1
        assert len(set(item["endings"])) == 4
        labels.add(item["label"])
    assert labels == {0, 1, 2, 3}
