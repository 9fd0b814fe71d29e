"""Our own cases that need torch: each function returns a case that is ready.

`compare` also calls them with the packages of an older revision, so they use public names and commands. Anything
else is looked up under its module's present or former name.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import dataset, model_folder, run_command
from benchmarks.harness import Bench, Ready
from benchmarks.report import processor
from benchmarks.suite import Work
from gpt2_data import open_dataset
from gpt2_eval import Row, evaluate_loss, score_items
from gpt2_model import GPT, GPTConfig, flops_per_token, generate
from gpt2_train import make_optimizer

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def random_model(bench: Bench, fields: Mapping[str, int] | None = None, **options: Any) -> GPT:
    """Load a model with random weights, 124M by default; the first call makes it."""
    return GPT.from_pretrained(model_folder(bench, fields or {}), **options).to(bench.device).eval()


def keep_buffers() -> None:
    """Keep the memory of a CPU's large tensors from step to step, as gpt2-train and gpt2-eval do."""
    module = "gpt2_model.command" if find_spec("gpt2_model.command") else "gpt2_model.allocator"  # in 0.1
    import_module(module).keep_buffers()


def training(bench: Bench, work: Mapping[str, Any], compiled: bool = False) -> Ready:
    """Time a training step as gpt2-train does it."""
    step, bf16 = Work(**work), {"avx512_bf16", "amx_bf16", "bf16"}
    if step.precision == "bf16" and bench.device == "cpu" and bf16.isdisjoint(processor()["features"]):
        raise ValueError("this processor has no bf16 instructions")
    keep_buffers()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**step.shape)).to(bench.device)
    stepped: Any = torch.compile(model, dynamic=False) if compiled else model
    optimizer = make_optimizer(model, lr=1e-4)
    return stepping(bench, step, model, optimizer, lambda x, y: stepped(x, y, return_logits=False)[1])


def stepping(bench: Bench, work: Work, model: Any, optimizer: Any, loss_of: Callable[..., Any]) -> Ready:
    """Time a step of any model: random tokens, autocast, clipping by 1, the optimizer."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 50257, (work.batch, work.seq_len), generator=draw).to(bench.device) for _ in "xy")

    def step() -> None:
        for _ in range(work.accumulation):
            with torch.autocast(bench.device, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = loss_of(x, y) / work.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if bench.device == "cuda":
            torch.cuda.synchronize()

    tokens = work.accumulation * work.batch * work.seq_len
    cost = tokens * flops_per_token(GPTConfig(**work.shape), work.seq_len)
    return Ready(step, tokens, f"matrix {work.precision}", cost, warm_up=5)  # until the heap stops growing


def gpt2_train(bench: Bench, work: Mapping[str, Any], steps: int, ranks: int = 1, copies: int = 1) -> Ready:
    """Time gpt2-train itself, with its loader, logging and clipping: a step's seconds come from metrics.jsonl.

    Each run has `ranks` ranks; the speeds of `copies`, which run at the same time, are added.
    """
    step = Work(**work)
    tokens = ranks * step.accumulation * step.batch * step.seq_len
    values = {
        "data": dataset(bench), "steps": steps, "warmup": 1, "micro-batch": step.batch, "seq-len": step.seq_len,
        "batch-tokens": tokens, "device": bench.device, "precision": step.precision, "eval-every": 0,
        "checkpoint-every": 0,
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, "-m", "gpt2_train"]
    words += [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    words += [word for name, value in step.shape.items() for word in ("--model", f"{name}={value}")]

    def run(out: str) -> dict[str, Any]:
        done = run_command([*words, "--out", out], OMP_NUM_THREADS=str(bench.threads))
        lines = Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
        return done | {"seconds": statistics.median(seconds[2:])}  # the first two steps allocate memory

    def call() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(copies) as pool:
            runs = list(pool.map(run, [f"{folder}/run-{copy}" for copy in range(copies)]))
        return runs[0] | {"seconds": statistics.harmonic_mean([one["seconds"] for one in runs])}

    return Ready(call, copies * tokens, warm_up=0)


def generating(
    bench: Bench, precision: str, rows: int, new_tokens: int = 64, fields: Mapping[str, int] | None = None,
    compiled: bool = False,
) -> Ready:  # fmt: skip
    """Time our own text generation, sampled with top-k 50."""
    model = random_model(bench, fields, dtype=KINDS[precision])

    def write(prompts: list[list[int]]) -> Sequence[Sequence[int]]:
        options: Any = {"max_new_tokens": new_tokens, "top_k": 50, "stop_ids": (), "compile": compiled or None}
        return [row.tokens for row in generate(model, prompts, seed=0, **options)]

    return writing(model.config, precision, rows, new_tokens, write)


def writing(
    config: GPTConfig,
    precision: str,
    rows: int,
    new_tokens: int,
    write: Callable[[list[list[int]]], Sequence[Sequence[int]]],
) -> Ready:
    """Time `write(prompts)` of any model, which continues prompts of 16 tokens by `new_tokens`."""
    draw = random.Random(0)
    prompts = [draw.choices(range(50_256), k=16) for _ in range(rows)]

    def call() -> None:
        written = write(prompts)
        assert [len(row) for row in written] == [new_tokens] * rows, "another number of tokens was drawn"

    # A step of the whole batch reads all weights once, except the position embedding.
    weights = (config.num_parameters - config.block_size * config.n_embd) * KINDS[precision].itemsize
    return Ready(call, rows * new_tokens, "read", new_tokens * weights)


def scoring(bench: Bench) -> Ready:
    """Time scoring items of HellaSwag's shape: a context of 50 ids and four endings of 29."""
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
    """Time the validation loss of 124M."""
    keep_buffers()
    model, shards = random_model(bench), open_dataset(dataset(bench))
    tokens = 2048 if bench.device == "cpu" else 65_536
    cost = tokens * flops_per_token(model.config, 1024) / 3  # no backward
    return Ready(lambda: evaluate_loss(model, shards, tokens=tokens), tokens, "matrix fp32", cost)


def saving(bench: Bench) -> Ready:
    """Time a checkpoint of 124M with its moments: written, hashed, read back and flushed to the disk."""
    from gpt2_train.checkpoint import write_checkpoint  # not public, but in every version

    model, run = GPT(GPTConfig()), Path(bench.folder, "run")
    moments = {f"{kind}.{name}": torch.zeros_like(p) for kind in "mv" for name, p in model.named_parameters()}
    run.mkdir(exist_ok=True)
    size = 12 * model.config.num_parameters
    return Ready(lambda: write_checkpoint(run, 1, model, moments, {}), size, "sha256", size)


def opening(bench: Bench) -> Ready:
    """Time loading 124M by from_pretrained."""
    size = 4 * random_model(bench).config.num_parameters
    return Ready(lambda: random_model(bench), size, "copy", size)
