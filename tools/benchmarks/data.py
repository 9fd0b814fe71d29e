"""Cases of data and commands: building, loading and verifying datasets, and starting. None imports torch.

pyarrow is imported where it is needed: the loader does not need it, and its memory is measured.
"""

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpt2_data
from benchmarks.harness import Bench, Ready, largest

SHARD_TOKENS = 10_000_000


def python_texts(size: int) -> list[str]:
    """Return sources of Python's own library, as many files as fit in `size` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    ends = accumulate(file.stat().st_size for file in files)
    chosen = [file for file, end in zip(files, ends, strict=True) if end <= size]
    return [file.read_text(encoding="utf-8", errors="replace") for file in chosen]


def tokenizing(bench: Bench, library: str) -> Ready:
    """Time encoding 8 MB of Python's own sources in one process."""
    import pyarrow as pa

    from gpt2_data.tokenizer import encode_texts  # not public, but in every version

    texts = python_texts(8_000_000)
    array = pa.array(texts, pa.large_string())
    return Ready(lambda: encode_texts(array, library), sum(len(text.encode()) for text in texts))


def write_corpus(folder: str, megabytes: int) -> str:
    """Write a Parquet file with a column `text`: Python's own sources, repeated in other orders."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, path = python_texts(min(20, megabytes) * 1_000_000), f"{folder}/corpus.parquet"
    orders = [random.Random(copy).sample(texts, len(texts)) for copy in range(-(-megabytes // 20))]
    column = pa.array(chain.from_iterable(orders), pa.large_string())
    pq.write_table(pa.table({"text": column}), path, row_group_size=1000, compression="zstd")
    return path


def read_texts(files: Sequence[str]) -> Iterator[str]:
    """Yield the column `text` of Parquet files."""
    import pyarrow.parquet as pq

    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            yield from batch.column(0).fill_null("").to_pylist()


def megabytes_of(files: Sequence[str]) -> float:
    """Return the megabytes of text, in UTF-8."""
    return sum(len(text.encode()) for text in read_texts(files)) / 1e6


def dataset(bench: Bench, files: Sequence[str] = ()) -> Path:
    """Return a dataset of Python's own text (3M tokens) or of Parquet files, built once in the bench's folder."""
    out = Path(bench.folder, "dataset")
    if not out.exists():
        run_command(build(bench, files, out, "auto"))
    return out


def build(bench: Bench, files: Sequence[str], out: Path, library: str) -> list[str]:
    """Return the command that builds a dataset. Python's own text is shuffled, since it is sorted by kind."""
    own = ("pydocs", "--val-tokens", "200k", "--order", "shuffled")
    sources = (*files, "--shard-size", "10M", "--val-tokens", "1M", "--order", "source") if files else own
    words = ["gpt2-data", "build", *sources, "--out", out, "--tokenizer", library, "--workers", bench.threads]
    return list(map(str, words))


def run_command(words: Sequence[str], **environment: str) -> dict[str, float]:
    """Run a process; return its seconds and peak memory. Raises ValueError with the end of its output."""
    program = Path(sysconfig.get_path("scripts")) / words[0]  # of this environment, activated or not
    command, started = [program if program.exists() else words[0], *words[1:]], time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = " ".join(output.read().decode(errors="replace").split())
            raise ValueError(f"{words[0]} ended with {process.returncode}: {said[-300:]}")
    return {"seconds": seconds, "peak_memory": largest(usage)}


def building(bench: Bench, library: str = "auto", files: Sequence[str] = ()) -> Ready:
    """Time gpt2-data build of Parquet files, in megabytes, or of Python's own text, in tokens."""
    amount = megabytes_of(files) if files else gpt2_data.open_dataset(dataset(bench)).tokens("train")
    return into_fresh_folder(bench, amount, lambda out: build(bench, files, out, library))


def building_as_nanogpt(bench: Bench, files: Sequence[str], workers: int) -> Ready:
    """Time build-nanogpt's method in a process of its own."""
    code = f"from benchmarks import data; data.build_nanogpt({files}, {workers}, %r)"
    return into_fresh_folder(bench, megabytes_of(files), lambda out: [sys.executable, "-c", code % str(out)])


