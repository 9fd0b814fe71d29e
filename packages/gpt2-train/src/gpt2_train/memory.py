"""How much memory a step takes, from what autograd keeps; and the largest micro-batch that there is room for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2_model import GPTConfig, attention
from gpt2_model.head_loss import ROWS
from gpt2_train.config import TrainConfig, micro_batches
from gpt2_train.distributed import World
from gpt2_train.space import matrix_parameters, optimizer_bytes

# Elsewhere than on CUDA memory is shared with everything else, and 4,096 tokens keep two cores as busy as more do.
MOST_TOKENS = 4096
PROGRAM = (
    270_000_000  # Python, torch, the libraries of this package, and a step's small tensors: measured on Linux
)
CUDA_CONTEXT = 600_000_000  # of the driver, cuBLAS and cuDNN on the device
# The heap of a CPU run is never given back, and small tensors settle where the gradient of a token embedding was:
# holes of so many of these, measured with 124M and micro-batches of 256 to 4,096 tokens.
HOLES = 4.5


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, part by part; on a CPU the device's memory is the host's."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass of a micro-batch needs, and under autocast the weights in bf16."""
    head: int
    """Logits or blocks of them, the loss, and the gradients of the output projection and the token embedding."""
    heap: int
    """Holes between tensors, which the allocator cannot use."""
    checkpoint_copy: int
    """Of weights and optimizer state, in the memory of rank 0's host, from the first checkpoint on."""
    program: int
    on_host: bool
    """Whether the device is the host."""

    @property
    def device_bytes(self) -> int:
        """On the accelerator; without one, 0."""
        return 0 if self.on_host else self._step + CUDA_CONTEXT

    @property
    def host_bytes(self) -> int:
        """On the host of rank 0; other ranks have no `checkpoint_copy`."""
        return self.checkpoint_copy + self.program + (self._step if self.on_host else 0)

    def needed_on_host(self) -> int:
        """Of all processes on this machine, rank 0 among them."""
        step = 0 if self.on_host else self.device_bytes  # MPS shares the host's memory
        return processes_here() * (self.host_bytes - self.checkpoint_copy + step) + self.checkpoint_copy

    @property
    def _step(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.heap


def peak_memory(
    config: TrainConfig, shape: GPTConfig, micro_batch: int, world_size: int, device_type: str, compiled: bool,
    precision: str,
) -> Memory:  # fmt: skip
    """The peak of training with micro-batches of `micro_batch` sequences, on each of `world_size` processes.

    Counted from the tensors that autograd keeps (torch.autograd.graph.saved_tensors_hooks lists them).

    Args:
        device_type: "cpu", "cuda" or "mps". CPU figures are held to 10 % by a test; those of others are counted in
            the same way, and measured by `choose_micro_batch` where it matters.
        precision: "fp32" or "bf16".
    """
    rows, half = micro_batch * config.seq_len, precision == "bf16"
    embedding = 4 * shape.vocab_size * shape.n_embd
    own_attention = half and attention.takes_own(device_type, torch.bfloat16, config.seq_len)
    layer = _layer_bytes(shape, half, own_attention, config.seq_len)
    kept = shape.n_layer * layer
    if config.activation_checkpointing:  # each block keeps its input; one at a time has all the rest
        kept = shape.n_layer * 4 * shape.n_embd + layer
    weights, gradients = 4 * shape.num_parameters, 4 * shape.num_parameters
    on_host = device_type == "cpu"
    if on_host:
        # The gradient of the projection, to which the embedding's is added; and a block of logits.
        # In fp32 the padded copy of the projection; in bf16 it is one of those of all matrices, below.
        size = 2 if half else 4
        head = embedding + rows * 4 * shape.n_embd + min(rows, ROWS) * shape.vocab_size * size
        head += 0 if half else embedding
    else:
        # Compiled, logits and their gradient stay in the precision of the product. Else there are the softmax, its
        # gradient and that of the logits, in fp32.
        head = embedding + rows * shape.vocab_size * ((4 if half else 8) if compiled else 12)
    if on_host and world_size == 1 and micro_batch * config.seq_len == config.batch_tokens:
        # One micro-batch a step: the gradients come as the activations go. DDP's buckets stay.
        gradients = embedding
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer_bytes(config, shape, world_size),
        activations=rows * kept + (2 * matrix_parameters(shape) if half else 0),
        head=head,
        heap=int(HOLES * embedding) if on_host else 0,
        checkpoint_copy=weights + optimizer_bytes(config, shape, 1),
        program=PROGRAM,
        on_host=on_host,
    )


