"""What a build will do: its source cut into fixed work units.

How a source is cut depends on the source and the constants here, never on workers or machines: that is what makes
the bytes of a build the same everywhere and lets a restart use the units that are done.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_data import tokenizer
from gpt2_data.building.config import BuildConfig
from gpt2_data.sources import catalog, download, files, hub, pydocs, streaming
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.hub import HubSource, Listing
from gpt2_data.sources.web import WebFile

PLAN_VERSION = 2
UNIT_BYTES = 16_000_000  # text in a work unit: a quarter of a second of one core with gigatoken, two with tiktoken
PYDOCS_UNIT_BYTES = 2_000_000  # smaller, so that two cores share what is only 9 MB
UNIT_FILES = 4096  # text files in a work unit, at most
WORK = ".build"
"""The folder in a dataset's folder that a build works in; it is removed when the dataset is whole."""
_COMPRESSION = 3  # of text by gzip or zstd; for estimates only


@dataclass(frozen=True)
class Input:
    """A file (or pydocs, or a stream) that documents come from.

    Attributes:
        path: where it is, or will be once it is fetched from the hub; for a stream its Listing as JSON.
        name: without its folder: a dataset is the same wherever its sources lay.
        sha256: if it is known without reading the file.
        row_groups: of Parquet on the hub: (rows, bytes of text).
    """

    kind: str
    path: str
    name: str
    bytes: int
    mtime_ns: int = 0
    sha256: str | None = None
    remote: WebFile | None = None
    row_groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """The inputs in order and the work units they are cut into.

    Attributes:
        pins: file name in the work folder -> the files of a source on the hub at one commit, as JSON, so that a
            restart builds from the same commit whatever was pushed since.
    """

    inputs: tuple[Input, ...]
    units: tuple[Unit, ...]
    pins: dict[str, dict[str, Any]]

    @property
    def text_bytes(self) -> int:
        """The number of bytes of text, roughly."""
        return sum(unit.text_bytes for unit in self.units)

    @property
    def remote(self) -> list[tuple[Input, WebFile]]:
        """The inputs that have to be fetched."""
        return [(item, item.remote) for item in self.inputs if item.remote is not None]

    @functools.cached_property
    def name(self) -> str:
        """The name of this plan in the work folder; local files are known by their sizes and times."""
        known = [[item.kind, item.name, item.bytes, item.sha256 or item.mtime_ns] for item in self.inputs]
        return json_sha256({"inputs": known} | self._spec())

    def content_hash(self, hashes: list[str]) -> str:
        """Return a name that is equal exactly if all units' tokens are. `hashes` are the inputs' SHA-256."""
        known = [[item.kind, sha256] for item, sha256 in zip(self.inputs, hashes, strict=True)]
        return json_sha256({"inputs": known} | self._spec())

    def _spec(self) -> dict[str, object]:
        return {
            "plan_version": PLAN_VERSION,
            "tokenizer": tokenizer.identity(),
            "units": [[unit.kind, len(unit.files), unit.start, unit.stop, unit.limit] for unit in self.units],
            "columns": sorted({unit.column for unit in self.units}),
        }


