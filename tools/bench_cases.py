"""What `bench.py run` times. A case makes ready, then says what one call of it does and what bounds it.

Run as a program, `python bench_cases.py NAME FOLDER THREADS DEVICE` is the process that does so for bench_worker.
"""

import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench_worker import Ready, answer, largest

Prepare = Callable[[Path, str], Ready]


@dataclass(frozen=True)
class Case:
    """A benchmark: its unit, and `prepare(folder, device)`, which loads everything and warms up."""

    text: str
    unit: str
    prepare: Prepare
    devices: tuple[str, ...] = ("cpu", "cuda")


QUICKSTART = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}


def _train(size: str, batch: int, seq_len: int, precision: str, device: str) -> Case:
    """A step as gpt2-train does it: on a GPU compiled."""

    def prepare(folder: Path, device: str) -> Ready:
        import bench_steps

        preset, fields = ("124M", QUICKSTART) if size == "7M" else (size, {})
        work = bench_steps.Work(preset, batch, seq_len, precision, device, fields)
        bench_steps.refuse_emulation(work)
        return bench_steps.ours(work, compile_mode="default" if device == "cuda" else "")

    return Case(f"a step of {batch} x {seq_len}", "tokens", prepare, (device,))


def _generating(precision: str, rows: int) -> Prepare:
    def prepare(folder: Path, device: str) -> Ready:
        import torch

        from gpt2_model import GPT, generate

        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
        model = GPT.from_pretrained(_model(folder), dtype=kind).to(device)
        prompts, new = [list(range(100 + row, 116 + row)) for row in range(rows)], 64

        def call() -> None:
            generate(model, prompts, max_new_tokens=new, top_k=50, stop_ids=(), seed=0)

        weights = (model.config.num_parameters - 1024 * 768) * {"fp32": 4, "bf16": 2, "int8": 1}[precision]
        # A step of the whole batch reads all weights once.
        return Ready(call, rows * new, "read", new * weights)

    return prepare


def _tokenizing(library: str) -> Prepare:
    def prepare(folder: Path, device: str) -> Ready:
        import pyarrow as pa

        from gpt2_data.tokenizer import encode_texts

        texts = pa.array(_texts(8_000_000), pa.large_string())
        return Ready(lambda: encode_texts(texts, library), pa.compute.sum(pa.compute.binary_length(texts)).as_py())

    return prepare


def _texts(size: int) -> list[str]:
    """The sources of Python's own library, as many as make `size` bytes."""
    texts, found = list[str](), 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if found > size:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        found += len(texts[-1].encode())
    return texts


def dataset(folder: Path) -> Path:
    """Three million tokens of Python's own text, built once in the folder."""
    out = folder / "pydocs"
    if not out.exists():
        _build(out)
    return out


def _build(out: Path) -> None:
    from gpt2_data import BuildConfig, build

    build(BuildConfig(sources=("pydocs",), out=out, order="shuffled", val_tokens=200_000, workers=_threads()))


def _threads() -> int | None:
    """Those of --threads, which bench_worker puts there; None, one a core, elsewhere."""
    return int(os.environ["OMP_NUM_THREADS"]) if "OMP_NUM_THREADS" in os.environ else None


def _building(folder: Path, device: str) -> Ready:
    from gpt2_data import open_dataset

    data = open_dataset(dataset(folder))

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            _build(Path(fresh) / "out")

    return Ready(call, data.tokens("train") + data.tokens("val"), memory=_of_children)


def _of_children() -> int:
    return largest(resource.getrusage(resource.RUSAGE_CHILDREN))


def _loading(folder: Path, device: str) -> Ready:
    from gpt2_data import TokenLoader

    batch, length, batches = 64, 1024, 40
    loader = iter(TokenLoader(dataset(folder), batch_size=batch, seq_len=length))

    def call() -> None:
        for _ in islice(loader, batches):
            pass

    tokens = batches * batch * length
    return Ready(call, tokens, "copy", 2 * 8 * tokens)  # inputs and targets, int64


def _verifying(folder: Path, device: str) -> Ready:
    from gpt2_data.formats.verification import verify

    data = dataset(folder)
    size = sum(file.stat().st_size for file in data.iterdir() if file.suffix in (".bin", ".docs"))
    return Ready(lambda: verify(data, "full", _threads()), size, "sha256", size)


def _scoring(folder: Path, device: str) -> Ready:
    """Items of HellaSwag's shape: a context of 50 ids and four endings of 29."""
    import torch

    from gpt2_eval import Row, score_items
    from gpt2_model import GPT, GPTConfig
    from gpt2_model.command import keep_buffers

    keep_buffers()
    draw = random.Random(0)
    items = [
        [Row(context, draw.choices(range(50_000), k=29)) for _ in "abcd"]
        for context in (draw.choices(range(50_000), k=50) for _ in range(12 if device == "cpu" else 600))
    ]
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(device).eval()
    positions, scored = len(items) * (49 + 1 + 4 * 28), len(items) * 4 * 29
    head = model.config.vocab_size * model.config.n_embd
    body = model.config.num_parameters - head - model.config.block_size * model.config.n_embd
    return Ready(
        lambda: score_items(model, items), len(items), "matrix fp32", 2 * (positions * body + scored * head)
    )


