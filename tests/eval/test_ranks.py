"""With real processes: batch size, order, shared beginnings and the number of ranks change no score."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gpt2_eval.cli import main

pytestmark = pytest.mark.slow

WORKER = """
import json, os, sys
from itertools import product
import numpy as np
import torch
import torch.distributed as dist
from gpt2_eval import load_hellaswag, score_items
from gpt2_eval.ranks import gather_records
from gpt2_model import GPT

model, items, out = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model, rank = GPT.from_pretrained(model), dist.get_rank()
items = [item.rows[name] for item in load_hellaswag(items).items for name in ("karpathy", "lm-eval")]
order = np.random.default_rng(1).permutation(len(items)).tolist()
results = {}
for batch_size, share, shuffled in product((None, 1, 8), (True, False), (False, True)):
    chosen = [items[i] for i in order] if shuffled else items
    scored = score_items(model, chosen, batch_size=batch_size, share_prefixes=share)
    if shuffled:
        scored = [scored[order.index(i)] for i in range(len(items))]
    results[f"{batch_size} {share} {shuffled}"] = [[row.logprob for row in item] for item in scored]
try:
    gather_records({0: 1.0, 1 + rank: 2.0}, 1 + dist.get_world_size())
    doubled = "not noticed"
except RuntimeError as error:
    doubled = str(error)
if rank == 0:
    json.dump({"scores": results, "doubled": doubled}, open(out, "w"))
dist.destroy_process_group()
"""


def torchrun(ranks, *arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return [sys.executable, *launcher, *map(str, arguments)]


@pytest.fixture
def one_thread():
    """The same bits here as under torchrun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_score_changes(model_folder, items_file, environment, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    by_ranks = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        result = subprocess.run(
            torchrun(ranks, worker, model_folder, items_file, out),
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        by_ranks[ranks] = json.loads(out.read_text())
    one = by_ranks[1]["scores"]
    assert by_ranks[2]["scores"] == by_ranks[3]["scores"] == one  # to the bit, each way of batching
    expected = np.array(one["1 False False"])
    assert expected.std() > 1
    for scores in one.values():
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4)
        assert (np.argmax(scores, axis=1) == np.argmax(expected, axis=1)).all()
    assert by_ranks[1]["doubled"] == "not noticed"  # nothing is: one rank has each record once
    for ranks in (2, 3):
        assert f"{1 + ranks} records expected, each once" in by_ranks[ranks]["doubled"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", ["hellaswag", "loss"])
def test_a_killed_command_goes_on_with_other_ranks(
    model_folder, dataset_folder, items_file, environment, tmp_path, command
):
    """SIGKILL of two ranks; three go on, and write the bytes of a run that nobody disturbed."""
    many = tmp_path / "many.jsonl"
    many.write_bytes(items_file.read_bytes() * 12)
    arguments = {
        "hellaswag": ["--data", many, "--batch-size", "1"],
        "loss": ["--data", dataset_folder, "--split", "train", "--seq-len", "4", "--batch-size", "2"],
    }[command]
    common = [command, "-m", model_folder, "-d", "cpu", "--json", *arguments]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    undisturbed = CliRunner().invoke(main, [str(argument) for argument in (*common, "--out", whole)])
    assert undisturbed.exit_code == 0, undisturbed.output

    killed = subprocess.Popen(
        torchrun(2, "-m", "gpt2_eval", *common, "--out", out),
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    kept = [tmp_path / f".out.jsonl.rows-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 100
    while not all(file.is_file() and file.read_bytes().count(b"\n") > 4 for file in kept):
        assert killed.poll() is None, "it was through before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    _kill_all_of(out)
    assert not out.exists()

    result = subprocess.run(
        torchrun(3, "-m", "gpt2_eval", *common, "--out", out),
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # One document, since rank 0 alone prints, and the same but for the time.
    assert json.loads(undisturbed.stdout) | {"seconds": 0} == json.loads(result.stdout) | {"seconds": 0}
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["many.jsonl", "out.jsonl", "whole.jsonl"]


def _kill_all_of(out):
    """torchrun gives each rank a session of its own."""
    for process in os.listdir("/proc"):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if process.isdigit() and str(out).encode() in file.read().split(b"\0"):
                    os.kill(int(process), signal.SIGKILL)
        except OSError:
            pass
