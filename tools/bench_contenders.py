"""What `bench.py decode` times, as it runs inside the processes of its own that bench_decode.py starts.

Each contender is loaded there once a precision, and waits while another is timed.
"""

import importlib
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

PROMPT_TOKENS, TOP_K, EOT = 16, 50, 50256
READ_BYTES, PASSES = 512 << 20, 8
READER = """
#include <stddef.h>
#include <stdint.h>
typedef uint64_t lanes __attribute__((vector_size(64)));
uint64_t read_all(const lanes *p, size_t n) {  // n a multiple of 4
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < n; i += 4) {
        for (int j = 0; j < 4; j++) __builtin_prefetch(p + i + 32 + j);
        a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}
"""


class Absent(Exception):
    """Why a contender has nothing to show: said in the report, and no failure."""


class Contender(Protocol):
    """A model that continues prompts."""

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> Sequence[Sequence[int]]:
        """The new tokens of each prompt, `new_tokens` of them, sampled with top-k TOP_K."""


class Ours:
    def __init__(self, work: Path, precision: str, threads: int, device: str, compiled: bool = False) -> None:
        import torch

        from gpt2_model import GPT

        torch.set_num_threads(threads)
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
        self._model = GPT.from_pretrained(work / "model", dtype=kinds[precision]).to(device)
        self._options = {"compile": True} if compiled else {}

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> Sequence[Sequence[int]]:
        from gpt2_model import generate

        options: dict[str, Any] = {"top_k": TOP_K, "stop_ids": (), "seed": seed, **self._options}
        return [row.tokens for row in generate(self._model, prompts, max_new_tokens=new_tokens, **options)]


class OursCompiled(Ours):
    def __init__(self, work: Path, precision: str, threads: int, device: str) -> None:
        super().__init__(work, precision, threads, device, compiled=True)


class Transformers:
    def __init__(self, work: Path, precision: str, threads: int, device: str) -> None:
        import torch

        transformers = _library("transformers")
        if precision == "int8":
            raise Absent("no int8 for CPUs")
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self._torch, self._device = torch, device
        self._model = transformers.GPT2LMHeadModel.from_pretrained(work / "model", dtype=kind).to(device)
        self._model.generation_config.eos_token_id = None  # no end, and none to be masked at each token

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> Sequence[Sequence[int]]:
        self._torch.manual_seed(seed)
        ids = self._torch.tensor(prompts, device=self._device)
        options = {"do_sample": True, "top_k": TOP_K, "max_new_tokens": new_tokens, "pad_token_id": EOT}
        tokens = self._model.generate(ids, attention_mask=self._torch.ones_like(ids), **options)
        rows: list[list[int]] = tokens[:, ids.shape[1] :].tolist()
        return rows


class CTranslate2:
    def __init__(self, work: Path, precision: str, threads: int, device: str) -> None:
        library = _library("ctranslate2")
        kind = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[precision]
        if kind not in library.get_supported_compute_types(device):
            raise Absent(f"no {kind} on this machine")
        if not (work / "ctranslate2").exists():
            _library("transformers").utils.logging.disable_progress_bar()
            convert = _library("ctranslate2.converters").TransformersConverter(str(work / "model"))
            convert.convert(str(work / "ctranslate2"), force=True)
        options = {"compute_type": kind, "intra_threads": threads, "inter_threads": 1}
        self._model = library.Generator(str(work / "ctranslate2"), device=device, **options)
        self._words = json.loads((work / "ctranslate2" / "vocabulary.json").read_text(encoding="utf-8"))
        self._set_seed = library.set_random_seed

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> Sequence[Sequence[int]]:
        self._set_seed(seed + 1)
        words = [[self._words[token] for token in prompt] for prompt in prompts]
        options = {"max_length": new_tokens, "min_length": new_tokens, "sampling_topk": TOP_K}
        results = self._model.generate_batch(words, include_prompt_in_result=False, **options)
        return [result.sequences_ids[0] for result in results]


CONTENDERS: dict[str, Callable[[Path, str, int, str], Contender]] = {
    "ours": Ours,
    "ours, compiled": OursCompiled,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
}
_loaded: dict[str, Contender] = {}  # by precision: a process has one contender
_readers: list[Callable[[], object]] = []


