"""What is timed of ours. Each function makes ready, and says what a call does and what bounds it.

`bench.py compare` calls these with the packages of an older revision, too: they use public names and commands; for
what is neither, `inner` knows the names that its module had.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import dataset, memory_of_children, model_folder
from benchmarks.harness import Bench, Ready
from benchmarks.machine import processor
from gpt2_data import open_dataset
from gpt2_eval import Row, evaluate_loss, score_items
from gpt2_model import GPT, PRESETS, GPTConfig, flops_per_token, generate
from gpt2_train import make_optimizer

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def inner(*names: str) -> Any:
    """Return the first of these modules that there is: today's name, then earlier ones."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(names[-1])


def keep_buffers() -> None:
    """Keep a CPU's large tensors' memory from step to step, as gpt2-train and gpt2-eval do."""
    inner("gpt2_model.cpu.allocator", "gpt2_model.allocator").keep_buffers()


@dataclass(frozen=True)
class Work:
    """A training step of `batch` sequences of `seq_len` tokens at once, in fp32 or, under autocast, in bf16.

    Attributes:
        size: 124M, 350M, ..., changed by `fields`.
    """

    size: str
    batch: int
    seq_len: int
    precision: str
    device: str
    fields: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        preset = vars(PRESETS[self.size]) | {"block_size": max(1024, self.seq_len)}
        return GPTConfig(**{**preset, **self.fields})

    @property
    def sizes(self) -> dict[str, int]:
        """The shape by the names that all libraries call them."""
        return {name: getattr(self.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step: one on a CPU, as many as make 524,288 tokens on a GPU."""
        return max(1, 524_288 // (self.batch * self.seq_len)) if self.device == "cuda" else 1


def training(bench: Bench, work: Mapping[str, Any], compiled: bool = False) -> Ready:
    """A step as gpt2-train does it."""
    step = Work(device=bench.device, **work)
    if step.precision == "bf16" and bench.device == "cpu" and not {*processor()["features"]} & {
        "avx512_bf16", "amx_bf16", "bf16",
    }:  # fmt: skip
        raise ValueError("this processor has no bf16 instructions")
    keep_buffers()
    torch.manual_seed(0)
    model = GPT(step.config).to(step.device)
    stepped: Any = torch.compile(model, dynamic=False) if compiled else model
    return stepping(
        step, model, make_optimizer(model, lr=1e-4), lambda x, y: stepped(x, y, return_logits=False)[1]
    )


def stepping(work: Work, model: Any, optimizer: Any, loss_of: Callable[..., Any]) -> Ready:
    """A step of any model: random tokens, autocast, clipping by 1, the optimizer."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 50257, (work.batch, work.seq_len), generator=draw).to(work.device) for _ in "xy")

    def step() -> None:
        for _ in range(work.accumulation):
            with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = loss_of(x, y) / work.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if work.device == "cuda":
            torch.cuda.synchronize()

    tokens = work.accumulation * work.batch * work.seq_len
    cost = tokens * flops_per_token(work.config, work.seq_len)
    return Ready(step, tokens, f"matrix {work.precision}", cost, warm_up=5)  # until the heap stays as it is


def gpt2_train(
    bench: Bench, work: Mapping[str, Any], steps: int, accumulation: int = 0, ranks: int = 1, copies: int = 1,
    threads: int = 0, compression: str = "none",
) -> Ready:  # fmt: skip
    """gpt2-train itself, with its loader, logging and clipping: a step's time as metrics.jsonl has it.

    Args:
        accumulation: micro-batches of a step of each process; 0 for the usual.
        ranks: processes of a run, by torchrun.
        copies: runs at the same time, whose speeds are added.
        threads: threads of each process; 0 for the bench's.
        compression: what gradients are sent as.
    """
    step = Work(device=bench.device, **work)
    tokens = ranks * (accumulation or step.accumulation) * step.batch * step.seq_len
    values = {
        "data": dataset(bench), "steps": steps, "warmup": 1, "micro-batch": step.batch, "seq-len": step.seq_len,
        "batch-tokens": tokens, "device": step.device, "precision": step.precision, "eval-every": 0,
        "checkpoint-every": 0, "grad-compression": compression,
    }  # fmt: skip
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    words += [word for name, value in step.sizes.items() for word in ("--model", f"{name}={value}")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or bench.threads)}

    def speed_of(out: Path) -> Any:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return tokens / statistics.median(row["seconds"] for row in rows[2:])  # the first two get their memory

    def call() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / f"run-{copy}" for copy in range(copies)]
            processes = [
                subprocess.Popen(
                    [sys.executable, *launcher, "-m", "gpt2_train", *words, "--out", str(out)],
                    env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
                for out in outs
            ]  # fmt: skip
            errors = [process.communicate()[1] for process in processes]
            for process, text in zip(processes, errors, strict=True):
                if process.returncode:
                    raise ValueError(
                        f"gpt2-train ended with {process.returncode}: {' '.join(text.split())[-300:]}"
                    )
            return copies * tokens / sum(map(speed_of, outs))

    return Ready(call, copies * tokens, warm_up=0, memory=memory_of_children)


def generating(
    bench: Bench, precision: str, rows: int, new_tokens: int = 64, fields: Mapping[str, int] | None = None,
    compiled: bool = False, after_first: bool = True,
) -> Ready:  # fmt: skip
    """Text of ours, sampled with top-k 50."""
    model = random_model(bench, fields, dtype=KINDS[precision])
    options: dict[str, Any] = {"compile": True} if compiled else {}

    def write(prompts: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        written = generate(model, prompts, max_new_tokens=count, top_k=50, stop_ids=(), seed=0, **options)
        return [row.tokens for row in written]

    return writing(model.config, precision, rows, new_tokens, write, after_first)


def writing(
    config: GPTConfig, precision: str, rows: int, new_tokens: int,
    write: Callable[[list[list[int]], int], Sequence[Sequence[int]]], after_first: bool = True,
) -> Ready:  # fmt: skip
    """Time `write(prompts, tokens)` of any model; after_first: without the call for one, where there are more."""
    after_first, draw = after_first and new_tokens > 1, random.Random(0)
    prompts = [draw.choices(range(50_256), k=16) for _ in range(rows)]

    def seconds(count: int) -> float:
        started = time.perf_counter()
        written = write(prompts, count)
        taken = time.perf_counter() - started
        assert [len(row) for row in written] == [count] * rows, "another number of tokens was drawn"
        return taken

    def call() -> float:
        rest = seconds(new_tokens) - (statistics.median(seconds(1) for _ in range(3)) if after_first else 0)
        if rest <= 0:
            raise ValueError(f"{new_tokens} tokens take no longer than 1 here: measure a larger model")
        return rest

    count = new_tokens - after_first
    # A step of the whole batch reads all weights once, but for the positions.
    weights = (config.num_parameters - config.block_size * config.n_embd) * BYTES[precision]
    return Ready(call, rows * count, "read", count * weights)


def scoring(bench: Bench) -> Ready:
    """Items of HellaSwag's shape: a context of 50 ids and four endings of 29."""
    keep_buffers()
    model, draw = random_model(bench), random.Random(0)
    contexts = [draw.choices(range(50_000), k=50) for _ in range(12 if bench.device == "cpu" else 600)]
    items = [[Row(context, draw.choices(range(50_000), k=29)) for _ in "abcd"] for context in contexts]
    positions, scored = len(items) * (49 + 1 + 4 * 28), len(items) * 4 * 29
    head = model.config.vocab_size * model.config.n_embd
    body = model.config.num_parameters - head - model.config.block_size * model.config.n_embd
    cost = 2 * (positions * body + scored * head)
    return Ready(lambda: score_items(model, items), len(items), "matrix fp32", cost)


def losing(bench: Bench) -> Ready:
    """Validation loss of 124M."""
    keep_buffers()
    model, shards = random_model(bench), open_dataset(dataset(bench))
    tokens = 2048 if bench.device == "cpu" else 65_536
    cost = tokens * flops_per_token(model.config, 1024) / 3  # no backward
    return Ready(lambda: evaluate_loss(model, shards, tokens=tokens), tokens, "matrix fp32", cost)


def saving(bench: Bench) -> Ready:
    """A checkpoint of 124M with its moments: written, hashed, read back and flushed to the disk."""
    model, run = GPT(GPTConfig()), bench.place("run")
    moments = {f"{kind}.{name}": torch.zeros_like(p) for kind in "mv" for name, p in model.named_parameters()}
    run.mkdir(exist_ok=True)
    write_checkpoint = inner("gpt2_train.checkpoint").write_checkpoint
    size = 12 * model.config.num_parameters
    return Ready(lambda: write_checkpoint(run, 1, model, moments, {}), size, "sha256", size)


def opening(bench: Bench) -> Ready:
    """124M, from_pretrained."""
    size = 4 * random_model(bench).config.num_parameters
    return Ready(lambda: random_model(bench), size, "copy", size)


def random_model(bench: Bench, fields: Mapping[str, int] | None = None, **options: Any) -> GPT:
    """Load a model with random weights, 124M by default, which the first to ask for it makes."""
    return GPT.from_pretrained(model_folder(bench, fields or {}), **options).to(bench.device).eval()