def json_sha256(content: object) -> str:
    """The SHA-256 of what JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_plan(config: BuildConfig) -> Plan:
    """Cut the source into units. Opens every file, reads none to its end but for --limit-docs. Writes nothing.

    Raises:
        ValueError: a source that is none, is named twice or cannot be read.
        OSError: a file that cannot be read, a hub that does not answer.
    """
    inputs: list[Input] = []
    pins: dict[str, dict[str, Any]] = {}
    for source in config.sources:
        wanted = hub.parse(source)
        if wanted is None:
            inputs += [local_input(kind, path) for kind, path in catalog.expand(source)]
        else:
            name, pins[name], listing = _pin(config, source, wanted)
            inputs += _hub_inputs(config, source, listing, pins[name]["row_groups"])
    _check_different(inputs)
    units = [dataclasses.replace(unit, index=i) for i, unit in enumerate(_cut(inputs, config.column))]
    if config.limit_docs is not None:
        units = list(_limited(units, config.limit_docs))
        used = {path for unit in units for path in unit.files}
        inputs = [item for item in inputs if item.path in used]
    return Plan(tuple(inputs), tuple(units), pins)


def request_name(config: BuildConfig) -> str:
    """Return a name of what is asked for: files by name, size and time; sources on the hub by name alone."""
    sources: list[object] = []
    for source in config.sources:
        if hub.parse(source) is not None:
            sources.append(source)
            continue
        for kind, path in catalog.expand(source):
            item = local_input(kind, path)
            sources.append([kind, item.name, item.bytes, item.sha256 or item.mtime_ns])
    return json_sha256(sources)


def _check_different(inputs: Sequence[Input]) -> None:
    seen: set[str] = set()
    for item in inputs:
        real = item.path if item.kind == "stream" else os.path.realpath(item.path)
        if real in seen:
            raise ValueError(f"{item.name} is named twice: its documents would stand twice in the dataset")
        seen.add(real)


def local_input(kind: str, path: str) -> Input:
    """Return an input as it is on the disk now."""
    if kind == "pydocs":
        size = sum(len(text.encode()) for _, text in pydocs.documents())
        return Input(kind, path, path, size, sha256=pydocs.sha256())
    if kind == "tinyshakespeare" and path == kind:
        path = str(download.tinyshakespeare())
    status = os.stat(path)
    return Input(kind, path, os.path.basename(path), status.st_size, status.st_mtime_ns)


def check_unchanged(plan: Plan) -> None:
    """Raise ValueError if a file was touched since the plan was made."""
    for item in plan.inputs:
        if item.remote is None and item.kind != "stream" and local_input(item.kind, item.path) != item:
            raise ValueError(f"{item.path} was changed during the build: run the same command again")


# --- sources on the hub


def _pin(config: BuildConfig, source: str, wanted: HubSource) -> tuple[str, dict[str, Any], Listing]:
    """Return the pin's file name, the pin and its listing: an interrupted build's, or the hub's of today."""
    name = f"hub-{hashlib.sha256(f'{source} {config.column}'.encode()).hexdigest()[:16]}.json"
    try:
        pin = json.loads((config.out / WORK / name).read_bytes())
        return name, {key: pin[key] for key in ("listing", "row_groups")}, Listing.from_json(pin["listing"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    listing = hub.list_files(wanted)
    row_groups = [hub.row_groups(file, config.column) for file in listing.files] if listing.parquet else []
    return name, {"listing": listing.to_json(), "row_groups": row_groups}, listing


def _hub_inputs(config: BuildConfig, source: str, listing: Listing, row_groups: list[Any]) -> Iterator[Input]:
    if not listing.parquet:
        text = json.dumps(listing.to_json(), sort_keys=True)
        yield Input("stream", text, source, listing.size, sha256=hashlib.sha256(text.encode()).hexdigest())
        return
    folder = downloads(config) / listing.commit[:12]
    for file, groups in zip(listing.files, row_groups, strict=True):
        rows = tuple((rows, size) for rows, size in groups)
        name, local = os.path.basename(file.path), str(folder / file.path)
        yield Input("parquet", local, name, file.size, sha256=file.sha256, remote=file, row_groups=rows)


def downloads(config: BuildConfig) -> Path:
    """Return where a build puts what it fetches. A part that deletes does so in a folder of its own."""
    folder = config.downloads if config.downloads is not None else config.out / "downloads"
    if config.part is not None and config.delete_downloads:
        return folder / f"part-{config.part[0]}-of-{config.part[1]}"
    return folder


# --- work units


def _cut(inputs: Sequence[Input], column: str) -> Iterator[Unit]:
    texts: list[Input] = []
    for item in inputs:
        if texts and (item.kind != "txt" or text_bytes(texts) >= UNIT_BYTES or len(texts) >= UNIT_FILES):
            yield _txt_unit(texts)
            texts = []
        if item.kind == "txt":
            texts.append(item)
        elif item.kind == "parquet":
            groups = item.row_groups or files.row_groups(item.path, column)
            sizes, rows = [size for _, size in groups], [rows for rows, _ in groups]
            yield from _cut_range(item, sizes, rows, UNIT_BYTES, column)
        elif item.kind == "jsonl":
            yield from _cut_jsonl(item, column)
        elif item.kind == "pydocs":
            lengths = [len(text) for _, text in pydocs.documents()]
            yield from _cut_range(item, lengths, [1] * len(lengths), PYDOCS_UNIT_BYTES, column)
        elif item.kind == "stream":
            count = streaming.num_shards(Listing.from_json(json.loads(item.path)))
            for i in range(count):
                yield Unit(0, "stream", (item.path,), i, text_bytes=item.bytes // count, column=column)
        else:
            yield Unit(0, item.kind, (item.path,), text_bytes=item.bytes)
    if texts:
        yield _txt_unit(texts)


def _txt_unit(texts: list[Input]) -> Unit:
    paths = tuple(item.path for item in texts)
    return Unit(0, "txt", paths, documents=len(paths), text_bytes=text_bytes(texts))


def text_bytes(items: list[Input]) -> int:
    """Return about how many bytes of text there are in text files."""
    return sum(item.bytes * (_COMPRESSION if files.is_compressed(item.path) else 1) for item in items)


def _cut_range(
    item: Input, sizes: Sequence[int], documents: Sequence[int], unit_bytes: int, column: str
) -> Iterator[Unit]:
    """Yield units of consecutive row groups or documents, each of as few as reach `unit_bytes`."""
    start = total = 0
    for i, size in enumerate(sizes, 1):
        total += size
        if total >= unit_bytes or i == len(sizes):
            count = sum(documents[start:i])
            yield Unit(0, item.kind, (item.path,), start, i, None, count, total, column)
            start, total = i, 0


def _cut_jsonl(item: Input, column: str) -> Iterator[Unit]:
    """Yield byte ranges that begin at line starts, or all of a compressed file, which is read from its start."""
    if files.is_compressed(item.path) or item.bytes <= UNIT_BYTES:
        yield Unit(0, "jsonl", (item.path,), text_bytes=text_bytes([item]), column=column)
        return
    with open(item.path, "rb") as file:
        start = 0
        while start < item.bytes:
            file.seek(min(start + UNIT_BYTES, item.bytes))
            stop = files.next_line(file)
            yield Unit(0, "jsonl", (item.path,), start, stop, text_bytes=stop - start, column=column)
            start = stop


def _limited(units: list[Unit], limit: int) -> Iterator[Unit]:
    """Yield the units that hold the first `limit` documents, the last of them cut short."""
    for unit in units:
        # Documents that no one counted are counted only just past the limit.
        count = unit.documents if unit.documents is not None else _count(unit, limit + 1)
        if count > limit:
            share = int(unit.text_bytes * limit / count)
            unit = dataclasses.replace(unit, documents=limit, text_bytes=share)
            if unit.kind == "txt":
                unit = dataclasses.replace(unit, files=unit.files[:limit])
            else:
                unit = dataclasses.replace(unit, limit=limit)
        yield unit
        limit -= count
        if limit <= 0:
            return


def _count(unit: Unit, limit: int) -> int:
    if unit.kind == "jsonl":
        return files.count_lines(unit.files[0], unit.start, unit.stop, limit)
    return sum(batch.documents for batch in catalog.read(dataclasses.replace(unit, limit=limit)))
