"""The estimate of memory: against what autograd keeps, against a real run, and the micro-batch that follows."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fork_server import start_ranks

import gpt2_train.memory
from gpt2_model import GPT, PRESETS, GPTConfig
from gpt2_train import TrainConfig, World, make_optimizer
from gpt2_train.memory import available_memory, choose_micro_batch, most_that_fit, peak_memory
from gpt2_train.optimizer import optimizer_bytes

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 300}


def kept_bytes(shape: GPTConfig, precision: str, rows: int = 2) -> int:
    """Bytes of what autograd keeps of a forward pass, weights left out."""
    model, storages = GPT(shape), {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(rows, shape.block_size, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(tokens, tokens, return_logits=False)
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("other", [{"n_layer": 5, "n_inner": 256}, {"n_layer": 3, "n_inner": 96}])
def test_activations_are_what_autograd_keeps(precision, other) -> None:
    """To the byte: what three or one more layers add is what the estimate says they add."""
    kept, estimated = [], []
    for layers in (2, other["n_layer"]):
        model = {**SMALL, **other, "n_layer": layers}
        config = TrainConfig(batch_tokens=64, seq_len=32, model=model, precision=precision)
        kept.append(kept_bytes(config.model_config, precision))
        estimated.append(peak_memory(config, 2, 1, "cpu").activations)
    assert kept[1] - kept[0] == estimated[1] - estimated[0] > 0


def test_optimizer_state_is_what_the_optimizer_has() -> None:
    shape = GPTConfig(**SMALL)
    model = GPT(shape)
    optimizer = make_optimizer(model, lr=1.0)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens)[1].backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    small = TrainConfig(seq_len=32, model=SMALL)
    assert optimizer_bytes(small, 1) == moments
    # Muon keeps one tensor instead of two for the blocks' matrices, 12 n_embd^2 parameters a block.
    assert optimizer_bytes(replace(small, optimizer="muon"), 1) == moments - 4 * 2 * 12 * 64**2
    # A shared out state is not less than its largest tensor.
    whole, shared = TrainConfig(), TrainConfig(shard_optimizer=True)
    assert optimizer_bytes(shared, 2) == 4 * PRESETS["124M"].num_parameters
    assert optimizer_bytes(shared, 64) == 8 * 50257 * 768
    assert optimizer_bytes(whole, 64) == 8 * PRESETS["124M"].num_parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [{"n_layer": 6, "n_embd": 512, "n_head": 8}, pytest.param({}, marks=pytest.mark.long)],
    ids=["45M", "124M"],
)
def test_estimate_is_within_a_tenth_of_a_real_run(dataset, tmp_path, model) -> None:
    """On the CPU: peak resident memory of two steps, of which the second is beside the first one's checkpoint."""
    settings = {
        "data": str(dataset), "out": str(tmp_path / "run"), "steps": 2, "batch_tokens": 256, "seq_len": 256,
        "micro_batch": "1", "precision": "fp32", "device": "cpu", "eval_every": 0, "checkpoint_every": 1,
        "model": model, "hang_seconds": 0.0,  # a busy machine takes its time
    }  # fmt: skip
    code = (
        "import re, sys; from pathlib import Path; from gpt2_train import TrainConfig, train; "
        f"train(TrainConfig(**{settings!r})); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = peak_memory(TrainConfig(**settings), 1, 1, "cpu")
    assert memory.host_bytes == pytest.approx(1024 * int(done.stdout), rel=0.1)


def memory_files(root, *, available_kb: int = 8_000_000, groups: str = "", **files: str):
    """A /proc and a /sys as Linux has them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kb} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: str, used: int, cached: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return {
        f"{folder}/{names[0]}": limit, f"{folder}/{names[1]}": str(used),
        f"{folder}/memory.stat": f"anon 1\n{names[2]} {cached}\n",
    }  # fmt: skip


def test_available_memory_obeys_cgroups(tmp_path) -> None:
    bare = memory_files(tmp_path / "bare", groups="0::/\n")
    assert available_memory(bare) == 8_000_000 * 1024
    # A limit further up counts; files in the cache make room.
    nested = group("a/b", "max", 9, 0) | group("a", "3000000", 2500000, 500000)
    assert available_memory(memory_files(tmp_path / "v2", groups="0::/a/b\n", **nested)) == 1_000_000
    old = group("memory/a", "4000000", 3000000, 0, version=1)
    assert available_memory(memory_files(tmp_path / "v1", groups="4:cpu:/\n3:memory:/a\n", **old)) == 1_000_000
    # In a container the path is the host's, and its files are those of the root.
    inside = group(".", "2000000", 0, 0)
    assert available_memory(memory_files(tmp_path / "in", groups="0::/docker/abc\n", **inside)) == 2_000_000
    assert available_memory(tmp_path / "macos") > 2**28


SETTINGS = TrainConfig(batch_tokens=24 * 32, seq_len=32, model=SMALL)
OF_124M = TrainConfig(batch_tokens=16 * 1024)
CPU = World(0, 1, torch.device("cpu"))


def fails_above(limit: int, tried: list[int]):
    def try_one(number: int) -> None:
        tried.append(number)
        if number > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return try_one


def test_micro_batch_is_the_largest_divisor_that_runs() -> None:
    tried: list[int] = []
    assert choose_micro_batch(SETTINGS, CPU, fails_above(7, tried)) == 6
    assert tried == [24, 12, 8, 6, 6]  # twice what fits: the second time beside gradients
    # One that is given is not tried.
    assert choose_micro_batch(replace(SETTINGS, micro_batch="8"), CPU, fails_above(0, tried)) == 8
    assert len(tried) == 5
    message = "not even one sequence of 32 tokens fits .* use --activation-checkpointing"
    with pytest.raises(ValueError, match=message):
        choose_micro_batch(SETTINGS, CPU, fails_above(0, []))


def test_without_trials_the_estimate_decides(monkeypatch) -> None:
    def needed(micro_batch: int) -> int:
        memory = peak_memory(OF_124M, micro_batch, 1, "cpu")
        return memory.host_bytes - gpt2_train.memory.PROGRAM - memory.weights  # these are there already

    for free, expected in ((10**12, 4), (needed(2), 2), (needed(2) - 1, 1), (0, 1)):
        monkeypatch.setattr(gpt2_train.memory, "available_memory", lambda free=free: free)
        assert choose_micro_batch(OF_124M, CPU, None) == expected


def test_two_processes_on_a_machine_share_its_memory(monkeypatch) -> None:
    memory = peak_memory(OF_124M, 4, 2, "cpu")
    both = 2 * (memory.host_bytes - memory.checkpoint_copy) + memory.checkpoint_copy
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [most_that_fit(OF_124M, 2, "cpu", free) for free in (both, both - 1)] == [4, 2]


def test_ranks_agree_on_what_fits_on_all(tmp_path) -> None:
    fault = ("agree_on_micro_batches", {"path": str(tmp_path / "chosen"), "limits": [(24, 5), (3, 24), (24, 24)]})
    children = start_ranks(None, tmp_path / "log", 2, [fault])
    assert [child.wait() for child in children] == [0, 0]
    assert [json.loads((tmp_path / f"chosen.{rank}").read_text()) for rank in (0, 1)] == [[4, 3, 24]] * 2
