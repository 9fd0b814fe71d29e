"""What a build will do: its options, and the source cut into fixed work units.

How a source is cut depends on the source and the constants here, never on workers or machines: that is what makes
the bytes of a build the same everywhere and a restart able to use what is there.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import formats, pydocs, sources, tokenizer
from gpt2_data.sources import Unit

PLAN_VERSION = 1
UNIT_BYTES = 32_000_000  # text in a work unit: about 3 seconds of one core
PYDOCS_UNIT_BYTES = 2_000_000  # smaller, so that two cores share what is only 9 MB
UNIT_FILES = 4096  # text files in a work unit, at most
_BYTES_PER_TOKEN = 4.3  # of English web text; for estimates only
_BYTES_PER_TOKEN_OF_CODE = 2.2  # GPT-2 spends a token on each space of an indent
_WORTH_A_WORKER = 16_000_000  # bytes of text that take longer than starting a process
_COMPRESSION = 3  # of text by gzip or zstd; for estimates only


@dataclass(frozen=True)
class BuildConfig:
    """The options of `gpt2-data build`. Raises ValueError for values that cannot work."""

    sources: tuple[str, ...]
    """`pydocs`, and files and globs of .parquet, .jsonl[.gz|.zst] and .txt[.gz], in order."""
    out: Path
    """The dataset's folder."""
    shard_size: int = 100_000_000
    """Tokens a shard; the last of a split is shorter."""
    val_tokens: int = 100_000_000
    """The first documents go to the validation split, as many whole ones as reach this many tokens; 0 for none."""
    format: str = "uint16"
    """Format of shards: uint16 (llm.c's) or arrow."""
    workers: int | None = None
    """Processes; None: one a core that this process may use, fewer for little text. No influence on the result."""
    tokenizer: str = "auto"
    """Tokenizer library: auto or tiktoken. No influence on the result."""
    order: str = "source"
    """Order of the documents: source, or shuffled by the seed."""
    seed: int = 0
    engine: str = "local"
    limit_docs: int | None = None
    """Use only the first documents of the source, this many, empty ones counted."""

    def __post_init__(self) -> None:
        # Scripts hand in lists and strings; what is stored is always the same type.
        object.__setattr__(self, "sources", tuple(map(str, self.sources)))
        object.__setattr__(self, "out", Path(self.out))
        if not self.sources:
            raise ValueError(f"no source given: known are {sources.KNOWN}")
        if not 0 < self.shard_size <= formats.MAX_SHARD_TOKENS:
            raise ValueError(
                f"shard_size is {self.shard_size:,} tokens, must be 1 to {formats.MAX_SHARD_TOKENS:,}"
            )
        if self.val_tokens < 0:
            raise ValueError(f"val_tokens is {self.val_tokens}, must be 0 or more")
        for name, least in ("workers", 1), ("limit_docs", 1):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {' or '.join(known)}")

    def num_workers(self, text_bytes: int) -> int:
        """Processes to tokenize that much text with."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 1 + text_bytes // _WORTH_A_WORKER)


_CHOICES = {
    "format": ("uint16", "arrow"),
    "tokenizer": ("auto", "tiktoken"),
    "order": ("source", "shuffled"),
    "engine": ("local",),
}


@dataclass(frozen=True)
class Input:
    """A file (or pydocs) that documents come from."""

    kind: str
    path: str
    bytes: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """Without its folder: a dataset is the same wherever its sources lay."""
        return os.path.basename(self.path)


@dataclass(frozen=True)
class Plan:
    """The inputs in order and the work units they are cut into."""

    inputs: tuple[Input, ...]
    units: tuple[Unit, ...]

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return sum(unit.text_bytes for unit in self.units)


def make_plan(config: BuildConfig) -> Plan:
    """Cut the source into units. Opens every file, reads none to its end but for --limit-docs."""
    inputs = tuple(_input(kind, path) for kind, path in sources.expand(config.sources))
    units = [dataclasses.replace(unit, index=i) for i, unit in enumerate(_cut(inputs))]
    if config.limit_docs is not None:
        units = list(_limited(units, config.limit_docs))
        used = {path for unit in units for path in unit.files}
        inputs = tuple(item for item in inputs if item.path in used)
    return Plan(inputs, tuple(units))


def _input(kind: str, path: str) -> Input:
    if kind == "pydocs":
        return Input(kind, path, sum(len(text.encode()) for _, text in pydocs.documents()), 0)
    status = os.stat(path)
    return Input(kind, path, status.st_size, status.st_mtime_ns)


def check_unchanged(plan: Plan) -> None:
    """Raise ValueError if a file was touched since the plan was made."""
    for item in plan.inputs:
        if _input(item.kind, item.path) != item:
            raise ValueError(f"{item.path} was changed during the build: run the same command again")


def _cut(inputs: tuple[Input, ...]) -> Iterator[Unit]:
    texts: list[Input] = []
    for item in inputs:
        if texts and (item.kind != "txt" or _text_bytes(texts) >= UNIT_BYTES or len(texts) >= UNIT_FILES):
            yield _txt_unit(texts)
            texts = []
        if item.kind == "txt":
            texts.append(item)
        elif item.kind == "parquet":
            yield from _cut_parquet(item.path)
        elif item.kind == "jsonl":
            yield from _cut_jsonl(item)
        else:
            yield from _cut_pydocs()
    if texts:
        yield _txt_unit(texts)


def _txt_unit(texts: list[Input]) -> Unit:
    paths = tuple(item.path for item in texts)
    return Unit(0, "txt", paths, documents=len(paths), text_bytes=_text_bytes(texts))


def _text_bytes(items: list[Input]) -> int:
    return sum(item.bytes * (_COMPRESSION if sources.is_compressed(item.path) else 1) for item in items)


def _cut_parquet(path: str) -> Iterator[Unit]:
    with sources.parquet_file(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        column = file.metadata.schema.names.index("text")
        sizes = [group.column(column).total_uncompressed_size for group in groups]
        rows = [group.num_rows for group in groups]
    yield from _cut_range("parquet", path, sizes, rows, UNIT_BYTES)


def _cut_pydocs() -> Iterator[Unit]:
    sizes = [len(text) for _, text in pydocs.documents()]
    yield from _cut_range("pydocs", "pydocs", sizes, [1] * len(sizes), PYDOCS_UNIT_BYTES)


def _cut_range(kind: str, path: str, sizes: list[int], documents: list[int], unit_bytes: int) -> Iterator[Unit]:
    """Units of consecutive items, each of as few as reach `unit_bytes`."""
    start = total = 0
    for i, size in enumerate(sizes, 1):
        total += size
        if total >= unit_bytes or i == len(sizes):
            yield Unit(0, kind, (path,), start, i, documents=sum(documents[start:i]), text_bytes=total)
            start, total = i, 0


def _cut_jsonl(item: Input) -> Iterator[Unit]:
    """Byte ranges that begin at line starts. A compressed file is one unit: it can only be read from its start."""
    if sources.is_compressed(item.path) or item.bytes <= UNIT_BYTES:
        yield Unit(0, "jsonl", (item.path,), text_bytes=_text_bytes([item]))
        return
    with open(item.path, "rb") as file:
        start = 0
        while start < item.bytes:
            file.seek(min(start + UNIT_BYTES, item.bytes))
            file.readline()
            stop = file.tell()
            yield Unit(0, "jsonl", (item.path,), start, stop, text_bytes=stop - start)
            start = stop


def _limited(units: list[Unit], limit: int) -> Iterator[Unit]:
    """The units that hold the first `limit` documents, the last of them cut short."""
    for unit in units:
        # Lines are counted only just past the limit.
        count = sources.count_lines(unit, limit + 1) if unit.documents is None else unit.documents
        if count > limit:
            share = int(unit.text_bytes * limit / count)
            files = unit.files[:limit]
            unit = dataclasses.replace(unit, files=files, limit=limit, documents=limit, text_bytes=share)
        yield unit
        limit -= count
        if limit <= 0:
            return


def hash_inputs(plan: Plan, workers: int) -> Iterator[str]:
    """SHA-256 of each input, in order; reads every byte of them."""
    with ThreadPoolExecutor(workers) as pool:  # hashlib works outside the interpreter's lock
        yield from pool.map(lambda item: sources.sha256_of(item.kind, item.path), plan.inputs)


def plan_hash(plan: Plan, hashes: list[str]) -> str:
    """Names the tokenized units: equal exactly if every unit's tokens are."""
    spec = {
        "plan_version": PLAN_VERSION,
        "tokenizer": tokenizer.identity(),
        "inputs": [[item.kind, sha256] for item, sha256 in zip(plan.inputs, hashes, strict=True)],
        "units": [[unit.kind, len(unit.files), unit.start, unit.stop, unit.limit] for unit in plan.units],
    }
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Estimate:
    """What a build will amount to."""

    documents: int
    tokens: int
    counted: bool
    """True if the tokens are counted by the sources themselves; else they follow from the size of the text."""

    def shards(self, config: BuildConfig) -> int:
        """How many shards, validation's and training's."""
        val = min(self.tokens, config.val_tokens)
        return -(-val // config.shard_size) + -(-(self.tokens - val) // config.shard_size)

    def dataset_bytes(self) -> int:
        """Size of the finished dataset."""
        return self.tokens * formats.TOKEN.itemsize + self.documents * formats.OFFSET.itemsize

    def peak_bytes(self) -> int:
        """Disk needed while it is built: tokenized units and shards stand side by side, and where documents go."""
        return 2 * self.dataset_bytes() + 2 * self.documents * formats.OFFSET.itemsize


def estimate(plan: Plan) -> Estimate:
    """Count what can be counted quickly: rows, and the token_count column where a Parquet file has one."""
    documents, tokens, counted = 0, 0.0, True
    for item in plan.inputs:
        units = [unit for unit in plan.units if item.path in unit.files]
        text_bytes = sum(unit.text_bytes for unit in units)
        if item.kind == "txt":  # shares its unit with other files
            count, text_bytes = 1, _text_bytes([item])
        elif any(unit.documents is None for unit in units):
            count = round(text_bytes / max(_mean_line(item.path), 1))
        else:
            count = sum(unit.documents or 0 for unit in units)
        column = _token_counts(item.path, count) if item.kind == "parquet" else None
        per_token = _BYTES_PER_TOKEN_OF_CODE if item.kind == "pydocs" else _BYTES_PER_TOKEN
        documents += count
        counted = counted and column is not None
        tokens += count + (text_bytes / per_token if column is None else column)  # and an EOT each
    return Estimate(documents, round(tokens), counted)


def _mean_line(path: str) -> float:
    with sources.open_bytes(path) as file:
        sample = file.read(1_000_000)
    return len(sample) / max(sample.count(b"\n"), 1)


def _token_counts(path: str, rows: int) -> int | None:
    """FineWeb's column of GPT-2 token counts, summed over the first `rows`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with sources.parquet_file(path) as file:
        schema = file.schema_arrow
        if "token_count" not in schema.names or not pa.types.is_integer(schema.field("token_count").type):
            return None
        column = file.read(["token_count"]).column(0)
    return int(pc.sum(column.slice(0, rows)).as_py() or 0)
