"""docs/scaling.md: every figure that follows from its formula is computed here."""

from pathlib import Path

from gpt2_model import flops_per_token
from gpt2_train import TrainConfig, load_config
from gpt2_train.config import micro_batches
from gpt2_train.distributed import gradient_bytes_sent
from gpt2_train.memory import most_that_fit

PAGE = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
GPUS = (8, 16, 32, 64)
H100_PEAK = 989e12
PUBLISHED = {"124M": 0.140, "350M": 0.348, "774M": 1.7, "1558M": 2.75}  # seconds of a step on eight GPUs
MEMORY = 0.95 * 80e9  # as the README's table has it

CONFIGS = {name: TrainConfig(**load_config(recipe=name), precision="bf16") for name in PUBLISHED}


def published(name: str) -> float:
    """Tokens a second of a GPU."""
    return CONFIGS[name].batch_tokens / 8 / PUBLISHED[name]


def half_of_peak(name: str) -> float:
    config = CONFIGS[name]
    return H100_PEAK / 2 / flops_per_token(config.model_config, config.seq_len)


def times(name: str, speed: float, gpus: int) -> tuple[float, float]:
    """Seconds of a step's computation, and of the backward of its last micro-batch."""
    config = CONFIGS[name]
    fit = most_that_fit(config, gpus, "cuda", MEMORY)
    _, accumulation = micro_batches(config, gpus, fit)
    step = config.batch_tokens / gpus / speed
    return step, 2 / 3 * step / accumulation


def bandwidths(name: str, speed: float, gpus: int) -> tuple[float, float]:
    """Bytes a second that each GPU must send for 90 %: with overlap, and without."""
    shape = CONFIGS[name].model_config
    sent = gradient_bytes_sent(shape.num_parameters, gpus, "none")
    last = gradient_bytes_sent((shape.vocab_size + shape.block_size) * shape.n_embd, gpus, "none")
    step, backward = times(name, speed, gpus)
    lost = step / 9
    return max(sent / (lost + backward), last / lost), sent / lost


def in_units(value: float, unit: float) -> str:
    return f"{value / unit:.1f}" if value < 10 * unit else f"{value / unit:,.0f}"


def rows_of_speeds():
    for name in PUBLISHED:
        yield f"{name}, llm.c on {'A100' if name == '774M' else 'H100'}", name, published(name)
    for name in PUBLISHED:
        yield f"{name}, half of an H100's peak", name, half_of_peak(name)


def test_gradients() -> None:
    for name, config in CONFIGS.items():
        shape = config.model_config
        parameters, last = shape.num_parameters, (shape.vocab_size + shape.block_size) * shape.n_embd
        sizes = [4 * parameters, 2 * parameters, *(gradient_bytes_sent(parameters, n, "none") for n in (8, 64))]
        cells = [name, f"{parameters:,}", *(f"{size / 1e9:.2f} GB" for size in sizes), f"{last / parameters:.0%}"]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_step_times_and_bandwidths() -> None:
    for title, name, speed in rows_of_speeds():
        cells = [" / ".join(f"{1e3 * part:,.0f}" for part in times(name, speed, gpus)) for gpus in GPUS]
        assert f"| {title} | {speed / 1e3:,.0f} | {' | '.join(cells)} |" in PAGE
        pairs = [[in_units(rate, 1e9) for rate in bandwidths(name, speed, gpus)] for gpus in GPUS]
        assert f"| {title} | {' | '.join(f'{overlapped} ({plain})' for overlapped, plain in pairs)} |" in PAGE


def test_a_step_with_that_bandwidth_is_at_90_percent() -> None:
    """The formula, by playing a step: what is ready waits for the line, what is sent late is time lost."""
    for _, name, speed in rows_of_speeds():
        for gpus in GPUS:
            shape = CONFIGS[name].model_config
            step, backward = times(name, speed, gpus)
            overlapped, plain = bandwidths(name, speed, gpus)
            last = gradient_bytes_sent((shape.vocab_size + shape.block_size) * shape.n_embd, gpus, "none")
            blocks = gradient_bytes_sent(shape.num_parameters, gpus, "none") - last
            assert abs(step / (step + (blocks + last) / plain) - 0.9) < 1e-9
            sent_at, parts = step - backward, 1000
            for part in range(parts):  # the blocks' gradients come evenly, over the whole backward
                ready = step - backward + backward * (part + 1) / parts
                sent_at = max(sent_at, ready) + blocks / parts / overlapped
            assert abs(step / (max(sent_at, step) + last / overlapped) - 0.9) < 2e-2
