"""What `bench.py scaling` measures: two processes of gpt2-train under torchrun beside the most they could reach.

That is two processes that train at the same time, each for itself: they share caches, memory and clocks as well,
but exchange nothing. All train the same model with the same tokens a process and step, and take turns.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_cases import dataset
from bench_report import say, spread

LEFT_OUT = 2  # of a run's steps, the first: memory is had for the first time
RANKS, ALONE, ONE, TWO_THREADS = "two ranks", "two alone", "one", "one, two threads"
DEFINITIONS = {
    RANKS: "torchrun --nproc_per_node=2 -m gpt2_train, a thread each, gloo",
    ALONE: "gpt2_train twice at the same time, a thread each; the sum of both",
    ONE: "gpt2_train once, one thread",
    TWO_THREADS: "gpt2_train once, two threads",
    "tokens_per_second": f"median of a run's steps, from its metrics.jsonl, without the first {LEFT_OUT}",
    "efficiency": f"tokens/s of `{RANKS}` over those of `{ALONE}`, in the same round",
}


@dataclass(frozen=True)
class Settings:
    """What to measure, and how. The default model has 30M parameters."""

    rounds: int = 3
    steps: int = 7
    micro_batch: int = 2
    """Sequences."""
    seq_len: int = 256
    accumulations: tuple[int, ...] = (1, 4)
    """Micro-batches of a step."""
    model: Mapping[str, int] = field(default_factory=lambda: {"n_layer": 6, "n_head": 6, "n_embd": 384})
    data: str | None = None
    """A dataset folder; None: one is made of the text that Python carries."""
    grad_compression: str = "none"


def measure(settings: Settings, work: Path) -> dict[str, Any]:
    """The document, without its provenance.

    Raises:
        ValueError: a run fails; the end of what it said.
        OSError: files that cannot be read or written.
    """
    from gpt2_model import GPTConfig
    from gpt2_train.distributed import gradient_bytes_sent

    if settings.steps <= LEFT_OUT:
        raise ValueError(f"of {settings.steps} steps none is left without the first {LEFT_OUT}: use more")
    data = settings.data or str(dataset(work))
    shape: dict[str, Any] = dict(settings.model)
    parameters = GPTConfig(**shape).num_parameters
    return {
        "definitions": DEFINITIONS,
        "settings": asdict(settings),
        "model": {"parameters": parameters},
        "gradient_bytes_sent": gradient_bytes_sent(parameters, 2, settings.grad_compression),
        "scaling": [_case(settings, data, accumulation, work) for accumulation in settings.accumulations],
        "absent": {},
        "bars": [],
    }


def _case(settings: Settings, data: str, accumulation: int, work: Path) -> dict[str, Any]:
    """All contenders in turns; in every second round the other way round."""
    speeds: dict[str, list[float]] = {name: [] for name in (TWO_THREADS, RANKS, ALONE, ONE)}
    for turn in range(settings.rounds):
        for name in list(speeds)[:: -1 if turn % 2 else 1]:
            speeds[name].append(_run(name, settings, data, accumulation, work))
            say(
                f"round {turn + 1} of {settings.rounds}, accumulation {accumulation}, {name}: "
                f"{speeds[name][-1]:,.0f} tokens/s"
            )
    return {
        "accumulation": accumulation,
        "tokens_a_step": accumulation * settings.micro_batch * settings.seq_len,
        "tokens_per_second": {name: spread(rounds) for name, rounds in speeds.items()},
        "efficiency": spread(_ratios(speeds[RANKS], speeds[ALONE])),
        "to_two_threads": spread(_ratios(speeds[RANKS], speeds[TWO_THREADS])),
    }


def _ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(of, to, strict=True)]


def _run(name: str, settings: Settings, data: str, accumulation: int, work: Path) -> float:
    """Tokens a second of one contender, whose runs' folders are deleted again."""
    ranks, copies = (2 if name == RANKS else 1), (2 if name == ALONE else 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
    environment = os.environ | {"OMP_NUM_THREADS": "2" if name == TWO_THREADS else "1"}
    outs = [work / f"run-{copy}" for copy in range(copies)]
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    processes = [
        subprocess.Popen(
            [sys.executable, *launcher, "-m", "gpt2_train", *_words(settings, data, out, ranks * accumulation)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for out in outs
    ]  # fmt: skip
    try:
        said = [process.communicate()[1] for process in processes]
    finally:  # interrupted: torchrun ends its own at SIGTERM
        for process in processes:
            process.terminate()
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise ValueError(f"{name}: gpt2-train ended with {process.returncode}: {text[-1000:]}")
    speed = sum(_tokens_per_second(out) for out in outs)
    for out in outs:
        shutil.rmtree(out)
    return speed


def _words(settings: Settings, data: str, out: Path, micro_batches: int) -> list[str]:
    values = {
        "data": data, "out": out, "steps": settings.steps, "warmup": 1, "micro-batch": settings.micro_batch,
        "seq-len": settings.seq_len, "batch-tokens": micro_batches * settings.micro_batch * settings.seq_len,
        "device": "cpu", "precision": "fp32", "eval-every": 0, "checkpoint-every": 0,
        "grad-compression": settings.grad_compression,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return words + [word for name, value in settings.model.items() for word in ("--model", f"{name}={value}")]


def _tokens_per_second(out: Path) -> float:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds: list[float] = [row["tokens_per_second"] for row in rows[LEFT_OUT:]]
    return statistics.median(speeds)


def table(document: dict[str, Any]) -> str:
    """The document for a person."""
    machine = document["machine"]
    lines = [
        f"GPT-2 of {document['model']['parameters']:,} parameters, fp32; each of two ranks sends "
        f"{document['gradient_bytes_sent'] / 1e6:.0f} MB of gradients a step",
        f"{machine['cpu']}, {machine['cores']} cores",
    ]
    for case in document["scaling"]:
        efficiency = case["efficiency"]
        lines += [
            "",
            f"{case['tokens_a_step']:,} tokens a process and step, accumulation {case['accumulation']}",
            *(f"  {name:18}{speed['median']:9,.0f} tokens/s" for name, speed in case["tokens_per_second"].items()),
            f"  two ranks to two alone: {efficiency['median']:.1%} "
            f"({efficiency['min']:.1%} to {efficiency['max']:.1%}); to one of two threads: "
            f"{case['to_two_threads']['median']:.2f} times",
        ]
    return "\n".join(lines)
