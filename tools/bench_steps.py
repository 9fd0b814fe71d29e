"""Training steps that are timed: ours, as gpt2-train does them, the peers', and their matrix products alone.

All train a GPT-2 of the same shape on the same random tokens, with AdamW and gradients clipped to 1.
"""

import ast
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench_cases import dataset
from bench_worker import Ready
from gpt2_model import GPT, PRESETS, GPTConfig, flops_per_token

Tokens = torch.Tensor
LossOf = Callable[[Tokens, Tokens], Tokens]


@dataclass(frozen=True)
class Work:
    """A step: `batch` sequences of `seq_len` tokens at once.

    Attributes:
        size: 124M, 350M, ..., changed by `fields`.
        precision: "fp32" or "bf16", under autocast.
        repositories: peers that are no packages: "nanoGPT" and "build-nanogpt", and where they are.
    """

    size: str
    batch: int
    seq_len: int
    precision: str
    device: str = "cpu"
    fields: dict[str, int] = field(default_factory=dict)
    repositories: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        """The model's shape."""
        preset = vars(PRESETS[self.size]) | {"block_size": max(1024, self.seq_len)}
        return GPTConfig(**{**preset, **self.fields})

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step: one on a CPU, as many as make 524,288 tokens on a GPU."""
        return max(1, 524_288 // (self.batch * self.seq_len)) if self.device == "cuda" else 1

    @property
    def sizes(self) -> dict[str, int]:
        """The shape's, by the names that all call them."""
        return {name: getattr(self.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}

    def ready(self, call: Callable[[], object], warm_up: int = 5) -> Ready:  # until the heap stays as it is
        """A step, and what bounds it."""
        tokens = self.accumulation * self.batch * self.seq_len
        cost = tokens * flops_per_token(self.config, self.seq_len)
        return Ready(call, tokens, f"matrix {self.precision}", cost, warm_up)


def refuse_emulation(work: Work) -> None:
    """ValueError if the precision is bf16 on a processor that has no instructions for it."""
    from gpt2_train.distributed import has_bf16

    if work.precision == "bf16" and not has_bf16(torch.device(work.device)):
        raise ValueError("this processor has no bf16 instructions")


def ours(
    work: Work, *, compile_mode: str = "", attention: str = "", pad: bool = True, fused: bool = True
) -> Ready:
    """Ours: `compile_mode` of torch.compile, "" for not compiled; `attention` by this of torch's kernels alone.

    pad: whether the compiler may pad what is no multiple of a matrix unit's width, as the vocabulary.
    fused: one kernel for all of AdamW; else one for each of its operations.
    """
    from gpt2_model.command import keep_buffers
    from gpt2_train import make_optimizer

    keep_buffers()
    torch.manual_seed(0)
    model = GPT(work.config).to(work.device)
    stepped: Any = model
    if compile_mode:
        torch._inductor.config.shape_padding = pad
        stepped = torch.compile(model, dynamic=False, mode=compile_mode)
    optimizer: torch.optim.Optimizer = make_optimizer(model, lr=1e-4)
    if not fused:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    return _stepping(work, model, optimizer, lambda x, y: stepped(x, y, return_logits=False)[1], attention)


def transformers(work: Work, *, compiled: bool = False, memory_kept: bool = False) -> Ready:
    """transformers' GPT2LMHeadModel, whose loss shifts the labels by one.

    memory_kept: a CPU's large tensors keep their memory, as gpt2-train has it and no peer by itself.
    """
    from gpt2_model.command import keep_buffers

    if memory_kept:
        keep_buffers()
    model, _ = _transformers_model(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    stepped = torch.compile(model, dynamic=False) if compiled else model
    return _stepping(work, model, optimizer, lambda x, y: stepped(x, labels=x, use_cache=False).loss)


def trainer(work: Work) -> Ready:
    """transformers' Trainer, compiled on a GPU: seconds between its steps, the first few left out."""
    model, library = _transformers_model(work)
    folder, steps = tempfile.mkdtemp(), 6 if work.device == "cpu" else 10
    ids = torch.randint(0, 50257, (steps * work.accumulation * work.batch, work.seq_len))  # one epoch
    rows = [{"input_ids": row, "labels": row} for row in ids]
    ends: list[float] = []

    class Clock(library.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if work.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    options = library.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=work.batch, optim="adamw_torch_fused",
        gradient_accumulation_steps=work.accumulation,
        bf16=work.precision == "bf16", torch_compile=work.device == "cuda", use_cpu=work.device == "cpu",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    def call() -> float:
        ends.clear()
        library.Trainer(model, options, train_dataset=rows, callbacks=[Clock()]).train()
        return statistics.median(after - before for before, after in pairwise(ends[1:]))

    return work.ready(call, warm_up=0)


def karpathy(work: Work, name: str) -> Ready:
    """nanoGPT's or build-nanogpt's model and optimizer, from the repository at hand, compiled on a GPU."""
    folder = Path(work.repositories[name])
    if work.config.vocab_size != 50257:
        raise ValueError(f"{name}: only with GPT-2's vocabulary")
    sys.path.insert(0, str(folder))
    if name == "nanoGPT":
        module = importlib.import_module("model")
        shape = module.GPTConfig(**work.sizes, vocab_size=50304, dropout=0.0, bias=True)
    else:
        module = _classes_of(folder / "train_gpt2.py")
        shape = module.GPTConfig(**work.sizes, vocab_size=50304)
    model = module.GPT(shape).to(work.device)
    if name == "nanoGPT":
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), work.device)
    else:
        optimizer = model.configure_optimizers(0.1, 1e-4, work.device)
    stepped: Any = torch.compile(model) if work.device == "cuda" else model
    torch.set_float32_matmul_precision("high")  # both do
    return _stepping(work, model, optimizer, lambda x, y: stepped(x, y)[1])


def products(work: Work) -> Ready:
    """The matrix products of a step alone: of each matrix forward, the gradient of its input, and its own."""
    config, kind = work.config, {"fp32": torch.float32, "bf16": torch.bfloat16}[work.precision]
    width, inner, rows = config.n_embd, config.mlp_dim, work.batch * work.seq_len
    layer = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    shapes = [*layer * config.n_layer, (config.vocab_size, width)]

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=work.device).to(kind)

    weights = [new(*shape) for shape in shapes]  # each its own, so that none is still in a cache
    sides = {side: new(rows, side) for shape in shapes for side in shape}
    results = {side: torch.empty_like(tensor) for side, tensor in sides.items()}
    gradients = {shape: torch.empty(shape, device=work.device, dtype=kind) for shape in set(shapes)}

    def call() -> None:  # without memory that a call has for the first time: an eighth of the head's products
        for weight, (out, into) in zip(weights, shapes, strict=True):
            torch.mm(sides[into], weight.t(), out=results[out])
            torch.mm(sides[out], weight, out=results[into])
            torch.mm(sides[out].t(), sides[into], out=gradients[out, into])
        if work.device == "cuda":
            torch.cuda.synchronize()

    cost = 6.0 * rows * sum(left * right for left, right in shapes)
    return Ready(call, rows, f"matrix {work.precision}", cost)


