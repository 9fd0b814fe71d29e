"""Phase A of a build: a work unit of the source -> its tokens and its documents' lengths, in files.

A unit's receipt is written last and is the only sign that it is done. Tokenizing one twice does no harm.
"""

import array
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_data import formats, sources, tokenizer
from gpt2_data.sources import Unit

_BATCH_CHARACTERS = 2_000_000
_BATCH_PARTS = 1024


@dataclass(frozen=True)
class Receipt:
    """What a tokenized unit amounts to. `documents` and `documents_replaced` do not count empty ones."""

    plan: str
    unit: int
    tokens: int
    tokens_sha256: str
    lengths_sha256: str
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


def tokenize_unit(task: UnitTask) -> tuple[Receipt, bool]:
    """Tokenize a unit, unless it has a receipt that fits its files. Returns the receipt, and if it is new."""
    if (receipt := _valid_receipt(task)) is not None:
        return receipt, False
    digest = hashlib.sha256()
    lengths = array.array("q")
    counts = {"documents_empty": 0, "documents_replaced": 0, "text_bytes": 0}
    with formats.atomic(task.tokens_file, task.work) as file:
        for parts in _batches(task.unit, counts):
            tokens = _encode(parts, lengths)
            file.write(tokens)
            digest.update(tokens)
    with formats.atomic(task.lengths_file, task.work) as file:
        file.write(data := np.array(lengths, formats.OFFSET).tobytes())
    receipt = Receipt(
        plan=task.plan,
        unit=task.unit.index,
        tokens=sum(lengths),
        tokens_sha256=digest.hexdigest(),
        lengths_sha256=hashlib.sha256(data).hexdigest(),
        documents=len(lengths),
        **counts,
    )
    with formats.atomic(task.receipt_file, task.work) as file:
        file.write(json.dumps(dataclasses.asdict(receipt)).encode())
    return receipt, True


def _valid_receipt(task: UnitTask) -> Receipt | None:
    try:
        receipt = Receipt(**json.loads(task.receipt_file.read_bytes()))
        hashes = [_sha256(task.tokens_file), _sha256(task.lengths_file)]
    except (OSError, ValueError, TypeError):
        return None
    expected = (task.plan, task.unit.index, [receipt.tokens_sha256, receipt.lengths_sha256])
    return receipt if (receipt.plan, receipt.unit, hashes) == expected else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batches(unit: Unit, counts: dict[str, int]) -> Iterator[list[tuple[str, bool]]]:
    """(text, whether it goes on with the document before) in batches small enough to hold; counts as it goes."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    counted = False  # this document's replaced bytes
    for part in sources.read(unit):
        if not part.text:
            counts["documents_empty"] += 1
            continue
        counted = counted and part.continues
        if part.replaced and not counted:
            counts["documents_replaced"] += 1
            counted = True
        counts["text_bytes"] += len(part.text.encode("utf-8", "surrogatepass"))
        batch.append((part.text, part.continues))
        characters += len(part.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PARTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(parts: list[tuple[str, bool]], lengths: "array.array[int]") -> bytes:
    """The parts' tokens as they are stored; appends to `lengths`, or makes its last one longer."""
    tokens, counts = tokenizer.encode_documents([text for text, _ in parts])
    if any(continues for _, continues in parts):  # those have no EOT of their own
        firsts = np.cumsum(counts) - counts
        tokens = np.delete(tokens, firsts[[continues for _, continues in parts]])
    for count, (_, continues) in zip(counts.tolist(), parts, strict=True):
        if continues:
            lengths[-1] += count - 1
        else:
            lengths.append(count)
    return tokens.astype(formats.TOKEN).tobytes()