def _losing(folder: Path, device: str) -> Ready:
    import torch

    from gpt2_data import open_dataset
    from gpt2_eval import evaluate_loss
    from gpt2_model import GPT, GPTConfig, flops_per_token
    from gpt2_model.command import keep_buffers

    keep_buffers()
    torch.manual_seed(0)
    model, data = GPT(GPTConfig()).to(device).eval(), open_dataset(dataset(folder))
    tokens = 2048 if device == "cpu" else 65_536
    cost = tokens * flops_per_token(model.config, 1024) / 3  # no backward
    return Ready(lambda: evaluate_loss(model, data, tokens=tokens), tokens, "matrix fp32", cost)


def _saving(folder: Path, device: str) -> Ready:
    """A checkpoint of 124M, written, hashed, read back and flushed to the disk."""
    import torch

    from gpt2_model import GPT, GPTConfig
    from gpt2_train.checkpoint import write_checkpoint

    torch.manual_seed(0)
    model = GPT(GPTConfig())
    moments = {f"{kind}.{name}": torch.zeros_like(p) for kind in "mv" for name, p in model.named_parameters()}
    run = folder / "run"
    run.mkdir(exist_ok=True)
    size = 12 * model.config.num_parameters
    return Ready(lambda: write_checkpoint(run, 1, model, moments, {}), size, "sha256", size)


def _loading_weights(folder: Path, device: str) -> Ready:
    from gpt2_model import GPT, GPTConfig

    path = _model(folder)
    size = 4 * GPTConfig().num_parameters
    return Ready(lambda: GPT.from_pretrained(path).to(device), size, "copy", size)


def _starting(*command: str) -> Prepare:
    def prepare(folder: Path, device: str) -> Ready:
        program = Path(sysconfig.get_path("scripts")) / command[0]
        words = [str(program), *(word.format(folder=folder, device=device) for word in command[1:])]
        if "generate" in command:
            _model(folder)
        memory = [0]

        def call() -> None:
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            assert process.stderr
            with process.stderr as stream:
                said = stream.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise ValueError(said.decode().strip().splitlines()[-1])
            memory[0] = largest(usage)

        return Ready(call, 1, memory=lambda: memory[0])

    return prepare


def _model(folder: Path) -> Path:
    """124M with random weights, saved once, by a process of its own: a large one's children seem as large."""
    path = folder / "model"
    if not path.exists():
        words = f"from gpt2_model import GPT, GPTConfig; GPT(GPTConfig()).save_pretrained({str(path)!r})"
        subprocess.run([sys.executable, "-c", words], check=True)
    return path


CASES = {
    "train-7M-fp32": _train("7M", 4, 256, "fp32", "cpu"),  # the quickstart's model
    "train-124M-fp32": _train("124M", 4, 256, "fp32", "cpu"),
    "train-124M-fp32-1024": _train("124M", 1, 1024, "fp32", "cpu"),
    "train-124M-bf16": _train("124M", 4, 256, "bf16", "cpu"),
    "train-124M-bf16-1024": _train("124M", 1, 1024, "bf16", "cpu"),
    "train-350M-fp32": _train("350M", 2, 256, "fp32", "cpu"),
    "train-774M-fp32": _train("774M", 1, 256, "fp32", "cpu"),
    "train-124M": _train("124M", 64, 1024, "bf16", "cuda"),
    "train-350M": _train("350M", 32, 1024, "bf16", "cuda"),
    "train-774M": _train("774M", 16, 1024, "bf16", "cuda"),
    "train-1558M": _train("1558M", 8, 1024, "bf16", "cuda"),
    "generate-fp32": Case("124M, one row, 64 new tokens", "tokens", _generating("fp32", 1)),
    "generate-bf16": Case("124M, one row, 64 new tokens", "tokens", _generating("bf16", 1)),
    "generate-int8": Case("124M, one row, 64 new tokens", "tokens", _generating("int8", 1), ("cpu",)),
    "generate-fp32-8": Case("124M, eight rows, 64 new tokens", "tokens", _generating("fp32", 8)),
    "tokenize-gigatoken": Case("8 MB of Python sources, one process", "bytes", _tokenizing("gigatoken")),
    "tokenize-tiktoken": Case("8 MB of Python sources, one process", "bytes", _tokenizing("tiktoken")),
    "data-build": Case("gpt2-data build of Python's own text", "tokens", _building),
    "data-load": Case("batches of 64 x 1024, shuffled", "tokens", _loading),
    "data-verify": Case("every hash of a dataset", "bytes", _verifying),
    "eval-hellaswag": Case("124M, items of HellaSwag's shape", "items", _scoring),
    "eval-loss": Case("124M, windows of 1,024", "tokens", _losing),
    "checkpoint-save": Case("124M with its moments, verified", "bytes", _saving, ("cpu",)),
    "checkpoint-load": Case("124M, from_pretrained", "bytes", _loading_weights),
    "start-model": Case("gpt2-model --help", "starts", _starting("gpt2-model", "--help")),
    "start-data": Case("gpt2-data --help", "starts", _starting("gpt2-data", "--help")),
    "start-eval": Case("gpt2-eval --help", "starts", _starting("gpt2-eval", "--help")),
    "start-train": Case("gpt2-train --help", "starts", _starting("gpt2-train", "--help")),
    "start-generate": Case("gpt2-model generate, one token", "starts", _starting(
        "gpt2-model", "generate", "-m", "{folder}/model", "-d", "{device}", "--max-new-tokens", "1", "Hello")),
}  # fmt: skip


if __name__ == "__main__":
    name, folder, threads, device = sys.argv[1:]
    answer(lambda: CASES[name].prepare(Path(folder), device), Path(folder), int(threads), device)
