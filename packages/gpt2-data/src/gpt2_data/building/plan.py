"""Plan a build: cut its source into fixed work units.

The cut depends on the source and the constants here, never on workers or machines: so the bytes of a build are the
same everywhere, and a restart can use the units that are done.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_data import vocabulary
from gpt2_data.building.config import BuildConfig
from gpt2_data.disk import sha256
from gpt2_data.sources import catalog, files, hub, opening, pydocs
from gpt2_data.sources.catalog import Unit
from gpt2_data.sources.download import WebFile
from gpt2_data.sources.hub import HubSource, Listing

PLAN_VERSION = 2
UNIT_BYTES = 16_000_000  # text in a work unit: a quarter of a second of one core with gigatoken, two with tiktoken
PYDOCS_UNIT_BYTES = 2_000_000  # smaller, so that two cores can share these 9 MB
UNIT_FILES = 4096  # text files in a work unit, at most
WORK = ".build"  # in a dataset's folder; it is removed when the dataset is whole
_COMPRESSION = 3  # of text by gzip or zstd; for estimates only


@dataclass(frozen=True)
class Input:
    """A file (or pydocs, or a stream) that documents come from."""

    kind: str
    path: str  # where it is, or will be once it is fetched from the hub; for a stream its Listing as JSON
    name: str  # without its folder: a dataset is the same wherever its sources are
    bytes: int
    mtime_ns: int = 0
    sha256: str | None = None  # if it is known without reading the file
    remote: WebFile | None = None
    row_groups: tuple[tuple[int, int], ...] = ()  # of Parquet on the hub: (rows, bytes of text)

    @property
    def known(self) -> list[object]:
        """Return what identifies it without reading it: for a local file its size and time."""
        return [self.kind, self.name, self.bytes, self.sha256 or self.mtime_ns]


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
    tokenizer: dict[str, object]  # as in dataset.json

    @functools.cached_property
    def name(self) -> str:
        """The name of this plan in the work folder."""
        return self._hash([item.known for item in self.inputs])

    def hashes(self, known: dict[str, str]) -> list[str]:
        """Return the inputs' SHA-256. A file is read only if `known` (path -> SHA-256) lacks it."""
        return [item.sha256 or known.get(item.path) or sha256(Path(item.path)) for item in self.inputs]

    def content_hash(self, hashes: list[str]) -> str:
        """Return a hash that is equal exactly if all units' tokens are. `hashes` are the inputs' SHA-256."""
        return self._hash([[item.kind, digest] for item, digest in zip(self.inputs, hashes, strict=True)])

    def _hash(self, inputs: list[list[Any]]) -> str:
        options = {(name, getattr(unit, name)) for unit in self.units for name in ("encoding", "split_on")}
        return _json_sha256(
            {name: value for name, value in options if value is not None}
            | {
                "inputs": inputs,
                "plan_version": PLAN_VERSION,
                "tokenizer": self.tokenizer,
                "units": [[unit.kind, len(unit.files), unit.start, unit.stop, unit.limit] for unit in self.units],
                "columns": sorted({unit.column for unit in self.units}),
            }
        )


def _json_sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_plan(config: BuildConfig) -> Plan:
    """Cut the source into units. Open every file, but read none to its end except for --limit-docs. Write nothing.

    Raises ValueError or OSError if a source is unknown, named twice or unreadable, or the hub does not answer.
    """
    inputs: list[Input] = []
    pins: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}  # of a file that a folder brought in
    for source in config.sources:
        if (on_hub := hub.parse(source)) is not None:
            inputs += _hub_inputs(config, source, on_hub, pins)
        else:
            some = list(itertools.starmap(_local_input, catalog.expand(source)))
            inputs += some
            if os.path.isdir(source):
                folders |= {item.path: source for item in some}
    names = Counter(item.name for item in inputs)
    inputs = [
        dataclasses.replace(item, name=_json_name(os.path.relpath(item.path, folders[item.path])))
        if names[item.name] > 1 and item.path in folders
        else item
        for item in inputs
    ]
    if config.split_on is not None and not any(item.kind == "txt" for item in inputs):
        raise ValueError("split_on is for text files, such as .txt and .md, and the source has none: leave it out")
    seen: set[str] = set()
    for item in inputs:
        real = item.path if item.kind == "stream" else os.path.realpath(item.path)
        if real in seen:
            raise ValueError(f"{item.name} is named twice, and its documents would be used twice: name it once")
        seen.add(real)
    units = [dataclasses.replace(unit, index=i) for i, unit in enumerate(_cut(inputs, config))]
    if config.limit_docs is not None:
        units = list(_limited(units, config.limit_docs))
        used = {path for unit in units for path in unit.files}
        inputs = [item for item in inputs if item.path in used]
    return Plan(tuple(inputs), tuple(units), pins, vocabulary.identity(config.vocabulary))


