"""With real processes: batch size, order, shared beginnings, ranks and kills change no score; all ranks stop."""

import json
import socket
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from gpt2_data import open_dataset
from gpt2_eval import Interrupted, evaluate_hellaswag, evaluate_loss, load_hellaswag, score_items
from gpt2_eval.cli import main
from gpt2_eval.ranks import gather_records, rank_and_world_size
from gpt2_model import GPT

pytestmark = pytest.mark.slow


def evaluate_all(model, file, data):
    """What one rank of those that run this gets: scores, an error, and how three evaluations ended."""
    model, dataset = GPT.from_pretrained(model), open_dataset(data)
    rank, ranks = rank_and_world_size()
    items = [item.rows[name] for item in load_hellaswag(file).items for name in ("karpathy", "lm-eval")]
    order = np.random.default_rng(1).permutation(len(items))
    scores = {}
    for batch_size, share, shuffled in product((None, 1, 8), (True, False), (False, True)):
        chosen = [items[i] for i in order] if shuffled else items
        if not share:  # each row is an item of its own
            chosen = [[row] for item in chosen for row in item]
        scored = score_items(model, chosen, batch_size=batch_size)
        fours = np.array([row.logprob for item in scored for row in item]).reshape(-1, 4)
        scores[f"{batch_size} {share} {shuffled}"] = (fours[np.argsort(order)] if shuffled else fours).tolist()
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
                stopped.append(evaluate(lambda: asked.append(1) or (rank == told and len(asked) == 2)))  # noqa: B023
            except Interrupted:
                stopped.append(f"interrupted after {len(asked)}")

    def broken() -> bool:
        if rank == ranks - 1:
            raise FileNotFoundError("a shard is gone")
        return False

    try:
        failed = evaluate_loss(model, dataset, tokens=200, seq_len=8, batch_size=2, stop=broken)
    except (OSError, ValueError) as error:
        failed = str(error)
    return {"scores": scores, "doubled": doubled, "stopped": stopped, "failed": failed}


def start(ranks, environment, *arguments, stdout=None):
    """The processes that torchrun would start, without the seconds that it takes itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [shared | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "none"} for rank in range(ranks)]
    command = [sys.executable, *map(str, arguments)]
    return [subprocess.Popen(command, env=one, stdout=stdout, text=True) for one in environments]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same bits here as under torchrun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def by_ranks(model_folder, items_file, dataset_folder, environment):
    """Number of ranks -> what each of them got."""
    arguments = [__file__, model_folder, items_file, dataset_folder]
    processes = start(3, environment, *arguments, stdout=subprocess.PIPE)
    results = {1: [evaluate_all(*arguments[1:])]}
    results[3] = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    return results


def test_no_score_changes(by_ranks):
    one = by_ranks[1][0]["scores"]
    for rank in by_ranks[3]:
        assert rank["scores"] == one  # to the bit, each way of batching
    expected = np.array(one["1 False False"])
    assert expected.std() > 1
    for scores in one.values():
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4)
        assert (np.argmax(scores, axis=1) == np.argmax(expected, axis=1)).all()
    assert by_ranks[1][0]["doubled"] == "not noticed"  # nothing is: one rank has each record once
    assert "4 records expected, each once" in by_ranks[3][0]["doubled"]


def test_all_ranks_stop_when_one_is_told_to(by_ranks):
    """None hangs, none has a number, and the next evaluation of the same ranks is whole and right."""
    outcomes = [rank["stopped"] for rank in by_ranks[3]]
    for told, place in ((0, 0), (2, 3)):
        for rank, lines in enumerate(outcomes):
            asked = [int(line.removeprefix("interrupted after ")) for line in lines[place : place + 3]]
            # The one told stops at its second batch; the others only learn of it at the end.
            assert asked == [2, 2, 2] if rank == told else min(asked) > 2
    assert outcomes[0][6:] == outcomes[1][6:] == outcomes[2][6:]
    np.testing.assert_allclose(outcomes[0][6:], by_ranks[1][0]["stopped"][6:], rtol=1e-12)


def test_a_rank_that_fails_leaves_none_waiting(by_ranks):
    """The kind of pytorch/examples #458: the others would wait for its share for half an hour."""
    assert [rank["failed"] for rank in by_ranks[3]] == ["rank 2: a shard is gone"] * 2 + ["a shard is gone"]


@pytest.mark.parametrize("command", ["hellaswag", pytest.param("loss", marks=pytest.mark.long)])
def test_a_killed_command_resumes_with_other_ranks(
    model_folder, dataset_folder, items_file, environment, tmp_path, command
):
    """SIGKILL of two ranks; torchrun's three go on, and write the bytes of a run that nobody disturbed."""
    many = tmp_path / "many.jsonl"
    many.write_bytes(items_file.read_bytes() * 12)
    arguments = {
        "hellaswag": ["--data", many, "--batch-size", "1"],
        "loss": ["--data", dataset_folder, "--split", "train", "--seq-len", "4", "--batch-size", "2"],
    }[command]
    common = [command, "-m", model_folder, "-d", "cpu", "--json", *arguments]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    killed = start(2, environment, "-m", "gpt2_eval", *common, "--out", out)
    files = [tmp_path / f".out.jsonl.rows-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 100
    while not all(file.is_file() and file.read_bytes().count(b"\n") > 4 for file in files):
        assert killed[0].poll() is None, "it was through before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for process in killed:
        process.kill()
    for process in killed:
        process.wait()
    assert not out.exists()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    resuming = [*torchrun, "-m", "gpt2_eval", *map(str, common), "--out", out]
    resumed = subprocess.Popen(resuming, env=environment, stdout=subprocess.PIPE, text=True)
    undisturbed = CliRunner().invoke(main, [str(argument) for argument in (*common, "--out", whole)])
    assert undisturbed.exit_code == 0, undisturbed.output
    document, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0
    # One document, since rank 0 alone prints, and the same but for the time.
    assert json.loads(undisturbed.stdout) | {"seconds": 0} == json.loads(document) | {"seconds": 0}
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["many.jsonl", "out.jsonl", "whole.jsonl"]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps(evaluate_all(*sys.argv[1:])))
    dist.destroy_process_group()
