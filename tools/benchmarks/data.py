"""What is timed of data and of commands: building, loading and verifying datasets, and starting. Without torch."""

import glob
import hashlib
import importlib
import multiprocessing
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Bench, Ready, largest

SPLIT = ("--shard-size", "10M", "--val-tokens", "1M", "--order", "source")
SHARD_TOKENS, EOT = 10_000_000, 50256


def python_texts(size: int) -> list[str]:
    """The sources of Python's own library, as many as make `size` bytes."""
    texts, total = list[str](), 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if total > size:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        total += len(texts[-1].encode())
    return texts


def tokenizing(bench: Bench, library: str) -> Ready:
    """8 MB of Python's own sources in a process."""
    import pyarrow as pa

    encode_texts = importlib.import_module("gpt2_data.tokenizer").encode_texts  # not public, but in every version
    texts = python_texts(8_000_000)
    array = pa.array(texts, pa.large_string())
    return Ready(lambda: encode_texts(array, library), sum(len(text.encode()) for text in texts))


def corpus(bench: Bench, source: str, megabytes: int) -> list[str]:
    """Parquet files with a column `text`: those of a glob, else one of Python's sources, again and again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source:
        if files := sorted(glob.glob(source, recursive=True)):
            return files
        raise ValueError(f"no file matches {source!r}")
    file = bench.place("corpus.parquet")
    if not file.exists():
        texts = python_texts(min(20, megabytes) * 1_000_000)
        with pq.ParquetWriter(file, pa.schema([("text", pa.large_string())]), compression="zstd") as writer:
            for copy in range(-(-megabytes // 20)):
                random.Random(copy).shuffle(texts)
                writer.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), row_group_size=1000)
    return [str(file)]


def read_texts(files: Sequence[str]) -> Iterator[Any]:
    """The column `text` as Arrow arrays."""
    import pyarrow.parquet as pq

    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            yield batch.column(0).fill_null("")


def dataset(bench: Bench, source: str = "", megabytes: int = 0) -> Path:
    """Three million tokens of Python's own text, or those of a corpus, built once in the folder."""
    out = bench.place("corpus" if megabytes else "pydocs")
    if not out.exists():
        run_command(build(bench, corpus(bench, source, megabytes) if megabytes else ["pydocs"], out, "auto"))
    return out


def build(bench: Bench, sources: Sequence[str], out: Path, library: str) -> list[str]:
    """The command that builds a dataset. Python's own text is shuffled: its kinds lie one after the other."""
    more = ("--val-tokens", "200k", "--order", "shuffled") if sources == ["pydocs"] else SPLIT
    words = ["gpt2-data", "build", *sources, "--out", out, "--tokenizer", library, "--workers", bench.threads]
    return [str(word) for word in [*words, *more]]


def verify(folder: Path) -> list[str]:
    """The command that checks every hash of a dataset."""
    return ["gpt2-data", "verify", str(folder), "--level", "full"]


def run_command(words: Sequence[str], **environment: str) -> dict[str, float]:
    """Run a process; return its seconds and peak memory. Raises ValueError with the end of what it said."""
    program = Path(sysconfig.get_path("scripts")) / words[0]  # of this environment, activated or not
    command, started = [program if program.exists() else words[0], *words[1:]], time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | environment
    )
    assert process.stderr
    with process.stderr as stream:
        said = " ".join(stream.read().decode(errors="replace").split())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{words[0]} ended with {process.returncode}: {said[-300:]}")
    return {"seconds": seconds, "peak_memory": largest(usage)}


def building(
    bench: Bench, library: str = "auto", source: str = "", megabytes: int = 0, verified: bool = False
) -> Ready:
    """gpt2-data build of a corpus or of Python's own text; `verified`: and gpt2-data verify after it."""
    from gpt2_data import open_dataset

    files = corpus(bench, source, megabytes) if megabytes else ["pydocs"]
    amount = _megabytes(files) if megabytes else open_dataset(dataset(bench)).tokens("train")

    def commands(out: Path) -> list[list[str]]:
        return [build(bench, files, out, library), *([verify(out)] if verified else [])]

    def read(out: Path) -> list[NDArray[np.uint16]]:
        shards = open_dataset(out)
        return [shards.read(split, 0, shards.tokens(split)) for split in ("val", "train")]

    return _into_fresh_folder(bench, amount, commands, read)


