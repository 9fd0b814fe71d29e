"""The suite: the cases of `bench.py run`, `record` and `compare`. `results.jsonl` knows them by these names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness import Case
from gpt2_model import PRESETS

QUICKSTART = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}  # the quickstart's model
FIRST_TOKEN = ("gpt2-model", "generate", "-m", "{model}", "-d", "{device}", "--max-new-tokens", "1", "Hello")


@dataclass(frozen=True)
class Work:
    """A training step: micro-batches of `batch` sequences of `seq_len` tokens, in fp32 or, by autocast, bf16."""

    shape: Mapping[str, Any]  # n_layer, n_head, n_embd and block_size, as all libraries call them
    batch: int
    seq_len: int
    precision: str
    accumulation: int  # micro-batches per step


def work_of(
    size: str, batch: int, seq_len: int, precision: str, device: str, fields: Mapping[str, int]
) -> dict[str, Any]:
    """Return the fields of a Work: a step of a preset changed by `fields`, as large as usual on the device."""
    shape = {name: getattr(PRESETS[size], name) for name in ("n_layer", "n_head", "n_embd")}
    shape |= {"block_size": max(1024, seq_len), **fields}
    accumulation = max(1, 524_288 // (batch * seq_len)) if device == "cuda" else 1
    return asdict(Work(shape, batch, seq_len, precision, accumulation))


def _training(name: str, batch: int, seq_len: int, precision: str, device: str) -> Case:
    size = name.split("-")[1]
    preset, fields = ("124M", QUICKSTART) if size == "7M" else (size, {})
    work = work_of(preset, batch, seq_len, precision, device, fields)
    text, options = f"a step of {batch} x {seq_len}", {"work": work, "compiled": device == "cuda"}
    return Case(name, text, "tokens", "benchmarks.cases.training", options, (device,))


def _generating(name: str, precision: str, rows: int, *devices: str) -> Case:
    options = {"precision": precision, "rows": rows}
    text = f"124M, rows: {rows}, 64 new tokens"
    return Case(name, text, "tokens", "benchmarks.cases.generating", options, devices)


def _starting(name: str, *words: str) -> Case:
    return Case(name, " ".join(words[:2]), "starts", "benchmarks.data.starting", {"words": words})


def _tokenizing(library: str) -> Case:
    options = {"library": library}
    return Case(f"tokenize-{library}", "8 MB in a process", "bytes", "benchmarks.data.tokenizing", options)


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
    _tokenizing("gigatoken"),
    _tokenizing("tiktoken"),
    Case("data-build", "gpt2-data build of Python's own text", "tokens", "benchmarks.data.building"),
    Case("data-load", "batches of 64 x 1024, shuffled", "tokens", "benchmarks.data.loading"),
    Case("data-verify", "every hash of a dataset", "bytes", "benchmarks.data.verifying"),
    Case("eval-hellaswag", "124M, items of HellaSwag's shape", "items", "benchmarks.cases.scoring"),
    Case("eval-loss", "124M, windows of 1,024", "tokens", "benchmarks.cases.losing"),
    Case("checkpoint-save", "124M with its moments, verified", "bytes", "benchmarks.cases.saving", {}, ("cpu",)),
    Case("checkpoint-load", "124M, from_pretrained", "bytes", "benchmarks.cases.opening"),
    *(_starting(f"start-{name}", f"gpt2-{name}", "--help") for name in ("model", "data", "eval", "train")),
    _starting("start-generate", *FIRST_TOKEN),
]
