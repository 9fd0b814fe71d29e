"""How fast a run will be, before it is begun: a share of the device's peak, or of what it is measured to do."""

import time
from dataclasses import replace

import torch

from gpt2_model import GPTConfig
from gpt2_train.config import TrainConfig
from gpt2_train.metrics import peak_tflops

GPU_SHARE = 0.40  # of the maker's peak: 124M reaches 38 % of it with llm.c on eight H100s, 56 % on eight A100s
PRODUCT_SHARE = 0.70  # of the rate of a large matrix product, which a whole step reaches elsewhere


def assumed_speed(
    config: TrainConfig, shape: GPTConfig, device_type: str, precision: str, here: bool
) -> tuple[float | None, str]:
    """Operations a second of one process, None if nothing is known; and in words where the figure is from.

    Args:
        here: whether this machine has such a device. One whose peak is not known is measured for a second.
    """
    share = GPU_SHARE if device_type == "cuda" else PRODUCT_SHARE
    if config.peak_tflops:
        return config.peak_tflops * 1e12 * share, f"{share:.0%} (assumed) of --peak-tflops {config.peak_tflops:g}"
    if here and (known := peak_tflops(replace(config, precision=precision), torch.device(device_type))):
        name, peak = known
        return peak * 1e12 * share, f"{share:.0%} (assumed) of the {peak:,.0f} TFLOP/s of {name}"
    if not here:
        return None, "not known, since there is no such device here: give --peak-tflops"
    rate = _product_rate(torch.device(device_type), precision, shape)
    return rate * PRODUCT_SHARE, (
        f"{PRODUCT_SHARE:.0%} (assumed) of the {rate / 1e9:,.0f} GFLOP/s of a matrix product, measured here"
    )


def _product_rate(device: torch.device, precision: str, shape: GPTConfig, seconds: float = 1.0) -> float:
    """Operations a second of the product that a step has most of: activations by the MLP's first matrix."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.randn(2048, shape.n_embd, device=device, dtype=dtype)
    right = torch.randn(shape.n_embd, shape.mlp_dim, device=device, dtype=dtype)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        (left @ right).sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    return 2 * left.shape[0] * shape.n_embd * shape.mlp_dim / median
