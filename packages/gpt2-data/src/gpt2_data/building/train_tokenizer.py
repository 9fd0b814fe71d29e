"""`gpt2-data tokenizer`: learn a byte-level BPE vocabulary from the sources that a build takes.

The `tokenizers` library counts the words (of GPT-2's split) and merges pairs; its result does not depend on the
number of threads. The text is not kept, but the words are: up to 120 bytes of memory for each byte of them.
"""

import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_data import disk, order, tokenizer, vocabulary
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.estimate import DOWNLOADS_AT_ONCE
from gpt2_data.building.plan import Plan, downloads, make_plan
from gpt2_data.sources import catalog
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.download import Downloader
from gpt2_data.vocabulary import END, FILE_NAME, MAX_IDS

MAX_WORDS = 25_000_000
"""Bytes of different words, as they stand between white space, after which no more text is read.

English has them in some hundred megabytes; Japanese, whose words here are whole phrases, in thirty. Memory then
reaches 3 GB in the worst case: 14 MB of random Chinese took 1.7."""
_BYTES = 256
_NAMES = ("vocab.json", "merges.txt", "tokenizer_config.json", FILE_NAME)  # the last is written last

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainedTokenizer:
    """The result of train_tokenizer.

    Attributes:
        text_bytes: bytes of text that were read; 0 for bytes alone.
        enough: True if reading ended before the source did, at MAX_WORDS.
    """

    out: Path
    vocab_size: int
    merges: int
    eot: int
    text_bytes: int
    enough: bool
    sha256: str
    already_there: bool
    seconds: float


@dataclass
class _Reader:
    """What the thread that learns has read, and whether it should stop."""

    text_bytes: int = 0
    enough: bool = False
    stop: bool = False
    error: BaseException | None = None
    learned: Any = None


def train_tokenizer(
    config: BuildConfig, vocab_size: int, progress: Progress = lambda what, done, total: None
) -> TrainedTokenizer:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt to `config.out`.

    The first 256 ids are the bytes, the last is `<|endoftext|>`. The same source gives the same bytes.

    Args:
        config: the options that name and read the source; others are not used.
        vocab_size: number of all ids; 0 for the bytes and `<|endoftext|>` alone. There are fewer if the text has
            no more pairs to merge.
        progress: is called with "fetching" or "reading" (bytes), then with "merging".

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    started, least = time.monotonic(), _BYTES + 1
    vocab_size = vocab_size or least
    if vocab_size < least:
        raise ValueError(f"vocab-size is {vocab_size}: bytes and {END} alone are {least}, for which 0 stands, too")
    if vocab_size > MAX_IDS:
        raise ValueError(f"vocab-size is {vocab_size:,}: {MAX_IDS:,} is the limit, since shards hold uint16")
    _check_folder(config.out, vocab_size)
    reader = _Reader()
    vocab = {symbol: i for i, symbol in enumerate(sorted(tokenizer.byte_symbols()))}
    merges: list[str] = []
    if vocab_size > least:
        plan = make_plan(config)
        _learn(config, plan, vocab_size - 1, reader, progress)
        if reader.text_bytes == 0:
            raise ValueError("the source contains no text")
        model = json.loads(reader.learned.to_str())["model"]
        vocab, merges = model["vocab"], [" ".join(pair) for pair in model["merges"]]
    vocab[END] = len(vocab)
    files = _files(vocab, merges)
    same = _write(config.out, files)
    identity = vocabulary.Vocabulary(files[FILE_NAME], len(vocab), vocab[END]).identity
    return TrainedTokenizer(
        config.out, len(vocab), len(merges), vocab[END], reader.text_bytes, reader.enough,
        str(identity["sha256"]), same, round(time.monotonic() - started, 3),
    )  # fmt: skip