def whole_run(work: Work) -> Ready:
    """`gpt2-train` itself, with loader, logging and clipping: seconds from step to step, the first few left out.

    Each call is a run of its own, in this process.
    """
    from gpt2_train import TrainConfig, loop, train

    data = dataset(Path(tempfile.gettempdir()))  # bench_train's own
    step_tokens = work.accumulation * work.batch * work.seq_len
    steps, left_out = (16, 4) if work.device == "cuda" else (8, 2)
    begun: list[float] = []
    real: Callable[..., float] = vars(loop)["lr_at"]

    def noted(*args: Any, **options: Any) -> float:
        begun.append(time.perf_counter())  # once a step, at its beginning
        return real(*args, **options)

    vars(loop)["lr_at"] = noted

    def call() -> float:
        begun.clear()
        with tempfile.TemporaryDirectory() as out:
            train(TrainConfig(
                data=str(data), out=out, steps=steps, batch_tokens=step_tokens, seq_len=work.seq_len, warmup=2,
                micro_batch=str(work.batch), precision=work.precision, device=work.device, model=work.sizes,
                eval_every=0, checkpoint_every=0,
            ))  # fmt: skip
        return (begun[-1] - begun[left_out]) / (len(begun) - 1 - left_out)

    return work.ready(call, warm_up=0)


