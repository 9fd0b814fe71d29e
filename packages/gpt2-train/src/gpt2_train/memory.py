"""How much memory a step takes, the largest micro-batch that fits, and the disk space of the checkpoints."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2_model import GPT
from gpt2_train.config import TrainConfig, divisors, existing, micro_batches, sequences
from gpt2_train.distributed import World
from gpt2_train.optimizer import optimizer_bytes

# Without CUDA, memory is shared with everything else, and 4,096 tokens keep two cores as busy as more tokens do.
MOST_TOKENS = 4096
# Python, torch, the libraries of this package, and a step's small tensors: measured on Linux.
PROGRAM = 270_000_000
FILES_BYTES = 4_000_000  # what a checkpoint has besides its tensors: vocabulary, settings, hashes
# A cgroup's limit and usage, and in its memory.stat the cached files, which the kernel drops when it needs room.
CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
ASSUMED_GPU_BYTES = 80_000_000_000  # for a plan made where there is no GPU
CUDA_CONTEXT = 600_000_000  # what the driver, cuBLAS and cuDNN take on the device


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, part by part; on a CPU the device's memory is the host's."""

    weights: int  # in fp32
    gradients: int  # as much again, or less if activations are freed meanwhile
    optimizer: int  # this process's share of the optimizer's state
    activations: int  # what the backward pass of a micro-batch needs, and under autocast the weights in bf16
    head: int  # logits or blocks of them, the loss, and the gradients of output projection and token embedding
    heap: int  # holes between tensors that the allocator cannot use
    checkpoint_copy: int  # weights and optimizer state on rank 0's host, from the first checkpoint on
    program: int  # Python, torch and the libraries
    device_bytes: int  # on the accelerator; without one, 0
    host_bytes: int  # on the host of rank 0; other ranks have no `checkpoint_copy`

    def needed_on_host(self) -> int:
        """Return the bytes of all processes on rank 0's machine; with MPS the device's memory is the host's."""
        copy = self.checkpoint_copy
        return processes_here() * (self.host_bytes - copy + self.device_bytes) + copy


