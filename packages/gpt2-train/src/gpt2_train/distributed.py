"""The processes of a run: which one this is, on which device, and the few values that they exchange."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gpt2_eval import join_ranks, read_ranks
from gpt2_model.command import find_device, keep_buffers
from gpt2_train.faults import StopSignal, write_stderr

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """One process among `size`, over all nodes.

    Attributes:
        rank: this process, 0 to size - 1; rank 0 writes files and messages.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` up over all processes, in place. (Gloo has no mean: divide by size.)"""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0; return its result, or raise its error, on every rank: none is left waiting."""
        if self.size == 1:
            return work()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [work()]
            except (ValueError, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, device=self.device)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Return, on every rank, the values of all ranks in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def collect(self, own: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors, each held by one rank or by all, into rank 0's. All ranks call it, with all names."""
        owners: dict[str, int] = {}
        for rank, names in enumerate(self.gather(sorted(own))):
            for name in names:
                owners.setdefault(name, rank)
        for name, target in into.items():
            if self.is_main and owners[name] == 0:
                target.copy_(own[name], non_blocking=True)
            elif self.is_main:
                received = torch.empty(target.shape, dtype=target.dtype, device=self.device)
                dist.recv(received, src=owners[name])
                target.copy_(received)
            elif owners[name] == self.rank:
                dist.send(own[name].contiguous(), dst=0)


def start(device: str = "auto", *, deterministic: bool = False, stop: StopSignal | None = None) -> World | None:
    """Join the run that torchrun started, or be its only process. Raises ValueError if there is no such device.

    It uses NCCL on CUDA, gloo elsewhere. A rank that waits ten minutes for the others gives up with an error; one
    that gets a signal meanwhile says so and returns None. With `deterministic` CUDA uses only kernels whose sums
    have one order: a resumed run ends with the same bits.
    """
    rank, size = read_ranks()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    where = find_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    elif where.type == "cpu":
        keep_buffers()
    stop = stop or StopSignal()
    backend = "nccl" if where.type == "cuda" else "gloo"
    if size > 1 and not join_ranks(backend, PATIENCE, "gpt2-train", lambda: stop.number > 0):
        write_stderr(f"stopped by signal {stop.number} while it waited for the other ranks\n")
        return None
    return World(rank, size, where)


def data_parallel(model: torch.nn.Module, compression: str) -> DistributedDataParallel:
    """Return a model whose backward averages gradients over all processes; "bf16" rounds what is sent."""
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compression == "bf16":
        parallel.register_comm_hook(None, _in_bf16)
    return parallel


def _in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Call torch's hook. Under its own name DDP refuses it without NCCL, though gloo can add bf16 as well."""
    return bf16_compress_hook(group, bucket)


def gradient_bytes_sent(parameters: int, processes: int, compression: str) -> int:
    """Return the bytes each process sends in a step, and receives: 2 (n - 1) / n of all, in a ring."""
    return 2 * (processes - 1) * parameters * {"none": 4, "bf16": 2}[compression] // processes


def stop(world: World) -> None:
    """Leave the run; all ranks must call this. Without it NCCL warns, and may hang, at exit."""
    if world.size > 1:
        dist.destroy_process_group()


def choose_precision(asked: str, device: torch.device | None) -> str:
    """Return "fp32" or "bf16"; for "auto" bf16 where the processor multiplies such matrices itself.

    A device that is not here (None) is assumed to do so. On a CPU that does not, torch emulates bf16: 44 GFLOP/s
    instead of 166 in fp32, measured on two AVX-512 cores.
    """
    if asked != "auto" or device is None:
        return "bf16" if asked == "auto" else asked
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.11
        has_bf16 = device.type == "cpu" and any(map(abilities.get, ("amx_bf16", "avx512_bf16", "bf16")))
    return "bf16" if has_bf16 else "fp32"
