"""engine.c from Python: compiled once by the machine's own C compiler, then one call per token.

Without a compiler generation runs on PyTorch's operations, at about two thirds of the speed; int8 as fp32.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2_model.cache import KVCache
from gpt2_model.config import ACTIVATIONS
from gpt2_model.cpu.int8 import Int8Matrix
from gpt2_model.model import GPT, Block

SOURCES = ("engine.c", "engine_math.h")
# No -ffast-math: it lets the compiler reorder sums, and a row's logits would depend on the rows beside it.
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-Wno-psabi", "-lm", "-lpthread")
PREFILL = 256  # tokens of prompts that go through the engine at once: enough to be bound by arithmetic
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Unavailable(RuntimeError):
    """The engine cannot be used here; the message says why."""


def weight_type(model: GPT) -> torch.dtype:
    """Return the type in which the model's matrices are stored, int8 after `quantize`."""
    return torch.int8 if isinstance(model.wte, Int8Matrix) else model.wte.weight.dtype


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the engine for weights of one type, from the user's cache folder; first compile it there, in 2 s."""
    if dtype not in TYPES:
        raise Unavailable(f"the CPU engine does not support {dtype}")
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    try:
        compile = shlex.split(os.environ.get("CC", "")) or [compiler]
        command = [*compile, f"-DTYPE={TYPES[dtype]}", target, str(sources[0]), *FLAGS]
        # A home folder may be shared by machines of several kinds: the processor's abilities are part of the name.
        identity = repr([*command, _processor(), [source.read_bytes() for source in sources]])
        with _cache_folder() as folder:
            path = Path(folder, f"engine-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so")
            if not path.exists():
                _compile(command, path)
            engine = ctypes.CDLL(str(path))
    except (OSError, ValueError) as error:  # ValueError: quotes in CC that do not end
        raise Unavailable(f"no C compiler (CC, cc, gcc or clang) could compile the engine: {error}") from None
    engine.gpt2_start.restype = c_void_p
    engine.gpt2_start.argtypes = [c_void_p, ctypes.c_int]
    engine.gpt2_forward.argtypes = [c_void_p, c_void_p]
    engine.gpt2_stop.argtypes = [c_void_p]
    return engine


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # which Linux has
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> AbstractContextManager[Path | str]:
    """Return the user's cache folder if nobody else may write there, else one that goes after the loading."""
    with suppress(OSError, RuntimeError):  # no home is a RuntimeError
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-model"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        mine = os.name == "nt" or status.st_uid == os.getuid()  # Windows has no user numbers
        if mine and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return nullcontext(folder)
    return tempfile.TemporaryDirectory(prefix="gpt2-model-")


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{command[0]}: {' '.join((done.stderr or 'failed').split())[-300:]}")
        temporary.replace(path)


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Matrix(ctypes.Structure):
    _fields_ = _fields(c_void_p, "weight scale sums bias") + _fields(c_int64, "outs ins")


class _Norm(ctypes.Structure):
    _fields_ = _fields(c_void_p, "weight bias")


class _Layer(ctypes.Structure):
    _fields_ = (
        _fields(_Norm, "ln_1 ln_2")
        + _fields(_Matrix, "c_attn attn_c_proj c_fc mlp_c_proj")
        + _fields(c_double, "attention_scale")
    )


class _Model(ctypes.Structure):
    _fields_ = (
        _fields(c_int64, "n_layer n_head n_embd n_inner activation")
        + _fields(c_double, "epsilon")
        + _fields(ctypes.POINTER(_Layer), "layers")
        + _fields(_Matrix, "wte head")
        + _fields(c_void_p, "wpe")
        + _fields(_Norm, "ln_f")
    )


class _Call(ctypes.Structure):
    _fields_ = _fields(c_int64, "rows batch capacity groups") + _fields(
        c_void_p, "tokens sequences positions starts keys values logits"
    )