def peak_memory(config: TrainConfig, micro_batch: int, world_size: int, device_type: str) -> Memory:
    """Return the peak of training with `micro_batch` sequences at once on each of `world_size` processes.

    CPU figures are held to 10 % by a test; those of other devices ("cuda", "mps") are counted in the same way, and
    measured by `choose_micro_batch` where it matters. Here and below `config.precision` must not be "auto".
    """
    shape = config.model_config
    blocks, head, heap = GPT.activation_bytes(
        shape, micro_batch, config.seq_len, device_type=device_type, bf16=config.precision == "bf16",
        compiled=config.compiles(device_type), checkpointing=config.activation_checkpointing,
    )  # fmt: skip
    weights = gradients = 4 * shape.num_parameters
    on_host = device_type == "cpu"
    if on_host and world_size == 1 and micro_batch * config.seq_len == config.batch_tokens:
        # One micro-batch a step: activations are freed as gradients are made. DDP's buckets stay allocated.
        gradients = 4 * shape.vocab_size * shape.n_embd
    optimizer, copy = optimizer_bytes(config, world_size), weights + optimizer_bytes(config, 1)
    step = weights + gradients + optimizer + blocks + head + heap
    return Memory(
        weights=weights, gradients=gradients, optimizer=optimizer, activations=blocks, head=head, heap=heap,
        checkpoint_copy=copy, program=PROGRAM, device_bytes=0 if on_host else step + CUDA_CONTEXT,
        host_bytes=copy + PROGRAM + (step if on_host else 0),
    )  # fmt: skip


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that a process may still take; without /proc (macOS), of all memory."""
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        base, names = root / "sys/fs/cgroup", CGROUP_2
        if "memory" in controllers.split(","):
            base, names = base / "memory", CGROUP_1
        elif controllers:
            continue
        # The limits of all groups above count. A container's path may be the host's, with folders not seen here.
        inside = base / group.lstrip("/")
        for folder in (inside, *inside.parents):
            with suppress(OSError, ValueError):  # no such file, or "max", which is no limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, max(0, limit - used + int(stat.get(names[2], 0))))
    return free


def free_memory(device: torch.device, here: bool = True) -> tuple[int | None, int]:
    """Return the free bytes of a GPU (None for other devices), and those of the host."""
    free = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] if here else ASSUMED_GPU_BYTES
    return free, available_memory()


def check_memory(
    config: TrainConfig, micro_batch: int, world_size: int, device_type: str, free: tuple[int | None, int]
) -> None:
    """Raise ValueError if a step surely does not fit, with the flags that would make it fit."""

    def lacking(config: TrainConfig, micro_batch: int) -> str:
        peak = peak_memory(config, micro_batch, world_size, device_type)
        needed, room, where = peak.needed_on_host(), free[1], "this machine's"
        # A GPU's kernels may need less than is estimated: where it is close, the run itself finds out.
        if free[0] is not None and peak.device_bytes > 1.2 * free[0]:
            needed, room, where = peak.device_bytes, free[0], "the GPU's"
        text = f"the run needs about {in_gb(needed)} of {where} memory, and {in_gb(room)} are free"
        return text if needed > room else ""

    if problem := lacking(config, micro_batch):
        lean = replace(config, activation_checkpointing=True)
        choices = {
            f"--micro-batch {micro_batch // 2}": (config, micro_batch // 2), "--micro-batch 1": (config, 1),
            "--activation-checkpointing": (lean, micro_batch),
            "--activation-checkpointing --micro-batch 1": (lean, 1),
            "--shard-optimizer": (replace(config, shard_optimizer=world_size > 1), micro_batch),
        }  # fmt: skip
        fits = [flags for flags, (other, size) in choices.items() if size and not lacking(other, size)]
        raise ValueError(f"{problem}: use {' or '.join([*fits[:2], 'a smaller model'])}")


def most_that_fit(config: TrainConfig, world_size: int, device_type: str, free: float) -> int:
    """Return the largest micro-batch, in sequences, whose estimate fits into `free` bytes; 0 if none does."""
    rows = sequences(config, world_size)
    most = rows if device_type == "cuda" else min(rows, max(1, MOST_TOKENS // config.seq_len))
    for micro_batch in divisors(rows, most):
        memory = peak_memory(config, micro_batch, world_size, device_type)
        if (memory.device_bytes if device_type == "cuda" else memory.needed_on_host()) <= free:
            return micro_batch
    return 0


def choose_micro_batch(config: TrainConfig, world: World, try_one: Callable[[int], None] | None) -> int:
    """Return the sequences that a process computes at once: `config.micro_batch`, or for "auto" the most that fit.

    All processes get the same number: the least that any of them has room for. `try_one` does a forward and
    backward pass of n sequences, without any exchange: a process that runs out of memory would leave the others
    waiting. It is called twice for each number, the second time beside the gradients of the first. Without it we
    trust the estimate, as we must where the system kills a process that needs too much.

    Raises ValueError if the batch does not divide evenly, or not even one sequence runs.
    """
    if config.micro_batch != "auto":
        return micro_batches(config, world.size, 1)[0]
    device = world.device
    if device.type == "cuda":
        free, taken = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    else:
        free = available_memory()
        taken = processes_here() * (PROGRAM + 4 * config.model_config.num_parameters)
    room = (free + taken) * (1.0 if try_one is None else 1.2)
    most = min(world.gather(max(1, most_that_fit(config, world.size, device.type, room))))
    if try_one is None:
        return most
    # The optimizer's state does not exist yet: its bytes are reserved during the trials.
    _reserved = torch.empty(optimizer_bytes(config, world.size), dtype=torch.uint8, device=device)
    for micro_batch in divisors(sequences(config, world.size), most):
        if all(world.gather(_runs(try_one, micro_batch))):
            return micro_batch
    raise ValueError(
        f"not even one sequence of {config.seq_len:,} tokens fits into the memory of {device}: use "
        "--activation-checkpointing, a shorter --seq-len or a smaller model, or spread the optimizer's state "
        "over more processes with --shard-optimizer"
    )


def _runs(try_one: Callable[[int], None], micro_batch: int) -> bool:
    try:
        try_one(micro_batch)
        try_one(micro_batch)
        return True
    except torch.OutOfMemoryError:
        pass  # the error holds the tensors of the failed pass as long as it is handled
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    return False


def processes_here() -> int:
    """Return how many processes of the run share this machine's memory, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return the size of a checkpoint: 12 bytes a parameter with AdamW, and the vocabulary's files."""
    return 4 * config.model_config.num_parameters + optimizer_bytes(config, 1) + FILES_BYTES


def checkpoints_at_once(config: TrainConfig) -> int:
    """Return the most checkpoints on the disk at once: those to keep, and one written before the oldest goes."""
    written = -(-config.steps // config.checkpoint_every) if config.checkpoint_every else 1
    return min(config.keep + 1, written)


def check_space(config: TrainConfig) -> None:
    """Raise OSError if the checkpoints that will exist at once do not fit on the disk of the run's folder."""
    run, each, number = Path(config.out), checkpoint_bytes(config), checkpoints_at_once(config)
    # The run's existing checkpoints count as free: they are deleted as new ones are written.
    own = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    free = shutil.disk_usage(existing(run)).free
    if number * each > free + own:
        needed = f"{in_gb(number * each)} for {number} checkpoints of {in_gb(each)}"
        beside = f" besides the {in_gb(own)} it has" if own else ""
        keep = int((free + own) // each) - 1
        advice = "free some, or choose another --out" + f" or --keep {keep}" * (1 <= keep < config.keep)
        raise OSError(f"{run} will need {needed}, and {in_gb(free)} are free{beside}: {advice}")


def in_gb(size: float) -> str:
    """Return bytes as "1.50 GB", small ones as "12.3 MB"."""
    if size < 0.1e9:
        return f"{size / 1e6:,.1f} MB"
    return f"{size / 1e9:,.2f} GB" if size < 99.5e9 else f"{size / 1e9:,.0f} GB"
