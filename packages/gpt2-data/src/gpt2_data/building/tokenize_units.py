"""Phase A of a build: a work unit of the source -> its tokens and its documents' lengths, in files.

A unit's receipt is written last and is the only sign that it is done. The files are not fsynced, which
would take a sixth of a build's time: their hashes are checked when a build resumes, and most are deleted before
they reach the disk. Workers import this module: it must load nothing that only the parent needs.
"""

import dataclasses
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_data import tokenizer, vocabulary
from gpt2_data.disk import sha256, write_whole
from gpt2_data.formats.uint16 import OFFSET, TOKEN
from gpt2_data.sources import catalog, files
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.files import Batch


@dataclass(frozen=True)
class Receipt:
    """The facts of a tokenized unit, by which a restart knows that its files are whole.

    Attributes:
        crc32: of its tokens and lengths. It runs at 3 GB/s; SHA-256, which the shards have, took 7 % of a build on
            a processor without instructions for it.
        documents_replaced: documents that had bytes which are not UTF-8.
        sha256: path -> the hash in hex of each of the task's `hashed` files.
        replaced_in: the files of these documents.
        end_marks: how often <|endoftext|> stands in text files that are not split.
    """

    plan: str
    crc32: int
    tokens: int
    documents: int
    documents_empty: int
    documents_replaced: int
    text_bytes: int
    sha256: dict[str, str]
    replaced_in: tuple[str, ...] = ()
    end_marks: int = 0


@dataclass(frozen=True)
class UnitTask:
    """A task: tokenize a unit into `work`, and hash those of its files that no earlier unit reads (`hashed`).

    `eot` is None for GPT-2's vocabulary; else that of the tokenizer.json in `work`.
    """

    plan: str
    unit: Unit
    work: Path
    backend: str
    hashed: tuple[str, ...] = ()
    eot: int | None = None

    @property
    def encoder(self) -> str | tokenizer.Encoder:
        """The encoder is as encode_texts takes it: a library's name, or that of another vocabulary."""
        return self.backend if self.eot is None else vocabulary.encoder(self.work / vocabulary.FILE_NAME, self.eot)

    def file(self, ending: str) -> Path:
        """Return the path of one of its files.

        `u16`: the tokens, an EOT before each document, and nothing else. `u64`: the documents' lengths in tokens.
        `json`: the receipt, written last. `at`: the number of the current document, if `careful`.
        """
        return self.work / f"unit-{self.unit.index:05d}.{ending}"


def tokenize_unit(task: UnitTask, careful: bool = False) -> tuple[Receipt, bool]:
    """Tokenize a unit, unless it has a receipt that matches its files. Return the receipt, and True if it is new.

    `careful` takes one document at a time and notes its number in the file `at` first, so that a document which
    kills this process can be named.
    """
    if (receipt := read_receipt(task, check_files=True)) is not None:
        return receipt, False
    hashes = {path: sha256(Path(path)) for path in task.hashed}
    pending = np.empty(0, np.int64)  # lengths of the last batch's documents; its last document may continue
    replaced_in: dict[str, None] = {}
    count_marks = task.unit.kind == "txt" and task.unit.split_on is None
    counts = Counter(end_marks=0, tokens=0, documents=0, documents_empty=0, documents_replaced=0, text_bytes=0)
    with (
        write_whole(task.file("u16"), durable=False) as tokens_file,
        write_whole(task.file("u64"), durable=False) as lengths_file,
    ):
        for batch in _noted(task) if careful else _read(task):
            first = counts["documents"]
            try:
                tokens, lengths = tokenizer.encode_texts(batch.texts, task.encoder, first)
            except tokenizer.BadText as error:
                where = catalog.document_name(task.unit, first + error.index - batch.continues)
                raise ValueError(f"{where}: {error}") from None
            if batch.continues:  # it has no EOT of its own
                tokens = tokens[1:]
                pending[-1] += len(tokens)
            else:
                lengths_file.write(pending.astype(OFFSET, copy=False).data)
                pending = lengths
            tokens_file.write(tokens.astype(TOKEN, copy=False).data)
            if batch.replaced and not batch.lone and task.unit.kind != "stream":
                replaced_in |= dict.fromkeys(batch.replaced_in or task.unit.files[:1])
            if count_marks:
                text = tokenizer.text_buffers(batch.texts)[0]
                counts["end_marks"] += bytes(text.data).count(b"<|endoftext|>")
            counts.update(
                tokens=len(tokens),
                documents=batch.documents,
                documents_empty=batch.empty,
                documents_replaced=len(batch.replaced),
                text_bytes=batch.text_bytes,
            )
        lengths_file.write(pending.astype(OFFSET, copy=False).data)
    receipt = Receipt(plan=task.plan, crc32=_crc32(task), sha256=hashes, replaced_in=tuple(replaced_in), **counts)
    with write_whole(task.file("json"), durable=False) as file:
        file.write(json.dumps(dataclasses.asdict(receipt)).encode())
    task.file("at").unlink(missing_ok=True)
    return receipt, True


def _read(task: UnitTask) -> Iterator[Batch]:
    """Yield the unit's documents; whole ones if the encoder does not allow to cut long ones."""
    batches, encoder = catalog.read(task.unit), task.encoder
    cuts = isinstance(encoder, str) or encoder.cuts
    return batches if cuts else files.join(batches, tokenizer.MAX_WHOLE)


def _noted(task: UnitTask) -> Iterator[Batch]:
    """Yield the unit's documents one by one, each after writing its number to the file `at`."""
    number = -1
    with task.file("at").open("wb", buffering=0) as file:
        for batch in _read(task):
            rows = [batch] if batch.continues else [batch.rows(i, i + 1) for i in range(batch.documents)]
            for row in rows:
                number += row.documents  # 0 for the rest of a document
                os.pwrite(file.fileno(), f"{number:020d}".encode(), 0)
                yield row


def document_at_work(task: UnitTask) -> str:
    """Name the document at which a process died, for a message; the unit if nothing is known."""
    try:
        number = int(task.file("at").read_bytes())
    except (OSError, ValueError):
        return task.unit.name
    return catalog.document_name(task.unit, number)


def read_receipt(task: UnitTask, check_files: bool) -> Receipt | None:
    """Return this unit's receipt; None if there is none or, with `check_files`, if it does not match the files."""
    try:
        receipt = Receipt(**json.loads(task.file("json").read_bytes()))
        same = (receipt.plan, tuple(receipt.sha256)) == (task.plan, task.hashed)
        return receipt if same and (not check_files or receipt.crc32 == _crc32(task)) else None
    except (OSError, ValueError, TypeError):
        return None


def _crc32(task: UnitTask) -> int:
    crc = 0
    for ending in "u16", "u64":
        with task.file(ending).open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                crc = zlib.crc32(data, crc)
    return crc