def request_name(config: BuildConfig) -> str:
    """Return a hash of what is requested: local files by name, size and time; hub sources by name alone."""
    sources: list[object] = []
    for source in config.sources:
        local = hub.parse(source) is None
        sources += [_local_input(*file).known for file in catalog.expand(source)] if local else [source]
    return _json_sha256(sources)


def _local_input(kind: str, path: str) -> Input:
    """Return a source's file as it is on the disk now."""
    if kind == "pydocs":
        size = sum(len(text.encode()) for _, text in pydocs.documents())
        return Input(kind, path, path, size, sha256=pydocs.sha256())
    if kind == "tinyshakespeare" and path == kind:
        path = str(hub.tinyshakespeare())
    status = os.stat(path)
    return Input(kind, path, _json_name(os.path.basename(path)), status.st_size, status.st_mtime_ns)


def _json_name(name: str) -> str:
    r"""Return a file's name as JSON can hold it: a byte that is not UTF-8 is \xNN, and then a backslash is \\.

    A name in which \xNN stands is written in the same way, so that no two names become one.
    """
    escaped = os.fsencode(name.replace("\\", r"\\")).decode("utf-8", "backslashreplace")
    return escaped if re.search(r"\\x[0-9a-f]{2}", escaped) else name


def check_unchanged(plan: Plan) -> None:
    """Raise ValueError if a file was touched since the plan was made."""
    for item in plan.inputs:
        if item.remote is not None or item.kind == "stream":
            continue
        now = _local_input(item.kind, item.path)
        if (now.bytes, now.mtime_ns, now.sha256) != (item.bytes, item.mtime_ns, item.sha256):
            raise ValueError(f"{item.path} was changed during the build: run the same command again")


def _hub_inputs(
    config: BuildConfig, source: str, on_hub: HubSource, pins: dict[str, dict[str, Any]]
) -> Iterator[Input]:
    """Yield a source's files, at an interrupted build's commit or else the newest, and record them in `pins`."""
    name = f"hub-{hashlib.sha256(f'{source} {config.column}'.encode()).hexdigest()[:16]}.json"
    try:
        pin = json.loads((config.out / WORK / name).read_bytes())
        listing, row_groups = Listing.from_json(pin["listing"]), pin["row_groups"]
    except (OSError, ValueError, KeyError, TypeError):
        listing = hub.list_files(on_hub)
        row_groups = [hub.row_groups(file, config.column) for file in listing.files] if listing.parquet else []
    pins[name] = {"listing": listing.to_json(), "row_groups": row_groups}
    if not listing.parquet:
        text = json.dumps(listing.to_json(), sort_keys=True)
        size = sum(file.size for file in listing.files)
        yield Input("stream", text, source, size, sha256=_json_sha256(listing.to_json()))
        return
    folder = downloads(config) / listing.commit[:12]
    for file, groups in zip(listing.files, row_groups, strict=True):
        rows = tuple((rows, size) for rows, size in groups)
        name, local = os.path.basename(file.path), str(folder / file.path)
        yield Input("parquet", local, name, file.size, sha256=file.sha256, remote=file, row_groups=rows)


def downloads(config: BuildConfig) -> Path:
    """Return the folder for a build's downloads. A part that deletes its downloads has its own folder."""
    folder = config.downloads or config.out / "downloads"
    if config.part is not None and config.delete_downloads:
        return folder / f"part-{config.part[0]}-of-{config.part[1]}"
    return folder


