"""What `bench.py data` times beside our own commands: python tools/bench_data_peers.py FUNCTION ARGUMENTS(JSON).

A process of its own each time, whose last line of output is the function's result as JSON. The peers are those
methods told in our own words, without what costs them time and is not needed here, such as a progress bar.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_data.tokenizer import EOT, get_tokenizer

SHARD_TOKENS = 10_000_000
_PIECE = 4_000_000  # bytes of text for one call of gigatoken, as in a build
_TOKENS = 50_000_000  # of a measurement of the loader: a quarter of a second or so
_barriers: list[Barrier] = []  # of a process of `alone`, where they start together


def build_nanogpt(files: list[str], out: str, workers: int) -> None:
    """The method of build-nanogpt's fineweb.py: a pool over documents, whose tokens travel to the parent as
    arrays; it fills shards, the first for validation, and saves them as .npy."""
    get_tokenizer()  # made once: forked workers have it then, as there
    forks = "fork" in multiprocessing.get_all_start_methods()
    shard, filled, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0

    def save(tokens: NDArray[np.uint16]) -> None:
        np.save(Path(out) / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy", tokens)

    with multiprocessing.get_context("fork" if forks else None).Pool(workers) as pool:
        for tokens in pool.imap(_tokenize, _texts(files), chunksize=16):
            while filled + len(tokens) >= SHARD_TOKENS:
                fits = SHARD_TOKENS - filled
                shard[filled:] = tokens[:fits]
                save(shard)
                tokens, filled, number = tokens[fits:], 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        save(shard[:filled])


def _texts(files: Iterable[str]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _tokenize(text: str) -> NDArray[np.uint16]:
    tokens = [EOT]
    tokens.extend(get_tokenizer().encode_ordinary(text))
    array = np.array(tokens)
    assert (array >= 0).all() and (array < 2**16).all()  # noqa: PT018  the reference's own check
    return array.astype(np.uint16)


def datasets_map(files: list[str], out: str, workers: int, tokenizer: str) -> None:
    """`datasets.map` with transformers' fast tokenizer, then one file of uint16, as nanoGPT's prepare.py writes
    it: EOT behind each document."""
    os.environ |= {"HF_HOME": out, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets

    transformers: Any = importlib.import_module("transformers")  # its types leave out what it loads late

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # it warns of documents longer than the model's context
    encoder = transformers.GPT2TokenizerFast.from_pretrained(tokenizer)
    encoder.backend_tokenizer.encode_special_tokens = True  # the literal <|endoftext|> is text, as with tiktoken

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [text or "" for text in batch["text"]]
        ids = [[*ids, EOT] for ids in encoder(texts, return_attention_mask=False)["input_ids"]]
        return {"ids": ids, "len": [len(row) for row in ids]}

    options: dict[str, Any] = {"columns": ["text"], "split": "train", "cache_dir": str(Path(out) / "cache")}
    readers, mappers = (count if count > 1 else None for count in (min(workers, len(files)), workers))
    texts = datasets.load_dataset("parquet", data_files=files, num_proc=readers, **options)
    encoded = texts.map(encode, batched=True, num_proc=mappers, remove_columns=["text"])
    encoded = encoded.with_format("numpy")
    tokens = np.memmap(Path(out) / "train.bin", np.uint16, "w+", shape=(int(encoded["len"][:].sum()),))
    parts, filled = min(1024, len(encoded)), 0
    for part in range(parts):
        batch = np.concatenate(encoded.shard(parts, part, contiguous=True)[:]["ids"])
        tokens[filled : filled + len(batch)] = batch
        filled += len(batch)
    tokens.flush()


def alone(library: str, files: list[str], workers: int) -> dict[str, float]:
    """A tokenizer library on text in memory, in as many processes at once, and nothing done with the tokens.

    Returns:
        MB/s of all of them, from the first one's start to the last one's end: "LIBRARY alone"; of gigatoken that
        is a second pass, when its cache is warm, beside "gigatoken alone, first pass".
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, _keep, (barrier,)) as pool:
        shares = [pool.submit(_alone, library, files, number, workers) for number in range(workers)]
        sizes, spans = zip(*(share.result() for share in shares), strict=True)
    passes = []
    for of_processes in zip(*spans, strict=True):
        starts, ends = zip(*of_processes, strict=True)
        passes.append(sum(sizes) / (max(ends) - min(starts)) / 1e6)
    names = [f"{library} alone, first pass", f"{library} alone"]
    return dict(zip(names[-len(passes) :], passes, strict=True))


def _keep(barrier: Barrier) -> None:
    _barriers.append(barrier)


