"""engine.c from Python: compiled once by the machine's own C compiler, then one call per token.

Without a compiler, generation runs on PyTorch at about two thirds of the speed, and int8 weights become fp32.
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
from functools import cache
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from struct import pack

import torch
from torch import Tensor, nn

from gpt2_model.command import cache_folder
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
    """Return the engine for weights of one type from the user's cache folder; compile it first if needed (3 s)."""
    if dtype not in TYPES:
        raise Unavailable(f"the CPU engine does not support {dtype}")
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    try:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
        command = [*shlex.split(compiler), f"-DTYPE={TYPES[dtype]}", target, str(sources[0]), *FLAGS]
        # Machines of several kinds may share a home folder, so the processor's features are part of the name.
        identity = repr([*command, _processor(), [source.read_bytes() for source in sources]])
        with _cache_folder() as folder:
            path = Path(folder, f"engine-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so")
            if not path.exists():
                _compile(command, path)
            engine = ctypes.CDLL(str(path))
    except (OSError, ValueError) as error:  # ValueError: unclosed quotes in CC
        raise Unavailable(f"no C compiler (CC, cc, gcc or clang) could compile the engine: {error}") from None
    engine.gpt2_start.restype = ctypes.c_void_p
    engine.gpt2_start.argtypes = [ctypes.c_void_p, ctypes.c_int]
    engine.gpt2_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    engine.gpt2_stop.argtypes = [ctypes.c_void_p]
    return engine


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # on Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> AbstractContextManager[Path | str]:
    """Return the user's cache folder if nobody else may write there, else one that is deleted after loading."""
    folder = cache_folder("gpt2-model")
    with suppress(OSError):
        if folder is None:
            raise FileNotFoundError
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()  # Windows has no user ids
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


class EngineDecoder:
    """TorchDecoder's methods by engine.c, for rows of up to `capacity` tokens; logits are bit-equal in any batch.

    The engine gets pointers to the model's weights (on the CPU, in fp32, bf16 or int8): do not replace the weights
    while the decoder lives. `pack` writes the structs of engine.c, whose fields have 8 bytes each.
    Raises `Unavailable`, as `library` does.
    """

    def __init__(self, model: GPT, capacity: int) -> None:
        self._library = library(weight_type(model))
        self._config, self._capacity = model.config, capacity
        self._rows: list[int] = []  # the row of the cache for each of our rows
        self._owners: list[object] = []  # they keep the memory that the pointers point to
        config = model.config
        self._layers = ctypes.create_string_buffer(b"".join(map(self._layer, model.h)))
        wte = self._matrix(model.wte)
        head = wte if model.lm_head is None else self._matrix(model.lm_head)
        sizes = (config.n_layer, config.n_head, config.n_embd, config.mlp_dim)
        activation, epsilon = ACTIVATIONS.index(config.activation_function), config.layer_norm_epsilon
        start = pack("5qdP", *sizes, activation, epsilon, ctypes.addressof(self._layers))
        wpe, ln_f = pack("P", self._floats(model.wpe.weight)), self._norm(model.ln_f)
        self._model = ctypes.create_string_buffer(start + wte + head + wpe + ln_f)
        self._team = self._library.gpt2_start(self._model, torch.get_num_threads())
        if not self._team:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "_team", None):  # end the threads
            self._library.gpt2_stop(self._team)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        config = self._config
        shape = (2, config.n_layer, len(prompts), config.n_head, self._capacity, config.head_dim)
        self._keys, self._values = torch.empty(shape, dtype=torch.float32)
        self._rows, self._lengths = list(range(len(prompts))), [0] * len(prompts)
        return self._append(self._rows, prompts)

    def select(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        if len(set(rows)) < len(rows):  # else rows are only dropped, and nothing is copied
            self._keys, self._values = self._keys[:, self._rows], self._values[:, self._rows]
            self._rows = list(range(len(rows)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._call([(row, [token]) for row, token in enumerate(tokens)])

    def refill(self, row: int, tokens: Sequence[int]) -> None:
        self._lengths[row] = 0
        self._append([row], [tokens])

    def _append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows, at most PREFILL per call, so that long prompts need little memory."""
        pairs = [(row, token) for row, ids in zip(rows, tokens, strict=True) for token in ids]
        last: dict[int, Tensor] = {}  # row -> its logits so far
        for start in range(0, len(pairs), PREFILL):
            by_row = groupby(pairs[start : start + PREFILL], key=itemgetter(0))
            pieces = [(row, [token for _, token in group]) for row, group in by_row]
            last |= zip([row for row, _ in pieces], self._call(pieces), strict=True)
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
        logits = torch.empty(len(pieces), self._config.vocab_size, dtype=torch.float32)
        sizes = (len(tokens), self._keys.shape[1], self._capacity, len(pieces))
        tensors = (self._keys.data_ptr(), self._values.data_ptr(), logits.data_ptr())
        call = pack("4q7P", *sizes, *map(ctypes.addressof, arrays), *tensors)  # struct Call
        if self._library.gpt2_forward(self._team, call):
            raise MemoryError
        return logits

    def _layer(self, block: nn.Module) -> bytes:
        assert isinstance(block, Block)
        matrices = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        norms = self._norm(block.ln_1) + self._norm(block.ln_2)
        return norms + b"".join(map(self._matrix, matrices)) + pack("d", block.attn.scale)  # struct Layer

    def _norm(self, norm: nn.LayerNorm) -> bytes:
        return pack("2P", self._floats(norm.weight), self._floats(norm.bias))

    def _floats(self, tensor: Tensor) -> int:
        tensor = tensor.detach().float().contiguous()
        self._owners.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, module: nn.Module) -> bytes:
        bias = getattr(module, "bias", None)
        address = 0 if bias is None else self._floats(bias)
        if isinstance(module, Int8Matrix):
            self._owners.append(module)
            pointers = [getattr(module, name).data_ptr() for name in ("packed", "scale", "sums")]
            return pack("4P2q", *pointers, address, module.outs, module.ins)
        assert isinstance(module.weight, Tensor)
        weight = module.weight.detach().contiguous()
        self._owners.append(weight)
        return pack("4P2q", weight.data_ptr(), 0, 0, address, *weight.shape)
