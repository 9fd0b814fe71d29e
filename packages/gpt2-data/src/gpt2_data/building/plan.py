"""What a build will do: its options, and the source cut into fixed work units.

How a source is cut depends on the source and the constants here, never on workers or machines: that is what makes
the bytes of a build the same everywhere and a restart able to use what is there.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_data import tokenizer
from gpt2_data.building.config import BuildConfig
from gpt2_data.sources import catalog as sources
from gpt2_data.sources import files as readers
from gpt2_data.sources import pydocs
from gpt2_data.sources.catalog import Unit

if TYPE_CHECKING:
    from gpt2_data.sources.hub import Listing
    from gpt2_data.sources.web import WebFile as HubFile

PLAN_VERSION = 2
UNIT_BYTES = 16_000_000  # text in a work unit: a quarter of a second of one core with gigatoken, two with tiktoken
PYDOCS_UNIT_BYTES = 2_000_000  # smaller, so that two cores share what is only 9 MB
UNIT_FILES = 4096  # text files in a work unit, at most
WORK = ".build"
"""The folder in a dataset's folder that a build works in; it goes when the dataset is whole."""
_COMPRESSION = 3  # of text by gzip or zstd; for estimates only


@dataclass(frozen=True)
class Input:
    """A file (or pydocs, or a stream) that documents come from."""

    kind: str
    path: str
    """Where it is, or for what is on the hub will be; for a stream its Listing as JSON."""
    name: str
    """Without its folder: a dataset is the same wherever its sources lay."""
    bytes: int
    mtime_ns: int = 0
    sha256: str | None = None
    """If it is known without reading the file."""
    remote: "HubFile | None" = None
    row_groups: tuple[tuple[int, int], ...] = ()
    """Of Parquet: rows, and bytes of text."""


@dataclass(frozen=True)
class Plan:
    """The inputs in order and the work units they are cut into."""

    inputs: tuple[Input, ...]
    units: tuple[Unit, ...]

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return sum(unit.text_bytes for unit in self.units)

    @property
    def remote(self) -> "list[tuple[Input, HubFile]]":
        """The inputs that have to be fetched."""
        return [(item, item.remote) for item in self.inputs if item.remote is not None]

    @property
    def name(self) -> str:
        """Names the tokenized units while they are made: files are known by their sizes and times."""
        known = [[item.kind, item.name, item.bytes, item.sha256 or item.mtime_ns] for item in self.inputs]
        return json_sha256({"inputs": known} | _spec(self))

    def content_hash(self, hashes: list[str]) -> str:
        """Names what the units' tokens are: equal exactly if every one of them is. `hashes` are the inputs'."""
        known = [[item.kind, sha256] for item, sha256 in zip(self.inputs, hashes, strict=True)]
        return json_sha256({"inputs": known} | _spec(self))


def _spec(plan: Plan) -> dict[str, object]:
    return {
        "plan_version": PLAN_VERSION,
        "tokenizer": tokenizer.identity(),
        "units": [[unit.kind, len(unit.files), unit.start, unit.stop, unit.limit] for unit in plan.units],
        "columns": sorted({unit.column for unit in plan.units}),
    }