class EngineDecoder:
    """A TorchDecoder by engine.c, for rows of up to `capacity` tokens. A row's logits are bit-equal in any batch.

    The engine gets pointers to the model's weights (on the CPU, in fp32, bf16 or int8): leave them where they are
    while the decoder lives. Raises `Unavailable`, see `library`.
    """

    def __init__(self, model: GPT, capacity: int) -> None:
        self._library = library(weight_type(model))
        self._model, self._capacity = model, capacity
        self._rows: list[int] = []  # row of the cache for each of ours
        self._owners: list[object] = []  # of the memory that the pointers point to
        config = model.config
        layers = (_Layer * config.n_layer)()
        for layer, block in zip(layers, model.h, strict=True):
            assert isinstance(block, Block)
            layer.ln_1, layer.ln_2 = self._norm(block.ln_1), self._norm(block.ln_2)
            layer.c_attn, layer.attn_c_proj = self._matrix(block.attn.c_attn), self._matrix(block.attn.c_proj)
            layer.c_fc, layer.mlp_c_proj = self._matrix(block.mlp.c_fc), self._matrix(block.mlp.c_proj)
            layer.attention_scale = block.attn.scale
        wte = self._matrix(model.wte)
        self._pointers = _Model(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_inner=config.mlp_dim,
            activation=ACTIVATIONS.index(config.activation_function),
            epsilon=config.layer_norm_epsilon,
            layers=layers,
            wte=wte,
            head=wte if model.lm_head is None else self._matrix(model.lm_head),
            wpe=self._floats(model.wpe.weight),
            ln_f=self._norm(model.ln_f),
        )
        self._team = self._library.gpt2_start(ctypes.addressof(self._pointers), torch.get_num_threads())
        if not self._team:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "_team", None):  # end the threads
            self._library.gpt2_stop(self._team)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._cache = KVCache(self._model, len(prompts), self._capacity, torch.float32, zeroed=False)
        self._rows, self._lengths = list(range(len(prompts))), [0] * len(prompts)
        return self._append(self._rows, prompts)

    def select(self, rows: Sequence[int]) -> None:
        if len(set(rows)) < len(rows):
            self._cache.select([self._rows[row] for row in rows])
            self._rows = list(range(len(rows)))
        else:  # rows that leave only lose their place: nothing is copied
            self._rows = [self._rows[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._call([(row, [token]) for row, token in enumerate(tokens)])

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        self._lengths[row] = 0
        self._append([row], [tokens])

    def _append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows, PREFILL at most per call, so that long prompts need little memory."""
        calls: list[list[tuple[int, Sequence[int]]]] = [[]]
        for row, ids in zip(rows, tokens, strict=True):
            for start in range(0, len(ids), PREFILL):
                piece = ids[start : start + PREFILL]
                if sum(len(other) for _, other in calls[-1]) + len(piece) > PREFILL:
                    calls.append([])
                calls[-1].append((row, piece))
        last: dict[int, Tensor] = {}  # row -> its logits so far
        for call in calls:
            last |= zip([row for row, _ in call], self._call(call), strict=True)
        return torch.stack([last[row] for row in rows])

    def _call(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Append tokens to rows, (row, ids) each; return the logits that follow, (pieces, vocab_size) in fp32."""
        tokens = [token for _, ids in pieces for token in ids]
        sequences = [self._rows[row] for row, ids in pieces for _ in ids]
        positions = [self._lengths[row] + place for row, ids in pieces for place in range(len(ids))]
        starts = [0, *accumulate(len(ids) for _, ids in pieces)]
        assert max(positions) < self._capacity
        for row, ids in pieces:
            self._lengths[row] += len(ids)
        arrays = [(ctypes.c_int64 * len(numbers))(*numbers) for numbers in (tokens, sequences, positions, starts)]
        logits = torch.empty(len(pieces), self._model.config.vocab_size)
        keys, values = self._cache.keys, self._cache.values
        call = _Call(
            len(tokens), keys.shape[1], keys.shape[3], len(pieces), *map(ctypes.addressof, arrays),
            keys.data_ptr(), values.data_ptr(), logits.data_ptr(),
        )  # fmt: skip
        if self._library.gpt2_forward(self._team, ctypes.addressof(call)):
            raise MemoryError
        return logits

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._floats(norm.weight), self._floats(norm.bias))

    def _floats(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self._owners.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, module: nn.Module) -> _Matrix:
        bias = getattr(module, "bias", None)
        address = None if bias is None else self._floats(bias)
        if isinstance(module, Int8Matrix):
            self._owners.append(module)
            pointers = [getattr(module, name).data_ptr() for name in ("packed", "scale", "sums")]
            return _Matrix(*pointers, address, module.outs, module.ins)
        assert isinstance(module.weight, Tensor)
        weight = module.weight.detach().contiguous()
        self._owners.append(weight)
        return _Matrix(weight.data_ptr(), None, None, address, *weight.shape)