def building_as_nanogpt(bench: Bench, source: str, megabytes: int, workers: int) -> Ready:
    """build-nanogpt's method in a process of its own."""
    files = corpus(bench, source, megabytes)

    def commands(out: Path) -> list[list[str]]:
        code = f"from benchmarks import data; data.build_nanogpt({files}, {workers}, {str(out)!r})"
        return [[sys.executable, "-c", code]]

    def read(out: Path) -> list[NDArray[np.uint16]]:
        return [np.load(file) for file in sorted(out.iterdir(), key=lambda file: file.name[-10:])]

    return _into_fresh_folder(bench, _megabytes(files), commands, read)


def _megabytes(files: Sequence[str]) -> float:
    import pyarrow.compute as pc

    return sum(pc.sum(pc.binary_length(texts)).as_py() or 0 for texts in read_texts(files)) / 1e6


def _into_fresh_folder(
    bench: Bench,
    amount: float,
    commands: Callable[[Path], list[list[str]]],
    read: Callable[[Path], list[NDArray[np.uint16]]],
) -> Ready:
    """Time commands that write to a folder; the answer is how many tokens, and 48 bits of their SHA-256."""

    def call() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            os.sync()  # what was written before must not slow this one
            out = Path(folder) / "out"
            done = [run_command(words) for words in commands(out)]
            tokens = np.concatenate(read(out))
        digest = hashlib.sha256(tokens.data).hexdigest()
        return {
            "seconds": sum(one["seconds"] for one in done),
            "peak_memory": max(one["peak_memory"] for one in done),
            "answer": {"tokens": [len(tokens), int(digest[:12], 16)]},
        }

    return Ready(call, amount, warm_up=1)


def build_nanogpt(files: list[str], workers: int, out: str) -> None:
    """build-nanogpt's fineweb.py: a pool over documents, whose tokens travel to the parent, which fills shards."""
    from gpt2_data import get_tokenizer

    get_tokenizer()  # forked workers have it then, as there
    shard, filled, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0
    Path(out).mkdir()

    def save(tokens: NDArray[np.uint16]) -> None:
        np.save(Path(out) / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy", tokens)

    forks = "fork" in multiprocessing.get_all_start_methods()
    texts = (text for column in read_texts(files) for text in column.to_pylist())
    with multiprocessing.get_context("fork" if forks else None).Pool(workers) as pool:
        for tokens in pool.imap(_tokenize, texts, chunksize=16):
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
    from gpt2_data import get_tokenizer

    array = np.array([EOT, *get_tokenizer().encode_ordinary(text)])
    assert (array >= 0).all()  # the reference's own checks
    assert (array < 2**16).all()
    return array.astype(np.uint16)


def loading(bench: Bench, source: str = "", megabytes: int = 0, prefetch: bool = False) -> Ready:
    """Batches of 64 x 1,024 tokens, shuffled, from the page cache, whose consumer does nothing."""
    from gpt2_data import TokenLoader

    batch, length, batches = 64, 1024, 40
    loader = TokenLoader(dataset(bench, source, megabytes), batch_size=batch, seq_len=length)
    stream: Any = loader.prefetch() if prefetch else loader
    tokens = batches * batch * length
    # A batch ends in two copies that make int64 of uint16: inputs and targets.
    return Ready(lambda: [None for _ in islice(stream, batches)], tokens, "copy", 2 * 8 * tokens)


def verifying(bench: Bench, source: str = "", megabytes: int = 0, program: Sequence[str] = ()) -> Ready:
    """Every hash of a dataset, by our function in this process, or by a program that hashes its files."""
    import gpt2_data

    data = dataset(bench, source, megabytes)
    files = sorted(str(file) for file in data.iterdir() if file.suffix in (".bin", ".docs"))
    size = sum(os.path.getsize(file) for file in files)
    words = verify(data) if program == ["gpt2-data"] else [*program, *files]
    by_us, by_program = lambda: gpt2_data.verify(data, "full", bench.threads), lambda: run_command(words)
    return Ready(by_program if program else by_us, size, "sha256", size)


def starting(bench: Bench, words: Sequence[str], fields: Mapping[str, int]) -> Ready:
    """A command from its start as a process to its end."""
    model = model_folder(bench, fields) if "{model}" in words else ""
    command = [word.format(model=model, device=bench.device) for word in words]
    return Ready(lambda: run_command(command), 1)


def model_folder(bench: Bench, fields: Mapping[str, int]) -> Path:
    """A model with random weights, 124M by default, saved once, by a process whose memory counts for nobody.

    As drawn, all tokens are about as likely: spread out, they give scores in which rounding has a scale.
    """
    path = bench.place("model")
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