def check(work: Work) -> dict[str, float]:
    """How far a small model of ours is from transformers' on the device, in fp32, and compiled from not compiled.

    Returns:
        The largest difference of logits, of the loss, and of gradients over their largest; and of the loss in the
        precision asked for, compiled.

    Raises:
        ValueError: it is more than rounding.
    """
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 256}
    small = Work("124M", 2, 256, work.precision, work.device, sizes)
    torch.manual_seed(0)
    mine = GPT(small.config).to(work.device)
    peer, _ = _transformers_model(small)
    peer.transformer.load_state_dict(_transposed(mine), strict=True)
    x = torch.randint(0, 50257, (2, 257), device=work.device)
    x, y = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    logits, loss = mine(x, y)
    expected = peer(x).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    loss.backward()
    expected_loss.backward()  # type: ignore[no-untyped-call]
    gradient, wanted = mine.wte.weight.grad, peer.transformer.wte.weight.grad
    compiled: Any = torch.compile(mine, dynamic=False)
    with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"), torch.no_grad():
        plain, fast = (model(x, y, return_logits=False)[1] for model in (mine, compiled))
    found = {
        "logits": (logits - expected).abs().max().item(),
        "loss": (loss - expected_loss).abs().item(),
        "gradient": ((gradient - wanted).abs().max() / wanted.abs().max()).item(),
        "compiled": (plain - fast).abs().item(),
    }
    most = {"logits": 1e-3, "loss": 1e-4, "gradient": 1e-3, "compiled": 1e-2}
    if bad := [f"{name} by {found[name]:.2g}" for name in most if not found[name] <= most[name]]:
        raise ValueError(f"ours computes something else than transformers: {', '.join(bad)}")
    return found


def _transposed(model: GPT) -> dict[str, torch.Tensor]:
    """Ours as transformers keeps it, whose linear layers hold (in, out)."""
    linear = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {name: value.t() if name.endswith(linear) else value for name, value in model.state_dict().items()}


def _stepping(
    work: Work, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: LossOf, attention: str = ""
) -> Ready:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 50257, (work.batch, work.seq_len), generator=draw).to(work.device) for _ in "xy")

    def step() -> None:
        for _ in range(work.accumulation):
            with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = loss_of(x, y) / work.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if work.device == "cuda":
            torch.cuda.synchronize()

    def with_kernel() -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, attention)):
            step()

    return work.ready(with_kernel if attention else step)


def _transformers_model(work: Work) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise ValueError("transformers is not installed") from None
    shape = work.config
    config = library.GPT2Config(
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, n_positions=shape.block_size,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return library.GPT2LMHeadModel(config).to(work.device).train(), library


def _classes_of(path: Path) -> Any:
    """Of build-nanogpt's train_gpt2.py, which trains, and downloads, as soon as it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = ("math", "inspect", "dataclasses", "torch", "torch.nn")
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, ast.Import) and node.names[0].name in wanted)
        or (isinstance(node, ast.ImportFrom) and node.module in wanted)
    ]
    module = ModuleType("build_nanogpt")
    sys.modules["build_nanogpt"] = module  # dataclasses look there
    exec(compile(tree, str(path), "exec"), module.__dict__)
    module.__dict__["master_process"] = False  # it would print
    return module