def json_sha256(content: object) -> str:
    """SHA-256 of what JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_plan(config: BuildConfig) -> Plan:
    """Cut the source into units. Opens every file, reads none to its end but for --limit-docs.

    What is on the hub is asked for once: the answer is kept in the work folder, if there is one, so that a restart
    goes on with the same commit whatever was pushed since.
    """
    inputs = tuple(item for source in config.sources for item in _inputs(config, source))
    _check_different(inputs)
    units = [dataclasses.replace(unit, index=i) for i, unit in enumerate(_cut(inputs, config.column))]
    if config.limit_docs is not None:
        units = list(_limited(units, config.limit_docs))
        used = {path for unit in units for path in unit.files}
        inputs = tuple(item for item in inputs if item.path in used)
    return Plan(inputs, tuple(units))


def _check_different(inputs: tuple[Input, ...]) -> None:
    seen: set[str] = set()
    for item in inputs:
        real = item.path if item.kind == "stream" else os.path.realpath(item.path)
        if real in seen:
            raise ValueError(f"{item.name} is named twice: its documents would stand twice in the dataset")
        seen.add(real)


def _inputs(config: BuildConfig, source: str) -> Iterator[Input]:
    from gpt2_data.sources import hub

    wanted = hub.parse(source)
    if wanted is not None:
        yield from _hub_inputs(config, source, wanted)
        return
    for kind, path in sources.expand(source):
        yield local_input(kind, path)


def local_input(kind: str, path: str) -> Input:
    """An input as it is on the disk now."""
    if kind == "pydocs":
        size = sum(len(text.encode()) for _, text in pydocs.documents())
        return Input(kind, path, path, size, sha256=pydocs.sha256())
    if kind == "tinyshakespeare" and path == kind:
        from gpt2_data.sources import download

        path = str(download.tinyshakespeare())
    status = os.stat(path)
    return Input(kind, path, os.path.basename(path), status.st_size, status.st_mtime_ns)


def check_unchanged(plan: Plan) -> None:
    """Raise ValueError if a file was touched since the plan was made."""
    for item in plan.inputs:
        if item.remote is None and item.kind != "stream" and local_input(item.kind, item.path) != item:
            raise ValueError(f"{item.path} was changed during the build: run the same command again")


# --- what is on the hub


def _hub_inputs(config: BuildConfig, source: str, wanted: Any) -> Iterator[Input]:
    from gpt2_data.sources import hub, remote

    listing, row_groups = _pinned(config, source)
    if listing is None:
        listing = hub.list_files(wanted)
        row_groups = [remote.row_groups(file, config.column) for file in listing.files] if listing.parquet else []
        _pin(config, source, listing, row_groups)
    if not listing.parquet:
        text = json.dumps(listing.to_json(), sort_keys=True)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        yield Input("stream", text, source, listing.size, sha256=sha256)
        return
    folder = downloads(config) / listing.commit[:12]
    for file, groups in zip(listing.files, row_groups, strict=True):
        rows = tuple((rows, size) for rows, size in groups)
        name, local = os.path.basename(file.path), str(folder / file.path)
        yield Input("parquet", local, name, file.size, sha256=file.sha256, remote=file, row_groups=rows)


def folder_of(item: Input, remote: "HubFile") -> Path:
    """The folder that holds the files of a commit, in which the file lies as in its repository."""
    return Path(item.path.removesuffix(remote.path))


def downloads(config: BuildConfig) -> Path:
    """Where a build puts what it fetches. A part that deletes does so in a folder of its own."""
    folder = config.downloads if config.downloads is not None else config.out / "downloads"
    if config.part is not None and config.delete_downloads:
        return folder / f"part-{config.part[0]}-of-{config.part[1]}"
    return folder


def _pin_file(config: BuildConfig, source: str) -> Path:
    name = hashlib.sha256(f"{source} {config.column}".encode()).hexdigest()[:16]
    return config.out / WORK / f"hub-{name}.json"


def _pinned(config: BuildConfig, source: str) -> "tuple[Listing | None, list[Any]]":
    from gpt2_data.sources import hub

    try:
        kept = json.loads(_pin_file(config, source).read_bytes())
        return hub.Listing.from_json(kept["listing"]), kept["row_groups"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, []


def _pin(config: BuildConfig, source: str, listing: "Listing", row_groups: list[Any]) -> None:
    from gpt2_data.formats import uint16 as formats

    path = _pin_file(config, source)
    if path.parent.exists():  # else this is a dry run
        with formats.atomic(path, path.parent) as file:
            file.write(json.dumps({"listing": listing.to_json(), "row_groups": row_groups}).encode())


# --- work units


def _cut(inputs: tuple[Input, ...], column: str) -> Iterator[Unit]:
    texts: list[Input] = []
    for item in inputs:
        if texts and (item.kind != "txt" or text_bytes(texts) >= UNIT_BYTES or len(texts) >= UNIT_FILES):
            yield _txt_unit(texts)
            texts = []
        if item.kind == "txt":
            texts.append(item)
        elif item.kind == "parquet":
            rows, sizes = zip(*(item.row_groups or readers.row_groups(item.path, column)), strict=True) or ((), ())
            yield from _cut_range(item, sizes, rows, UNIT_BYTES, column)
        elif item.kind == "jsonl":
            yield from _cut_jsonl(item, column)
        elif item.kind == "pydocs":
            lengths = [len(text) for _, text in pydocs.documents()]
            yield from _cut_range(item, lengths, [1] * len(lengths), PYDOCS_UNIT_BYTES, column)
        elif item.kind == "stream":
            yield from _cut_stream(item, column)
        else:
            yield Unit(0, item.kind, (item.path,), text_bytes=item.bytes)
    if texts:
        yield _txt_unit(texts)


def _txt_unit(texts: list[Input]) -> Unit:
    paths = tuple(item.path for item in texts)
    return Unit(0, "txt", paths, documents=len(paths), text_bytes=text_bytes(texts))


def text_bytes(items: list[Input]) -> int:
    """About how much text there is in text files."""
    return sum(item.bytes * (_COMPRESSION if readers.is_compressed(item.path) else 1) for item in items)


def _cut_range(item: Input, sizes: Any, documents: Any, unit_bytes: int, column: str) -> Iterator[Unit]:
    """Units of consecutive row groups or documents, each of as few as reach `unit_bytes`."""
    start = total = 0
    for i, size in enumerate(sizes, 1):
        total += size
        if total >= unit_bytes or i == len(sizes):
            count = sum(documents[start:i])
            yield Unit(0, item.kind, (item.path,), start, i, None, count, total, column)
            start, total = i, 0


def _cut_jsonl(item: Input, column: str) -> Iterator[Unit]:
    """Byte ranges that begin at line starts. A compressed file is one unit: it can only be read from its start."""
    if readers.is_compressed(item.path) or item.bytes <= UNIT_BYTES:
        yield Unit(0, "jsonl", (item.path,), text_bytes=text_bytes([item]), column=column)
        return
    with open(item.path, "rb") as file:
        start = 0
        while start < item.bytes:
            file.seek(min(start + UNIT_BYTES, item.bytes))
            stop = readers.next_line(file)
            yield Unit(0, "jsonl", (item.path,), start, stop, text_bytes=stop - start, column=column)
            start = stop


def _cut_stream(item: Input, column: str) -> Iterator[Unit]:
    from gpt2_data.sources import hub
    from gpt2_data.sources import streaming as streams

    count = streams.num_shards(hub.Listing.from_json(json.loads(item.path)))
    for i in range(count):
        yield Unit(0, "stream", (item.path,), i, text_bytes=item.bytes // count, column=column)


def _limited(units: list[Unit], limit: int) -> Iterator[Unit]:
    """The units that hold the first `limit` documents, the last of them cut short."""
    for unit in units:
        if unit.documents is not None:
            count = unit.documents
        else:  # counted only just past the limit
            count = _count(unit, limit + 1)
        if count > limit:
            share = int(unit.text_bytes * limit / count)
            if unit.kind == "txt":
                unit = dataclasses.replace(unit, files=unit.files[:limit])
            else:
                unit = dataclasses.replace(unit, limit=limit)
            unit = dataclasses.replace(unit, documents=limit, text_bytes=share)
        yield unit
        limit -= count
        if limit <= 0:
            return


def _count(unit: Unit, limit: int) -> int:
    if unit.kind == "jsonl":
        return readers.count_lines(unit.files[0], unit.start, unit.stop, limit)
    count = 0
    for batch in sources.read(dataclasses.replace(unit, limit=limit)):
        count += batch.documents
    return count