def _cut(inputs: Sequence[Input], config: BuildConfig) -> Iterator[Unit]:
    """Yield the units, not numbered yet."""
    for kind, items in itertools.groupby(inputs, lambda item: item.kind):
        if kind != "txt":
            for item in items:
                whole = Unit(0, kind, (item.path,), column=config.column, encoding=config.encoding)
                yield from _cut_file(item, whole)
            continue
        texts = list(items)  # many small files make a unit
        sizes = [_text_bytes(item) for item in texts]
        for start, stop in _ranges(sizes, UNIT_BYTES, UNIT_FILES):
            paths = tuple(item.path for item in texts[start:stop])
            count = len(paths) if config.split_on is None else None
            whole = Unit(0, "txt", paths, encoding=config.encoding, split_on=config.split_on)
            yield dataclasses.replace(whole, documents=count, text_bytes=sum(sizes[start:stop]))


def _cut_file(item: Input, whole: Unit) -> Iterator[Unit]:
    unit_bytes = UNIT_BYTES
    if item.kind == "parquet":
        documents = item.row_groups or files.row_groups(item.path, whole.column)
    elif item.kind == "pydocs":
        documents, unit_bytes = [(1, len(text)) for _, text in pydocs.documents()], PYDOCS_UNIT_BYTES
    else:
        if item.kind in ("json", "csv"):
            yield dataclasses.replace(whole, text_bytes=_text_bytes(item))
        elif item.kind == "jsonl":
            yield from _cut_lines(item, whole)
        elif item.kind == "stream":
            count = hub.num_shards(Listing.from_json(json.loads(item.path)))
            yield from (dataclasses.replace(whole, start=i, text_bytes=item.bytes // count) for i in range(count))
        else:
            yield Unit(0, item.kind, (item.path,), text_bytes=item.bytes)
        return
    for start, stop in _ranges([size for _, size in documents], unit_bytes):
        count, size = (sum(numbers) for numbers in zip(*documents[start:stop], strict=True))
        yield dataclasses.replace(whole, start=start, stop=stop, documents=count, text_bytes=size)


def _cut_lines(item: Input, whole: Unit) -> Iterator[Unit]:
    """Yield byte ranges that begin at line starts, or all of a file that can only be read from its start."""
    small = item.bytes <= UNIT_BYTES
    if small or opening.is_compressed(item.path) or opening.judge(item.path, whole.encoding)[0] != "utf-8-sig":
        yield dataclasses.replace(whole, text_bytes=_text_bytes(item))
        return
    start = 0
    with open(item.path, "rb") as file:
        while start < item.bytes:
            file.seek(min(start + UNIT_BYTES, item.bytes))
            stop = files.next_line(file)
            yield dataclasses.replace(whole, start=start, stop=stop, text_bytes=stop - start)
            start = stop


def _ranges(sizes: Sequence[int], unit_bytes: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of neighbours: as few as reach `unit_bytes`, and at most `most`."""
    start = total = 0
    for stop, size in enumerate(sizes, 1):
        total += size
        if total >= unit_bytes or stop - start == most or stop == len(sizes):
            yield start, stop
            start, total = stop, 0


def _text_bytes(item: Input) -> int:
    return item.bytes * (_COMPRESSION if opening.is_compressed(item.path) else 1)


def _limited(units: list[Unit], limit: int) -> Iterator[Unit]:
    """Yield the units that hold the first `limit` documents, the last of them cut short."""
    for unit in units:
        count = unit.documents
        if count is None:  # they are not counted yet: count only just past the limit
            count = sum(batch.documents for batch in catalog.read(dataclasses.replace(unit, limit=limit + 1)))
        if count > limit:
            text = unit.text_bytes * limit // count
            one_each = unit.kind == "txt" and unit.split_on is None
            short = {"files": unit.files[:limit]} if one_each else {"limit": limit}
            unit = dataclasses.replace(unit, documents=limit, text_bytes=text, **short)
        yield unit
        limit -= count
        if limit <= 0:
            return
