"""`gpt2-data tokenizer`: learn a byte-level BPE vocabulary from the sources that a build takes.

The `tokenizers` library counts the words (of GPT-2's split) and merges pairs. The text is not kept, but the words
are: up to 120 bytes of memory for each byte of them.
"""

import functools
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_data import order, tokenizer, vocabulary
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.plan import Plan, downloads, make_plan
from gpt2_data.sources import catalog
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.download import download_file
from gpt2_data.vocabulary import END, FILE_NAME, MAX_IDS, Vocabulary

MAX_WORDS = 25_000_000
"""Bytes of different words, as they stand between white space, after which no more text is read.

English has them in some hundred megabytes; Japanese, whose words here are whole phrases, in thirty. Memory then
reaches 3 GB in the worst case: 14 MB of random Chinese took 1.7."""
_LEAST = 257  # ids: the bytes and END

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
class _Reading:
    """The thread that learns notes here how far it is, and reads here whether it should stop."""

    step: tuple[str, int, int] = ("reading", 0, 0)
    text_bytes: int = 0
    enough: bool = False
    stop: bool = False

    def show(self, what: str, done: int, total: int) -> None:
        if self.stop:
            raise CancelledError
        self.step = what, done, total


def train_tokenizer(
    config: BuildConfig, vocab_size: int, progress: Progress = lambda what, done, total: None
) -> TrainedTokenizer:
    """Write tokenizer.json and tokenizer_config.json to `config.out`.

    The first 256 ids are the bytes, the last is `<|endoftext|>`. The same source gives the same bytes.

    Args:
        config: the options that name and read the source; others are not used.
        vocab_size: number of all ids; 0 for the bytes and `<|endoftext|>` alone. There are fewer if the text has
            no more pairs to merge.
        progress: is called with "fetching" or "reading" (bytes), then with "merging".

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    started, vocab_size, out = time.monotonic(), vocab_size or _LEAST, config.out
    if not _LEAST <= vocab_size <= MAX_IDS:
        limits = f"bytes and {END} alone are {_LEAST}, and {MAX_IDS:,} is the limit, since shards hold uint16"
        raise ValueError(f"vocab-size is {vocab_size:,}: {limits}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    others = sorted({path.name for path in out.glob("*")} - {"tokenizer_config.json", "downloads"})
    if others and FILE_NAME not in others:
        raise ValueError(f"{out} holds {others[0]}: choose an empty --out")
    reading = _Reading()
    vocab = {symbol: i for i, symbol in enumerate(sorted(tokenizer.byte_symbols()))}
    merges: list[tuple[str, str]] = []
    if vocab_size > _LEAST:
        vocab, merges = _learn(config, make_plan(config), vocab_size - 1, reading, progress)
    vocab[END] = len(vocab)
    learned = Vocabulary(vocabulary.byte_level(vocab, merges, [END]), len(vocab), vocab[END])
    return TrainedTokenizer(
        out, learned.size, len(merges), learned.eot, reading.text_bytes, reading.enough,
        str(learned.identity["sha256"]), _write(out, learned.data), round(time.monotonic() - started, 3),
    )  # fmt: skip


def _learn(
    config: BuildConfig, plan: Plan, size: int, reading: _Reading, progress: Progress
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges. A thread learns, so that this one shows progress and obeys Ctrl-C."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library, learned = Tokenizer(models.BPE()), Future[None]()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    # Otherwise the library's own threads run `_texts` in turn, and once they waited for each other for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def learn() -> None:
        try:
            library.train_from_iterator(_texts(config, plan, reading), trainer)
            learned.set_result(None)
        except BaseException as error:  # the other thread raises it
            learned.set_exception(error)

    thread = threading.Thread(target=learn, name="learn", daemon=True)
    thread.start()
    try:
        while not wait([learned], 0.2).done:
            progress(*reading.step)
    finally:
        reading.stop = True
        thread.join(1.0)  # merging takes longer, but it ends with the process
    learned.result()
    if reading.text_bytes == 0:
        raise ValueError("the source contains no text")
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def _texts(config: BuildConfig, plan: Plan, reading: _Reading) -> Iterator[str]:
    """Yield texts, long ones in pieces, until there are MAX_WORDS. Units come in a fixed random order.

    Files of the hub are read in their own order, so that no more of them are fetched than are needed.
    """
    remote = {item.path: item.remote for item in plan.inputs if item.remote is not None}
    total, words, size = sum(unit.text_bytes for unit in plan.units), set[bytes](), 0
    indices = np.arange(len(plan.units))
    units = [plan.units[i] for i in (indices if remote else order.permute(indices, len(indices), 0)).tolist()]
    for path, some in itertools.groupby(units, lambda unit: unit.files[0]):
        if (file := remote.get(path)) is not None:
            fetched = functools.partial(reading.show, "fetching", total=file.size)
            download_file(file, Path(path.removesuffix(file.path)), fetched)
        for data, pieces in itertools.chain.from_iterable(map(_pieces, some)):
            reading.show("reading", min(reading.text_bytes, total), total)
            yield from pieces
            reading.text_bytes += len(data)
            new = set(data.split()) - words
            words |= new
            size += sum(map(len, new))
            reading.enough = size > MAX_WORDS
            if reading.enough:
                break
        if file is not None and config.downloads is None:
            Path(path).unlink()
        if reading.enough:
            break
    if remote and config.downloads is None:
        shutil.rmtree(downloads(config), ignore_errors=True)
    reading.show("merging", 0, 0)


def _pieces(unit: Unit) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the bytes of each batch of a unit, and its texts in pieces."""
    documents = 0
    for batch in catalog.read(unit):
        data, offsets = tokenizer.text_buffers(batch.texts)
        try:
            cuts = tokenizer.cut_texts(data, offsets)[0].tolist()
        except tokenizer.BadText as error:
            where = catalog.document_name(unit, documents + error.index - batch.continues)
            raise ValueError(f"{where}: {error}") from None
        documents += batch.documents
        yield data.tobytes(), [str(data.data[start:stop], "utf-8") for start, stop in itertools.pairwise(cuts)]


def _write(out: Path, data: bytes) -> bool:
    """Write the folder; return True if it is there already. Raises ValueError if another tokenizer is."""
    if (out / FILE_NAME).exists():
        if (out / FILE_NAME).read_bytes() == data:
            return True
        raise ValueError(f"{out} holds another tokenizer: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    config = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "tokenizer_class": "GPT2Tokenizer"}
    vocabulary.write(out, data, config | tokens)
    return False
