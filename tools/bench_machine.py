"""What the machine itself reaches: beside it a speed means something on any machine."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import bench_contenders

COPY_BYTES, HASH_BYTES, CUDA_BYTES = 256 << 20, 32 << 20, 1 << 30
CPU_SIDE, CUDA_SIDE = 2048, 8192  # of the square matrices


class Machine:
    """Rates that one process's threads and device reach: of each the best of a few tries, 0.1 s or so."""

    def __init__(self, folder: Path, threads: int, device: str) -> None:
        self.folder, self.threads, self.device = folder, threads, device

    def rate(self, name: str) -> float:
        """Of "matrix fp32" and "matrix bf16" operations a second; of "read", "copy", "sha256" bytes."""
        measure: Callable[[], float] = getattr(self, name.replace(" ", "_"))
        return measure()

    @cached_property
    def matrix_fp32(self) -> Callable[[], float]:
        import torch

        return self._matrix(torch.float32)

    @cached_property
    def matrix_bf16(self) -> Callable[[], float]:
        import torch

        return self._matrix(torch.bfloat16)

    @cached_property
    def read(self) -> Callable[[], float]:
        if self.device == "cuda":
            import torch

            buffer = torch.ones(CUDA_BYTES // 4, dtype=torch.int32, device="cuda")
            return partial(self._fastest, CUDA_BYTES, buffer.max)
        bench_contenders.open_memory(self.folder, self.threads)
        return lambda: 1e9 * bench_contenders.read_memory()

    @cached_property
    def copy(self) -> Callable[[], float]:
        import numpy as np

        source, target = np.ones(COPY_BYTES, np.int8), np.ones(COPY_BYTES, np.int8)
        return partial(self._fastest, COPY_BYTES, lambda: np.copyto(target, source))

    @cached_property
    def sha256(self) -> Callable[[], float]:
        pool, buffers = ThreadPoolExecutor(self.threads), [bytes(HASH_BYTES)] * self.threads
        return partial(self._fastest, HASH_BYTES * self.threads, lambda: list(pool.map(hashlib.sha256, buffers)))

    def _matrix(self, kind: Any) -> Callable[[], float]:
        import torch

        side = CUDA_SIDE if self.device == "cuda" else CPU_SIDE
        left, right = (torch.randn(side, side, device=self.device).to(kind) for _ in "ab")
        return partial(self._fastest, 2.0 * side**3, lambda: left @ right)

    def _fastest(self, amount: float, call: Callable[[], object]) -> float:
        """`amount` over the seconds of the fastest of three calls."""
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            call()
            if self.device == "cuda":
                import torch

                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return amount / best
