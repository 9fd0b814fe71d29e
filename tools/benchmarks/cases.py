"""What is timed of ours: each function makes ready; and the suite, the cases of `bench.py run` and `compare`.

`compare` calls these with the packages of an older revision, too: they use public names and commands; for what is
neither, `inner` knows the names that its module had.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks.data import dataset, model_folder, run_command
from benchmarks.harness import Bench, Case, Ready
from benchmarks.report import processor
from gpt2_data import open_dataset
from gpt2_eval import Row, evaluate_loss, score_items
from gpt2_model import GPT, PRESETS, GPTConfig, flops_per_token, generate
from gpt2_train import make_optimizer

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def inner(*names: str) -> Any:
    """Return the first of these modules that there is: today's name, then earlier ones."""
    for name in names[:-1]:
        with suppress(ModuleNotFoundError):
            return import_module(name)
    return import_module(names[-1])


def random_model(bench: Bench, fields: Mapping[str, int] | None = None, **options: Any) -> GPT:
    """Load a model with random weights, 124M by default, which the first to ask for it makes."""
    return GPT.from_pretrained(model_folder(bench, fields or {}), **options).to(bench.device).eval()


def keep_buffers() -> None:
    """Keep a CPU's large tensors' memory from step to step, as gpt2-train and gpt2-eval do."""
    inner("gpt2_model.command", "gpt2_model.allocator").keep_buffers()


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
    threads: int = 0,
) -> Ready:  # fmt: skip
    """gpt2-train itself, with its loader, logging and clipping: a step's time as metrics.jsonl has it.

    Args:
        accumulation: micro-batches of a step of each process; 0 for the usual.
        ranks: processes of a run, by torchrun.
        copies: runs at the same time, whose speeds are added.
        threads: threads of each process; 0 for the bench's.
    """
    step = Work(device=bench.device, **work)
    tokens = ranks * (accumulation or step.accumulation) * step.batch * step.seq_len
    values = {
        "data": dataset(bench), "steps": steps, "warmup": 1, "micro-batch": step.batch, "seq-len": step.seq_len,
        "batch-tokens": tokens, "device": step.device, "precision": step.precision, "eval-every": 0,
        "checkpoint-every": 0,
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, "-m", "gpt2_train"]
    words += [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    words += [word for name, value in step.sizes.items() for word in ("--model", f"{name}={value}")]

    def run(out: str) -> dict[str, Any]:
        done = run_command([*words, "--out", out], OMP_NUM_THREADS=str(threads or bench.threads))
        lines = Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = [json.loads(line)["seconds"] for line in lines]
        return done | {"seconds": statistics.median(seconds[2:])}  # the first two get their memory

    def call() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(copies) as pool:
            runs = list(pool.map(run, [f"{folder}/run-{copy}" for copy in range(copies)]))
        return runs[0] | {"seconds": statistics.harmonic_mean([one["seconds"] for one in runs])}

    return Ready(call, copies * tokens, warm_up=0)


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

    def call() -> dict[str, float]:
        rest = seconds(new_tokens) - (statistics.median(seconds(1) for _ in range(3)) if after_first else 0)
        if rest <= 0:
            raise ValueError(f"{new_tokens} tokens take no longer than 1 here: measure a larger model")
        return {"seconds": rest}

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


QUICKSTART = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}  # the quickstart's model
FIRST_TOKEN = ("gpt2-model", "generate", "-m", "{model}", "-d", "{device}", "--max-new-tokens", "1", "Hello")


def starting(name: str, words: Sequence[str], fields: Mapping[str, int] | None = None) -> Case:
    """A command from its start as a process to its end."""
    return Case(name, " ".join(words[:2]), "starts", data.starting, {"words": words, "fields": fields or {}})


def _training(name: str, batch: int, seq_len: int, precision: str, device: str) -> Case:
    size = name.split("-")[1]
    work = {"batch": batch, "seq_len": seq_len, "precision": precision}
    work |= {"size": "124M", "fields": QUICKSTART} if size == "7M" else {"size": size}
    options = {"work": work, "compiled": device == "cuda"}
    return Case(name, f"a step of {batch} x {seq_len}", "tokens", training, options, (device,))


def _generating(name: str, precision: str, rows: int, *devices: str) -> Case:
    options = {"precision": precision, "rows": rows, "after_first": False}
    return Case(name, f"124M, rows: {rows}, 64 new tokens", "tokens", generating, options, devices)


CASES = [
    _training("train-7M-fp32", 4, 256, "fp32", "cpu"),
    _training("train-124M-fp32", 4, 256, "fp32", "cpu"),
    _training("train-124M-fp32-1024", 1, 1024, "fp32", "cpu"),
    _training("train-124M-bf16", 4, 256, "bf16", "cpu"),
    _training("train-124M-bf16-1024", 1, 1024, "bf16", "cpu"),
    _training("train-350M-fp32", 2, 256, "fp32", "cpu"),
    _training("train-774M-fp32", 1, 256, "fp32", "cpu"),
    _training("train-124M", 64, 1024, "bf16", "cuda"),
    _training("train-350M", 32, 1024, "bf16", "cuda"),
    _training("train-774M", 16, 1024, "bf16", "cuda"),
    _training("train-1558M", 8, 1024, "bf16", "cuda"),
    _generating("generate-fp32", "fp32", 1, "cpu", "cuda"),
    _generating("generate-bf16", "bf16", 1, "cpu", "cuda"),
    _generating("generate-int8", "int8", 1, "cpu"),
    _generating("generate-fp32-8", "fp32", 8, "cpu", "cuda"),
    Case("tokenize-gigatoken", "8 MB in a process", "bytes", data.tokenizing, {"library": "gigatoken"}),
    Case("tokenize-tiktoken", "8 MB in a process", "bytes", data.tokenizing, {"library": "tiktoken"}),
    Case("data-build", "gpt2-data build of Python's own text", "tokens", data.building),
    Case("data-load", "batches of 64 x 1024, shuffled", "tokens", data.loading),
    Case("data-verify", "every hash of a dataset", "bytes", data.verifying),
    Case("eval-hellaswag", "124M, items of HellaSwag's shape", "items", scoring),
    Case("eval-loss", "124M, windows of 1,024", "tokens", losing),
    Case("checkpoint-save", "124M with its moments, verified", "bytes", saving, {}, ("cpu",)),
    Case("checkpoint-load", "124M, from_pretrained", "bytes", opening),
    *(starting(f"start-{name}", (f"gpt2-{name}", "--help")) for name in ("model", "data", "eval", "train")),
    starting("start-generate", FIRST_TOKEN),
]
