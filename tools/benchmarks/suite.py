"""The cases of `bench.py run` and `compare`."""

from collections.abc import Mapping, Sequence

from benchmarks import cases, data
from benchmarks.harness import Case

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
    return Case(name, f"a step of {batch} x {seq_len}", "tokens", cases.training, options, (device,))


def _generating(name: str, precision: str, rows: int, *devices: str) -> Case:
    options = {"precision": precision, "rows": rows, "after_first": False}
    return Case(name, f"124M, rows: {rows}, 64 new tokens", "tokens", cases.generating, options, devices)


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
    Case("eval-hellaswag", "124M, items of HellaSwag's shape", "items", cases.scoring),
    Case("eval-loss", "124M, windows of 1,024", "tokens", cases.losing),
    Case("checkpoint-save", "124M with its moments, verified", "bytes", cases.saving, {}, ("cpu",)),
    Case("checkpoint-load", "124M, from_pretrained", "bytes", cases.opening),
    *(starting(f"start-{name}", (f"gpt2-{name}", "--help")) for name in ("model", "data", "eval", "train")),
    starting("start-generate", FIRST_TOKEN),
]