def _check_folder(out: Path, vocab_size: int) -> None:
    """Raise ValueError if the folder holds what may not be overwritten, as far as that is known before."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    others = sorted({path.name for path in out.glob("*")} - {*_NAMES, "downloads"})
    if others and not (out / FILE_NAME).exists():
        raise ValueError(f"{out} holds {others[0]}: choose an empty --out")
    if (out / FILE_NAME).exists():
        there = vocabulary.load(out)
        if there is None or there.size > vocab_size:
            raise ValueError(f"{out} holds another tokenizer: choose another --out")


def _learn(config: BuildConfig, plan: Plan, size: int, reader: _Reader, progress: Progress) -> None:
    """Learn in a thread, so that this one can show the progress and can be interrupted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)

    def learn() -> None:
        try:
            library.train_from_iterator(_texts(plan, downloader, reader), trainer)
            reader.learned = library
        except BaseException as error:  # the other thread raises it
            reader.error = error

    total = sum(unit.text_bytes for unit in plan.units)
    remote = {item.path: item.remote for item in plan.inputs if item.remote is not None}
    fetched = [(file, Path(path.removesuffix(file.path))) for path, file in remote.items()]
    temporary = config.downloads is None
    with Downloader(fetched, DOWNLOADS_AT_ONCE if temporary else None, temporary) as downloader:
        thread = threading.Thread(target=learn, name="learn", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
                if reader.enough or reader.text_bytes >= total:
                    progress("merging", 0, 0)
                elif remote and not reader.text_bytes:
                    progress("fetching", downloader.bytes_done, downloader.bytes_total)
                else:
                    progress("reading", min(reader.text_bytes, total), total)
        finally:
            reader.stop = True
    if reader.error is not None:
        raise reader.error
    if temporary and fetched:
        shutil.rmtree(downloads(config), ignore_errors=True)


def _texts(plan: Plan, downloader: Downloader, reader: _Reader) -> Iterator[str]:
    """Yield texts, long ones in pieces, until there are MAX_WORDS. Units come in a fixed random order.

    Files of the hub are read in their own order, so that no more of them are fetched than are needed.
    """
    units, words, size = list(plan.units), set[bytes](), 0
    waiting = Counter(unit.files[0] for unit in units if Path(unit.files[0]) in downloader.files)
    if not waiting:
        units = [units[i] for i in order.permute(np.arange(len(units)), len(units), 0).tolist()]
    for unit in units:
        path = unit.files[0]
        while path in waiting and not downloader.ready(Path(path)) and not reader.stop:
            time.sleep(0.1)
        for data, pieces in _read(unit, reader):
            yield from pieces
            reader.text_bytes += len(data)
            new = set(data.split()) - words
            words |= new
            size += sum(map(len, new))
            if size > MAX_WORDS:
                reader.enough = True
                return
        if path in waiting:
            waiting[path] -= 1
            if waiting[path] == 0:
                downloader.release(Path(path))


def _read(unit: Unit, reader: _Reader) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the bytes of each batch of a unit, and its texts in pieces."""
    documents = 0
    for batch in catalog.read(unit):
        if reader.stop:
            raise InterruptedError
        data, offsets = tokenizer.text_buffers(batch.texts)
        try:
            cuts = tokenizer.cut_texts(data, offsets)[0].tolist()
        except tokenizer.BadText as error:
            where = catalog.document_name(unit, documents + error.index - batch.continues)
            raise ValueError(f"{where}: {error}") from None
        documents += batch.documents
        yield data.tobytes(), [str(data.data[start:stop], "utf-8") for start, stop in itertools.pairwise(cuts)]


def _files(vocab: dict[str, int], merges: list[str]) -> dict[str, bytes]:
    """Return the folder's files by name."""
    config = {
        "add_prefix_space": False,
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": END,
    }
    texts = (
        json.dumps(vocab, ensure_ascii=False) + "\n",
        "\n".join(["#version: 0.2", *merges, ""]),
        json.dumps(config, indent=2) + "\n",
    )
    files = dict(zip(_NAMES, (text.encode() for text in texts), strict=False))
    return files | {FILE_NAME: vocabulary.to_json(vocab, merges, [END])}


def _write(out: Path, files: dict[str, bytes]) -> bool:
    """Write the files; return True if all are there already. Raises ValueError if one has another content."""
    there = {name: (out / name).read_bytes() for name in files if (out / name).exists()}
    if different := [name for name, data in there.items() if data != files[name]]:
        raise ValueError(f"{out} holds another tokenizer ({different[0]} differs): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in _NAMES:
        if name not in there:
            with disk.write_whole(out / name) as file:
                file.write(files[name])
    return there == files