def _alone(library: str, files: list[str], number: int, workers: int) -> tuple[int, list[tuple[float, float]]]:
    """The bytes that one process encoded in a pass, and when each pass started and ended."""
    from gpt2_data.gigatoken import Encoder
    from gpt2_data.tokenizer import text_buffers, token_ranks

    texts = _share(files, number, workers)
    data, offsets = text_buffers(texts)
    if library == "tiktoken":
        strings, encode = texts.to_pylist(), get_tokenizer().encode_to_numpy
        encode("Warm.", disallowed_special=())
        _barriers[0].wait()
        started = time.perf_counter()
        for text in strings:
            encode(text, disallowed_special=())
        return len(data), [(started, time.perf_counter())]
    encoder, spans = Encoder(token_ranks()), []
    borders = [0]  # of pieces: whole documents
    while borders[-1] < len(texts):
        fits = int(np.searchsorted(offsets, offsets[borders[-1]] + _PIECE, "right")) - 1
        borders.append(max(fits, borders[-1] + 1))
    for _ in range(2):
        _barriers[0].wait()
        started = time.perf_counter()
        for start, stop in itertools.pairwise(borders):
            piece = offsets[start : stop + 1]
            encoder.encode(data[piece[0] : piece[-1]], piece - piece[0])
        spans.append((started, time.perf_counter()))
    return len(data), spans


def _share(files: list[str], number: int, workers: int) -> Any:
    """Every so-manieth 64 documents, as one Arrow array of large strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = [pa.array([], pa.large_string())]
    for file in files:
        for i, batch in enumerate(pq.ParquetFile(file).iter_batches(64, columns=["text"])):
            if i % workers == number:
                kept.append(batch.column(0).cast(pa.large_string()).fill_null(""))
    return pa.concat_arrays(kept)


def loader(dataset: str, batch_size: int, seq_len: int) -> dict[str, float]:
    """Tokens a second of TokenLoader, shuffled, whose consumer does nothing with them.

    Returns:
        "plain": the iterator; "prefetch": the same through a thread; "copies": only what each batch ends with, the
        two copies that make int64 of uint16, of tokens in the cache into arrays that are there.
    """
    from gpt2_data import TokenLoader

    tokens = np.zeros((batch_size, seq_len + 1), np.uint16)
    x, y = np.empty((batch_size, seq_len), np.int64), np.empty((batch_size, seq_len), np.int64)

    def copies() -> Iterator[None]:
        while True:
            np.copyto(x, tokens[:, :-1])
            np.copyto(y, tokens[:, 1:])
            yield

    plain = TokenLoader(dataset, batch_size=batch_size, seq_len=seq_len)
    with TokenLoader(dataset, batch_size=batch_size, seq_len=seq_len).prefetch() as prefetch:
        contenders: dict[str, Iterator[Any]] = {"copies": copies(), "plain": plain, "prefetch": prefetch}
        return {name: _speed(batches, batch_size * seq_len) for name, batches in contenders.items()}


def _speed(batches: Iterator[Any], tokens: int) -> float:
    """Tokens a second, after as many unmeasured ones."""
    count, started = max(1, _TOKENS // tokens), 0.0
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
    return count * tokens / (time.perf_counter() - started)


def verify_alone(dataset: str) -> float:
    """Seconds of `verify` at level full with one worker; the function alone, without a process's start."""
    from gpt2_data import verify

    started = time.perf_counter()
    report = verify(dataset, "full", workers=1)
    assert report.ok, report.problems
    return time.perf_counter() - started


def write_tokenizer(folder: str) -> None:
    """GPT-2's tokenizer as transformers reads it, without a network."""
    from gpt2_model import GPTConfig
    from gpt2_model.checkpoints.huggingface import tokenizer_files

    for name, content in tokenizer_files(GPTConfig()).items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (Path(folder) / name).write_bytes(data)


def write_corpus(file: str, megabytes: int) -> int:
    """Python's own text as one Parquet file, again and again in other orders until there is enough of it.

    Returns:
        How many times, rounded up.
    """
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    from gpt2_data.sources.pydocs import documents

    texts, size, copies = [text for _, text in documents()], 0, 0
    with pq.ParquetWriter(file, pa.schema([("text", pa.large_string())]), compression="zstd") as writer:
        while size < megabytes * 1_000_000:
            random.Random(copies).shuffle(texts)
            kept = []
            for text in texts:
                if size >= megabytes * 1_000_000:
                    break
                kept.append(text)
                size += len(text.encode())
            writer.write_table(pa.table({"text": pa.array(kept, pa.large_string())}), row_group_size=1000)
            copies += 1
    return copies


FUNCTIONS = (
    build_nanogpt, datasets_map, alone, loader, verify_alone, write_tokenizer, write_corpus,
)  # fmt: skip

if __name__ == "__main__":
    function = next(known for known in FUNCTIONS if known.__name__ == sys.argv[1])
    print(json.dumps(function(*json.loads(sys.argv[2]))))
