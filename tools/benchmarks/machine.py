"""What the machine is, and what it reaches itself: beside that a speed means something on any machine."""

import hashlib
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

READ_BYTES, COPY_BYTES, HASH_BYTES = 512 << 20, 256 << 20, 32 << 20
FEATURES = {"sha_ni", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "i8mm", "bf16"}


def processor() -> dict[str, Any]:
    """The system, the processor's name, its cores, and which of FEATURES it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": sorted(FEATURES & {*flags}),
    }


def rate(name: str, threads: int, device: str) -> float:
    """The best of a few tries of 0.1 s: operations a second of "matrix fp32" or "matrix bf16", else bytes.

    "read" and "copy" are of memory, "sha256" of a hash on each thread.
    """
    amount, call = _ready(name, threads, device)
    best = float("inf")
    for _ in range(16 if name == "read" else 3):
        started = time.perf_counter()
        call()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return amount / best


@cache
def _ready(name: str, threads: int, device: str) -> tuple[float, Callable[[], object]]:
    """What a call does, and the call."""
    import numpy as np

    if name == "copy":
        source, target = np.ones(COPY_BYTES, np.int8), np.ones(COPY_BYTES, np.int8)
        return COPY_BYTES, lambda: np.copyto(target, source)
    if name == "sha256":
        pool, buffers = ThreadPoolExecutor(threads), [bytes(HASH_BYTES)] * threads
        return threads * HASH_BYTES, lambda: list(pool.map(hashlib.sha256, buffers))
    import torch

    if name == "read":
        # NumPy asks for large pages, which read faster. torch.dot reads as fast as a loop in C with prefetching:
        # 36.6 and 35.6 GB/s on two cores.
        memory = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32)).to(device)
        return READ_BYTES, lambda: torch.dot(memory, memory)
    side = 8192 if device == "cuda" else 2048
    kind = {"matrix fp32": torch.float32, "matrix bf16": torch.bfloat16}[name]
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in "ab")
    return 2.0 * side**3, lambda: left @ right