def make_model(work: Path, fields: dict[str, Any], device: str) -> dict[str, int]:
    """A model folder with random weights, `work`/model.

    Returns:
        Its sizes: "parameters", and "parameters_read", all but the positions, which a token needs every one of.

    Raises:
        ValueError: fields that are no GPT-2's, or a device that is not there.
    """
    import torch

    from gpt2_model import GPT, GPTConfig

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not to be had here: leave -d out to measure the CPU")
    config = GPTConfig(**fields)
    torch.manual_seed(0)
    GPT(config).save_pretrained(work / "model")
    shutil.rmtree(work / "ctranslate2", ignore_errors=True)  # of another model
    read = config.num_parameters - config.block_size * config.n_embd
    return {"parameters": config.num_parameters, "parameters_read": read}


def load(name: str, work: Path, precision: str, threads: int, device: str) -> str | None:
    """Load a contender. Returns why not, where it is absent."""
    try:
        _loaded[precision] = CONTENDERS[name](work, precision, threads, device)
    except Absent as reason:
        return str(reason)
    return None


def warm_up(precision: str, batch: int, new_tokens: int) -> None:
    """Generate once, unmeasured."""
    _loaded[precision].generate(_prompts(batch, 0), new_tokens, 0)


def time_generation(precision: str, batch: int, new_tokens: int, seed: int) -> dict[str, float]:
    """One sample: {"tokens_per_second" of the batch, "seconds_to_first_token"}.

    The time to the first token is that of a call for one, the median of three. The speed is of those after it:
    (new_tokens - 1) * batch / (time of a call for all - time to the first).

    Raises:
        ValueError: too few new tokens for a difference.
    """
    prompts, model = _prompts(batch, seed), _loaded[precision]
    for _ in range(5):
        first = statistics.median(_timed(model, prompts, 1, seed) for _ in range(3))
        rest = _timed(model, prompts, new_tokens, seed) - first
        if rest > 0:
            return {"tokens_per_second": (new_tokens - 1) * batch / rest, "seconds_to_first_token": first}
    raise ValueError(f"{new_tokens} tokens take no longer than 1 here: ask for more with --new-tokens")


def _timed(model: Contender, prompts: list[list[int]], new_tokens: int, seed: int) -> float:
    started = time.perf_counter()
    rows = model.generate(prompts, new_tokens, seed)
    seconds = time.perf_counter() - started
    assert [len(row) for row in rows] == [new_tokens] * len(prompts), "a contender drew another number of tokens"
    return seconds


def _prompts(batch: int, seed: int) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(EOT) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


def open_memory(work: Path, threads: int) -> str:
    """Make ready to read memory that has been written: with a C loop, or with PyTorch where nothing compiles one.

    Returns:
        What reads.
    """
    import numpy as np
    import torch

    buffer = np.ones(READ_BYTES // 4, dtype=np.float32)  # written; NumPy asks for large pages, which read faster
    installed = [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))]
    compiler = shlex.split(os.environ.get("CC", "")) or installed[:1]
    if compiler and (read_all := _compile_reader(work, compiler)):
        pool, part = ThreadPoolExecutor(threads), (READ_BYTES - 64) // threads // 256 * 256
        start = buffer.ctypes.data + -buffer.ctypes.data % 64
        places = [start + part * number for number in range(threads)]
        _readers.append(lambda: (buffer, list(pool.map(read_all, places, [part // 64] * threads))))
        return f"C, {Path(compiler[0]).name} -O3"
    torch.set_num_threads(threads)
    whole = torch.from_numpy(buffer)
    rows, weights = whole.view(-1, 4096), torch.ones(4096)
    _readers.extend([whole.sum, lambda: torch.dot(whole, whole), lambda: torch.mv(rows, weights)])
    return "PyTorch (no C compiler), which may read slower than the machine can"


def read_memory() -> float:
    """Memory read bandwidth in GB/s: the fastest of PASSES passes over the buffer by each reader."""
    seconds = []
    for reader in _readers * PASSES:
        started = time.perf_counter()
        reader()
        seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds) / 1e9


def _compile_reader(work: Path, compiler: list[str]) -> Callable[[int, int], int] | None:
    import ctypes

    source, library = work / "reader.c", work / "reader.so"
    source.write_text(READER, encoding="utf-8")
    for target in ("-march=native", "-mcpu=native"):
        command = [*compiler, "-O3", target, "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            function = ctypes.CDLL(str(library)).read_all
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
            read: Callable[[int, int], int] = function
            return read
    return None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Absent(f"{name.partition('.')[0]} is not installed") from None