def _layer_bytes(shape: GPTConfig, half: bool, own_attention: bool, time: int) -> int:
    """What a block keeps of a token for the backward pass.

    In fp32: the inputs and outputs of both norms, queries, keys, values, the attention's output, and of the MLP's
    middle what goes into the activation and what comes out. In bf16: the norms' inputs stay fp32, and the
    attention's output is there twice, as it came and as it goes into the projection. Besides, the norms' means and
    deviations, and a logarithm for each head. Flash attention keeps no matrix of scores; ours keeps, on a CPU in
    bf16, that of probabilities, and not its output.
    """
    width, inner = shape.n_embd, shape.mlp_dim
    if own_attention:
        probabilities = shape.n_head * attention.kept_bytes(time) // time
        return 2 * 4 * width + 2 * (6 * width + 2 * inner) + 4 * 4 + probabilities
    tensors = 2 * 4 * width + 2 * (7 * width + 2 * inner) if half else 4 * (8 * width + 2 * inner)
    return tensors + 4 * (4 + shape.n_head)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that a process may still take: what the kernel counts as free, within its cgroup.

    Without /proc (macOS) all the memory that there is, since nothing tells how much is free.
    """
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit of any group above counts. In a container the path is the host's, and only its end is there.
        inside = base / group.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(base):
                free = min(free, _left_in_group(folder, *names))
    return free


def _left_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    try:
        most = int((folder / limit).read_text())  # "max" is none
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**63
    return max(0, most - used + int(stat.get(reclaimable, 0)))  # cached files make room when asked


def most_that_fit(
    config: TrainConfig, shape: GPTConfig, world_size: int, device_type: str, compiled: bool, precision: str,
    free: float,
) -> int:  # fmt: skip
    """The largest micro-batch, in sequences, that the estimate has room for in `free` bytes; 0 if none.

    Raises:
        ValueError: the batch does not divide over the processes.
    """
    _, rows = micro_batches(replace(config, micro_batch="1"), world_size, 1)
    most = rows if device_type == "cuda" else max(1, MOST_TOKENS // config.seq_len)
    for micro_batch in (n for n in range(min(rows, most), 0, -1) if rows % n == 0):
        memory = peak_memory(config, shape, micro_batch, world_size, device_type, compiled, precision)
        if (memory.device_bytes if device_type == "cuda" else memory.needed_on_host()) <= free:
            return micro_batch
    return 0


def choose_micro_batch(
    config: TrainConfig, shape: GPTConfig, world: World, try_one: Callable[[int], None] | None, *, compiled: bool,
    precision: str, reserve: int = 0,
) -> int:  # fmt: skip
    """Sequences that a process computes at once: `config.micro_batch`, or for "auto" the most that fit.

    All processes get the same number: the least that any of them has room for.

    Args:
        try_one: one forward and backward pass of n sequences, without any exchange between processes: one that
            runs out of memory would leave the others waiting. It is called twice for each number, the second time
            beside the gradients of the first, which are the caller's to clear in the end. Numbers are tried from
            somewhat more than the estimate has room for, downwards. None: the estimate is believed, as it must be
            where the system kills what needs too much memory.
        reserve: bytes of the device to keep free in the trials for what is not there yet: the optimizer's state.

    Raises:
        ValueError: the batch does not divide over the processes or into micro-batches, or not even one sequence
            runs; says what would do.
    """
    if config.micro_batch != "auto":
        return micro_batches(config, world.size, 1)[0]
    kind = world.device.type
    optimism = 1.0 if try_one is None else 1.2
    largest = most_that_fit(config, shape, world.size, kind, compiled, precision, optimism * _free(world, shape))
    largest = _least(world, max(1, largest))
    rows = config.batch_tokens // (config.seq_len * world.size)
    if try_one is None:
        return largest
    kept_free = torch.empty(reserve, dtype=torch.uint8, device=world.device)
    for micro_batch in (n for n in range(largest, 0, -1) if rows % n == 0):
        if _least(world, _runs(try_one, micro_batch)):
            return micro_batch
    del kept_free
    raise ValueError(
        f"not even one sequence of {config.seq_len:,} tokens fits into the memory of {world.device}: use "
        "--activation-checkpointing, a shorter --seq-len or a smaller model, or share the optimizer's state out "
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


def _least(world: World, number: int) -> int:
    least = torch.tensor([number], device=world.device)
    if world.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def _free(world: World, shape: GPTConfig) -> float:
    """Bytes for the whole of a run on this process's device: what is free, and what the run itself has taken."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0] + torch.cuda.memory_reserved(world.device) + CUDA_CONTEXT
    return available_memory() + processes_here() * (PROGRAM + 4 * shape.num_parameters)


def processes_here() -> int:
    """Processes of the run on this machine, which share its memory: torchrun says how many."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
