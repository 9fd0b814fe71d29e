"""The mark <|endoftext|> stands in front of other projects' documents or behind them: conversion follows it."""

import itertools
import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from click.testing import CliRunner
from test_foreign import idx, npy, u16

from gpt2_data import convert, open_dataset, verify
from gpt2_data.cli import main

E = 50256  # <|endoftext|>
TEXTS = [[1, 2], [], [3, 4, 5], [6], []]


def documents(where):
    return [document.tolist() for document in open_dataset(where).documents("train")]


def flat(parts):
    return list(itertools.chain(*parts))


def pair(parts):
    """Megatron's two files, of documents with marks or without."""
    return {"a.bin": u16(flat(parts)), "a.idx": idx([len(part) for part in parts])}


BEHIND = [[*text, E] for text in TEXTS]
FRONT = [[E, *text] for text in TEXTS]
CASES = {
    "nanogpt's own": {"train.bin": u16(flat(BEHIND))},
    "nanogpt, cut": {"train.bin": u16(flat(BEHIND[:4])[:-1])},
    "nanogpt, first empty": {"train.bin": u16([E, *flat(BEHIND)]), "val.bin": u16([8, E])},
    "nanogpt, in front": {"train.bin": u16(flat(FRONT))},
    "megatron --append-eod": pair(BEHIND),
    "megatron without": pair(TEXTS),
    "megatron, in front": pair(FRONT),
    "megatron, sentences": pair(BEHIND) | {"a.idx": idx([1, 2, 1, 2, 2, 2, 1], documents=[0, 2, 3, 5, 6, 7])},
}


@pytest.mark.parametrize("chunk", [1, 3, 1_000_000])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["llmc", "arrow", "npy"])
def test_documents_stay_wherever_their_mark_stands(folder, tmp_path, case, to, chunk, monkeypatch):
    """nanoGPT's prepare.py, Megatron's preprocess_data.py --append-eod: every document was shifted by one."""
    for module in "conversion", "formats.foreign":
        monkeypatch.setattr(sys.modules[f"gpt2_data.{module}"], "_CHUNK", chunk)
    monkeypatch.setattr(sys.modules["gpt2_data.conversion"], "SHARD_TOKENS", 4)
    result = convert(folder(CASES[case]), tmp_path / "out", to)
    wanted = FRONT[:4] if "cut" in case else [[E], *FRONT] if "first" in case else FRONT
    assert documents(tmp_path / "out") == wanted
    assert result.tokens == len(flat(wanted)) + (2 if "first" in case else 0)
    if to == "npy":
        return
    assert verify(tmp_path / "out", "full").ok
    if to == "arrow":
        shards = sorted((tmp_path / "out").glob("train_*.arrow"))
        rows = flat(pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist() for path in shards)
        joined = [flat(row["tokens"] for row in group) for _, group in itertools.groupby(rows, lambda r: r["id"])]
        assert joined == wanted


@pytest.mark.parametrize(
    "case", ["nanogpt's own", "nanogpt, in front", "megatron --append-eod", "megatron without"]
)
def test_show_prints_the_text_alone(folder, case):
    """The first token was dropped, and the mark behind the text printed."""
    where = str(folder(CASES[case]))
    shown = [CliRunner().invoke(main, ["show", where, str(n), "--json"]) for n in range(len(TEXTS))]
    assert [json.loads(one.stdout)["text"] for one in shown] == ['"#', "", "$%&", "'", ""]


def test_text_without_a_mark_gets_none(folder, tmp_path):
    """Characters' ids, as nanoGPT's shakespeare_char has them: 50256 would be an id that they do not have."""
    convert(folder({"train.bin": u16([5, 6, 7])}), tmp_path / "out", "llmc")
    assert open_dataset(tmp_path / "out").read("train", 0, 3).tolist() == [5, 6, 7]


def test_the_largest_id_is_the_one_that_is_there(folder):
    """nanoGPT #422: characters with ids up to 62 for a model with 65, refused for the id 50,256."""
    where = folder({"train.bin": u16([0, 62, 7]), "val.bin": u16([64])})
    assert [shard.max_token for shard in open_dataset(where).manifest.shards] == [62, 64]
    from gpt2_model import GPTConfig
    from gpt2_train import TrainConfig
    from gpt2_train.start import check_shape

    config, dataset = TrainConfig(data=str(where), out="x", seq_len=2), open_dataset(where)
    check_shape(config, GPTConfig(vocab_size=65), dataset, None, 1)
    with pytest.raises(ValueError, match="holds token id 64, and the model's vocabulary ends at 63"):
        check_shape(config, GPTConfig(vocab_size=64), dataset, None, 1)


def test_a_loader_that_is_left_open_is_silent_at_the_end(folder):
    """Exception ignored in TokenFiles.__del__: 'NoneType' object has no attribute 'close'."""
    where = folder({"train_1.npy": npy([E, *range(20)])})
    code = f"""
import ctypes, string
from gpt2_data import TokenLoader
from gpt2_data.formats import uint16
loader = string.kept = TokenLoader({os.fspath(where)!r}, batch_size=1, seq_len=4)
next(loader)
for module in string, uint16:  # a module that something written in C holds is emptied, the newest first
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