def into_fresh_folder(bench: Bench, amount: float, command: Callable[[Path], list[str]]) -> Ready:
    """Time a command that writes a dataset; the answer is how many tokens, and 48 bits of their SHA-256."""

    def call() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            os.sync()  # earlier writes must not slow this command
            out = Path(folder) / "out"
            done = run_command(command(out))
            shards = gpt2_data.open_dataset(out)
            tokens = np.concatenate([shards.read(split, 0, shards.tokens(split)) for split in ("val", "train")])
        digest = hashlib.sha256(tokens.data).hexdigest()
        return {**done, "answer": {"tokens": [len(tokens), int(digest[:12], 16)]}}

    return Ready(call, amount, warm_up=1)


def build_nanogpt(files: Sequence[str], workers: int, out: str) -> None:
    """Do what build-nanogpt's fineweb.py does: a pool tokenizes documents, and the parent fills shards."""
    gpt2_data.get_tokenizer()  # so that forked workers have it, as in fineweb.py
    shard, filled, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0
    Path(out).mkdir()

    def save(tokens: NDArray[np.uint16]) -> None:
        np.save(Path(out) / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy", tokens)

    forks = "fork" in multiprocessing.get_all_start_methods()
    with multiprocessing.get_context("fork" if forks else None).Pool(workers) as pool:
        for tokens in pool.imap(_tokenize, read_texts(files), chunksize=16):
            while filled + len(tokens) >= SHARD_TOKENS:
                fits = SHARD_TOKENS - filled
                shard[filled:] = tokens[:fits]
                save(shard)
                tokens, filled, number = tokens[fits:], 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        save(shard[:filled])


def _tokenize(text: str) -> NDArray[np.uint16]:
    array = np.array([gpt2_data.EOT, *gpt2_data.get_tokenizer().encode_ordinary(text)])
    assert (array >= 0).all()  # the reference's own checks
    assert (array < 2**16).all()
    return array.astype(np.uint16)


def loading(bench: Bench, files: Sequence[str] = ()) -> Ready:
    """Time shuffled batches of 64 x 1,024 tokens, from the page cache, for a consumer that does nothing."""
    batch, length, batches = 64, 1024, 40
    loader = gpt2_data.TokenLoader(dataset(bench, files), batch_size=batch, seq_len=length)
    tokens = batches * batch * length
    # A batch ends in two copies that make int64 of uint16: inputs and targets.
    return Ready(lambda: [None for _ in islice(loader, batches)], tokens, "copy", 2 * 8 * tokens)


def verifying(bench: Bench, files: Sequence[str] = (), program: str = "") -> Ready:
    """Time checking every hash of a dataset, by our function in this process or by a program."""
    data = dataset(bench, files)
    hashed = sorted(str(file) for file in data.iterdir() if file.suffix in (".bin", ".docs"))
    size = sum(map(os.path.getsize, hashed))
    if program:
        words = ["verify", str(data), "--level", "full"] if program == "gpt2-data" else hashed
        return Ready(lambda: run_command([program, *words]), size, "sha256", size)
    return Ready(lambda: gpt2_data.verify(data, "full", bench.threads), size, "sha256", size)


def starting(bench: Bench, words: Sequence[str]) -> Ready:
    """Time a command from the start of its process to its end."""
    model = model_folder(bench, {}) if "{model}" in words else ""
    command = [word.format(model=model, device=bench.device) for word in words]
    return Ready(lambda: run_command(command), 1)


def model_folder(bench: Bench, fields: Mapping[str, int]) -> Path:
    """Return a model with random weights, 124M by default, saved once, by a process whose memory is not counted.

    Its embedding is scaled up: otherwise all tokens would be about as likely, and scores would hardly differ.
    """
    path = Path(bench.folder, "model")
    if not path.exists():
        code = f"""
import torch
from gpt2_model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(**{dict(fields)}))
model.wte.weight.data.mul_(4)
model.save_pretrained({str(path)!r})"""
        subprocess.run([sys.executable, "-c", code], check=True)
    return path
