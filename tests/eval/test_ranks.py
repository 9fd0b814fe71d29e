"""With real processes: batch size, order, shared beginnings, ranks and kills change no score; all ranks stop."""

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
import json, sys
from itertools import product
import numpy as np
import torch
import torch.distributed as dist
from gpt2_data import open_dataset
from gpt2_eval import Interrupted, evaluate_hellaswag, evaluate_loss, load_hellaswag, score_items
from gpt2_eval.ranks import gather_records
from gpt2_model import GPT

model, file, data, out = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model, dataset = GPT.from_pretrained(model), open_dataset(data)
rank, ranks = dist.get_rank(), dist.get_world_size()
items = [item.rows[name] for item in load_hellaswag(file).items for name in ("karpathy", "lm-eval")]
order = np.random.default_rng(1).permutation(len(items)).tolist()
scores = {}
for batch_size, share, shuffled in product((None, 1, 8), (True, False), (False, True)):
    chosen = [items[i] for i in order] if shuffled else items
    scored = score_items(model, chosen, batch_size=batch_size, share_prefixes=share)
    if shuffled:
        scored = [scored[order.index(i)] for i in range(len(items))]
    scores[f"{batch_size} {share} {shuffled}"] = [[row.logprob for row in item] for item in scored]
try:
    gather_records({0: 1.0, 1 + rank: 2.0}, 1 + ranks)
    doubled = "not noticed"
except RuntimeError as error:
    doubled = str(error)
stopped = []
for told in (0, ranks - 1, None):  # the rank that is told to stop, at its second batch; the others go on
    for evaluate in (
        lambda stop: sum(item[0].logprob for item in score_items(model, items, batch_size=4, stop=stop)),
        lambda stop: evaluate_hellaswag(model, file, batch_size=4, stop=stop).metrics["karpathy"]["acc"].value,
        lambda stop: evaluate_loss(model, dataset, seq_len=64, batch_size=1, stop=stop).loss,
    ):
        asked = []
        try:
            stopped.append(evaluate(lambda: asked.append(1) or (rank == told and len(asked) == 2)))
        except Interrupted:
            stopped.append(f"interrupted after {len(asked)}")
everyones = [None] * ranks
dist.all_gather_object(everyones, stopped)
if rank == 0:
    json.dump({"scores": scores, "doubled": doubled, "stopped": everyones}, open(out, "w"))
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


@pytest.fixture(scope="module")
def by_ranks(model_folder, items_file, dataset_folder, environment, tmp_path_factory):
    """Number of ranks -> what they wrote."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}
    (folder / "worker.py").write_text(WORKER)
    for ranks in (1, 3):
        out = folder / f"{ranks}.json"
        result = subprocess.run(
            torchrun(ranks, folder / "worker.py", model_folder, items_file, dataset_folder, out),
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        results[ranks] = json.loads(out.read_text())
    return results


def test_no_score_changes(by_ranks):
    one = by_ranks[1]["scores"]
    assert by_ranks[3]["scores"] == one  # to the bit, each way of batching
    expected = np.array(one["1 False False"])
    assert expected.std() > 1
    for scores in one.values():
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4)
        assert (np.argmax(scores, axis=1) == np.argmax(expected, axis=1)).all()
    assert by_ranks[1]["doubled"] == "not noticed"  # nothing is: one rank has each record once
    assert "4 records expected, each once" in by_ranks[3]["doubled"]


def test_all_ranks_stop_when_one_is_told_to(by_ranks):
    """None hangs, none has a number, and the next evaluation of the same ranks is whole and right."""
    outcomes = by_ranks[3]["stopped"]
    for told, place in ((0, 0), (2, 3)):
        for rank, lines in enumerate(outcomes):
            asked = [int(line.removeprefix("interrupted after ")) for line in lines[place : place + 3]]
            # The one told stops at its second batch; the others only learn of it at the end.
            assert asked == [2, 2, 2] if rank == told else min(asked) > 2
    assert outcomes[0][6:] == outcomes[1][6:] == outcomes[2][6:]
    np.testing.assert_allclose(outcomes[0][6:], by_ranks[1]["stopped"][0][6:], rtol=1e-12)


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
