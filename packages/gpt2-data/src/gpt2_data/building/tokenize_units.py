"""Phase A of a build: a work unit of the source -> its tokens and its documents' lengths, in files.

A unit's receipt is written last and is the only sign that it is done. Tokenizing one twice does no harm. The files
are not forced to the disk: their hashes are checked when a build goes on, and most are gone before the disk has to
have them (a sixth of a build's time).
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_data import tokenizer
from gpt2_data.formats import uint16 as formats
from gpt2_data.sources import catalog as sources
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.files import Batch


@dataclass(frozen=True)
class Receipt:
    """What a tokenized unit amounts to. `documents_replaced` had bytes that are not UTF-8.

    CRC-32, at 3 GB/s, against what a kill, a power loss or a bad disk leaves: SHA-256 took 7 % of a build on a
    processor without instructions for it. The shards that are made of the units have SHA-256.
    """

    plan: str
    unit: int
    tokens: int
    tokens_crc32: int
    lengths_crc32: int
    documents: int
    documents_empty: int
    documents_replaced: int
    text_bytes: int


@dataclass(frozen=True)
class UnitTask:
    """Tokenize a unit into `work`."""

    plan: str
    unit: Unit
    work: Path
    backend: str

    @property
    def name(self) -> str:
        """For messages."""
        return self.unit.name

    @property
    def tokens_file(self) -> Path:
        """Its tokens, EOT in front of each document: uint16 and nothing else."""
        return self.work / f"unit-{self.unit.index:05d}.u16"

    @property
    def lengths_file(self) -> Path:
        """The length of each document in tokens: u64 and nothing else."""
        return self.work / f"unit-{self.unit.index:05d}.u64"

    @property
    def receipt_file(self) -> Path:
        """Written when both are whole."""
        return self.work / f"unit-{self.unit.index:05d}.json"

    @property
    def position_file(self) -> Path:
        """While the unit is done with care: which document is at work."""
        return self.work / f"unit-{self.unit.index:05d}.at"


def tokenize_unit(task: UnitTask, careful: bool = False) -> tuple[Receipt, bool]:
    """Tokenize a unit, unless it has a receipt that fits its files. Returns the receipt, and if it is new.

    `careful`: one document at a time, each noted in the position file before, so that if it kills this process one
    can say which it was.
    """
    if (receipt := valid_receipt(task)) is not None:
        return receipt, False
    tokens_crc = lengths_crc = num_tokens = 0
    waiting = np.empty(0, np.int64)  # lengths of the documents before, the last of which may go on
    counts = {"documents": 0, "documents_empty": 0, "documents_replaced": 0, "text_bytes": 0}

    def write_lengths() -> None:
        nonlocal lengths_crc
        data = waiting.astype(formats.OFFSET, copy=False).data
        lengths_file.write(data)
        lengths_crc = zlib.crc32(data, lengths_crc)

    with (
        formats.atomic(task.tokens_file, task.work, durable=False) as file,
        formats.atomic(task.lengths_file, task.work, durable=False) as lengths_file,
    ):
        for batch in _noted(task) if careful else sources.read(task.unit):
            tokens, batch_lengths = _encode(task, batch, counts["documents"])
            if batch.continues:  # it has no EOT of its own
                tokens = tokens[1:]
                waiting[-1] += len(tokens)
            else:
                write_lengths()
                waiting = batch_lengths
            data = tokens.astype(formats.TOKEN, copy=False).data
            file.write(data)
            tokens_crc = zlib.crc32(data, tokens_crc)
            num_tokens += len(tokens)
            counts["documents"] += batch.documents
            counts["documents_empty"] += batch.empty
            counts["documents_replaced"] += len(batch.replaced)
            counts["text_bytes"] += batch.text_bytes
        write_lengths()
    receipt = Receipt(
        plan=task.plan,
        unit=task.unit.index,
        tokens=num_tokens,
        tokens_crc32=tokens_crc,
        lengths_crc32=lengths_crc,
        **counts,
    )
    with formats.atomic(task.receipt_file, task.work, durable=False) as file:
        file.write(json.dumps(dataclasses.asdict(receipt)).encode())
    task.position_file.unlink(missing_ok=True)
    return receipt, True


def _encode(task: UnitTask, batch: Batch, first: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        return tokenizer.encode_texts(batch.texts, task.backend, first)
    except tokenizer.BadText as error:
        where = sources.document_name(task.unit, first + error.index - batch.continues)
        raise ValueError(f"{where}: {error}") from None


def _noted(task: UnitTask) -> Iterator[Batch]:
    """The unit's documents one by one; their numbers stand in the position file before they are given out."""
    number = 0
    with task.position_file.open("wb", buffering=0) as file:
        for batch in sources.read(task.unit):
            if batch.continues:
                yield batch
                continue
            for i in range(batch.documents):
                os.pwrite(file.fileno(), f"{number:020d}".encode(), 0)
                yield batch.row(i)
                number += 1


def document_at_work(task: UnitTask) -> str:
    """Which document a process that died was at, for a message; the unit's name if nothing is known."""
    try:
        number = int(task.position_file.read_bytes())
    except (OSError, ValueError):
        return task.name
    return sources.document_name(task.unit, number)


def read_receipt(task: UnitTask) -> Receipt | None:
    """The receipt of this very unit, if there is one; its files are not looked at."""
    try:
        receipt = Receipt(**json.loads(task.receipt_file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return receipt if (receipt.plan, receipt.unit) == (task.plan, task.unit.index) else None


def valid_receipt(task: UnitTask) -> Receipt | None:
    """The receipt of this very unit, if its files are whole by their hashes."""
    receipt = read_receipt(task)
    try:
        if receipt is not None and crc32_of(task.tokens_file) == receipt.tokens_crc32:
            return receipt if crc32_of(task.lengths_file) == receipt.lengths_crc32 else None
    except OSError:
        pass
    return None


def crc32_of(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    return crc


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class HashTask:
    """Hash local files of the source; `files` are (path, bytes, mtime_ns)."""

    index: int
    files: tuple[tuple[str, int, int], ...]
    work: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"hashing {self.files[0][0]}"

    @property
    def receipt_file(self) -> Path:
        """Keeps the hashes, so that a restart need not read the files again."""
        return self.work / f"hashes-{self.index:05d}.json"


def hash_files(task: HashTask) -> list[str]:
    """SHA-256 of each file, in order."""
    try:
        kept = json.loads(task.receipt_file.read_bytes())
        if kept["files"] == [list(file) for file in task.files]:
            return list(kept["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    hashes = [sha256_of(Path(path)) for path, _, _ in task.files]
    with formats.atomic(task.receipt_file, task.work) as file:
        file.write(json.dumps({"files": task.files, "sha256": hashes}).encode())
    return hashes


Task = UnitTask | HashTask
Result = tuple[Receipt, bool] | list[str]

# What workers do stands here, since they import this module: what build.py needs takes them longer to start with.


def do_task(task: Task) -> Result:
    """What a worker does."""
    return hash_files(task) if isinstance(task, HashTask) else tokenize_unit(task)


def do_task_again(task: Task) -> Result:
    """What a worker does with a task that may have killed another."""
    return hash_files(task) if isinstance(task, HashTask) else tokenize_unit(task, careful=True)


def blame(task: Task) -> str:
    """What a worker that died was at."""
    return task.name if isinstance(task, HashTask) else document_at_work(task)
