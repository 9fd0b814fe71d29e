"""Datasets on the Hugging Face hub: their names, their files, and the documents of those that are not Parquet.

A listing is pinned to a commit and kept on disk: a build that resumes next week reads the same bytes.
How configs and splits are chosen: https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

import contextlib
import functools
import re
import statistics
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import tqdm

from gpt2_data import disk
from gpt2_data.sources import download, files
from gpt2_data.sources.download import READ_TIMEOUT, WebFile
from gpt2_data.sources.opening import first_line

SHORT = {name: (f"HuggingFaceFW/{name}", "sample-10BT") for name in ("fineweb-edu", "fineweb")}

_NAME = r"[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(
    rf"hf:(?P<repo>{_NAME}(?:/{_NAME})?)(?:@(?P<revision>[^\s:@]+))?(?::(?P<config>[^\s:]*)(?::(?P<split>\w[\w.]*))?)?"
)
_FOOTER = 1 << 16  # bytes of a Parquet file's end that are requested first; FineWeb-Edu's footers have 3 MB


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the hub. revision None: main; config None: the dataset's default."""

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Listing:
    """The data files of a source, by path, at one commit."""

    repo: str
    commit: str
    config: str | None  # as the dataset's card names it; None where the card names none
    split: str
    files: tuple[WebFile, ...]

    @property
    def parquet(self) -> bool:
        """True if the files can be read as they are; otherwise `stream` reads them."""
        return all(file.path.endswith(".parquet") for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return what from_json takes, for json.dump."""
        files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]
        return asdict(self) | {"files": files}

    @classmethod
    def from_json(cls, data: Any) -> "Listing":
        """Return the listing that to_json wrote. Raises ValueError, KeyError or TypeError if it is invalid."""
        repo = _matching(_NAME + f"(/{_NAME})?", data["repo"])
        commit = _matching("[0-9a-f]{40}", data["commit"])
        files = tuple(hub_file(repo, commit, row["path"], row["size"], row["sha256"]) for row in data["files"])
        return cls(repo, commit, data["config"], data["split"], files)


def parse(text: str) -> HubSource | None:
    """Return what a SOURCE names on the hub; None if it names none. Raises ValueError if it is malformed."""
    short, _, config = text.partition(":")
    if short in SHORT and re.fullmatch(r"[\w-]+(:[^\s:]+)?", text):
        return HubSource(SHORT[short][0], config=config or SHORT[short][1])
    if short not in ("hf", *SHORT):
        return None
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: write hf:REPO[@REVISION][:CONFIG[:SPLIT]], or such as fineweb-edu:CONFIG")
    return HubSource(match["repo"], match["revision"], match["config"] or None, match["split"] or "train")


def row_groups(file: WebFile, column: str = "text") -> list[tuple[int, int]]:
    """Do what files.row_groups does for a file on the hub, reading its footer alone. Also raises OSError."""
    import pyarrow as pa

    footer = download.read_range(file.url, max(0, file.size - _FOOTER), file.size)
    size = 8 + int.from_bytes(footer[-8:-4], "little")
    if len(footer) < size <= file.size:
        footer = download.read_range(file.url, file.size - size, file.size)
    return files.row_groups(pa.BufferReader(footer), column, file.path)


def list_files(source: HubSource) -> Listing:
    """List the source's files at its revision's current commit, with one request.

    Raises ValueError, naming the configs or splits that there are, or OSError.
    """
    from huggingface_hub import HfApi

    what = f"hub dataset {source.repo}" + (f", revision {source.revision}" if source.revision else "")

    @download.transport(what)
    def ask() -> Any:
        hub = HfApi(library_name="gpt2-data")
        return hub.dataset_info(source.repo, revision=source.revision, files_metadata=True, timeout=READ_TIMEOUT)

    info = download.insist(what, ask)
    siblings = {row.rfilename: row for row in info.siblings or []}
    names = sorted(name for name in siblings if not _NO_DATA.fullmatch(name))
    config, splits = _splits(source, (info.card_data or {}).get("configs") or [], names)
    if not (chosen := splits.get(source.split)):
        there_are = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"{what}: no file of split {source.split!r}; the splits are: {there_are}")
    if statistics.mode(PurePosixPath(name).suffix for name in chosen) == ".parquet":
        # Other files, such as a licence or a picture, are left out, as `datasets` does.
        chosen = [name for name in chosen if name.endswith(".parquet")]
    commit = _matching("[0-9a-f]{40}", info.sha)
    rows = [(name, siblings[name].size, siblings[name].lfs) for name in chosen]
    files = tuple(hub_file(source.repo, commit, name, size, lfs and lfs.sha256) for name, size, lfs in rows)
    return Listing(source.repo, commit, config, source.split, files)


def _splits(source: HubSource, configs: list[Any], names: list[str]) -> tuple[str | None, dict[str, list[str]]]:
    """Return the config as the card has it, and the files of each split."""
    known = {str(entry.get("config_name", "default")): entry for entry in configs if isinstance(entry, dict)}
    there_are = f"there are: {', '.join(known)}" if known else "it has none"
    config = source.config or next((name for name, entry in known.items() if entry.get("default")), "default")
    if source.config is None and known and config not in known:
        config = next(iter(known))
        if len(known) > 1:
            raise ValueError(f"hf:{source.repo}: name a config, as in hf:{source.repo}:{config}; {there_are}")
    if config in known:
        return config, _card_splits(source, known[config], names)
    # The card has no configs, or leaves out this one, which is a folder.
    folder = "" if config == "default" and not known else f"{config}/"
    if (splits := _splits_by_name(names, folder)) or not folder:
        return None, splits
    raise ValueError(f"hf:{source.repo}: no config {config!r}; {there_are}")


def _card_splits(source: HubSource, entry: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    """Return the files of each split from an entry of the card's `configs:`."""
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]  # huggingface_hub requires it

    base = (str(entry.get("data_dir") or "").strip("/") + "/").removeprefix("/")
    if (rows := entry.get("data_files")) is None:
        return _splits_by_name(names, base)
    splits: dict[str, set[str]] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        split, paths = (str(row.get("split")), row.get("path")) if isinstance(row, dict) else ("train", row)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if not isinstance(pattern, str) or "://" in pattern:
                raise ValueError(f"hub dataset {source.repo}: its card names a file of another place: {pattern!r}")
            regex = re.compile(glob_translate(base + pattern.removeprefix("./")))
            splits.setdefault(split, set()).update(filter(regex.fullmatch, names))
    return {split: sorted(files) for split, files in splits.items()}


_SPLITS = ("train|training", "validation|valid|dev|val", "test|testing|eval|evaluation")  # name, other words
_NO_DATA = re.compile(r"(.*/)?((\.|__).*|README\.md|(config|dataset_infos?|dataset_dict)\.json|dummy_data\.zip)")


def _splits_by_name(names: list[str], folder: str = "") -> dict[str, list[str]]:
    """Return the files of each split by their names: data/train-00000-of-00002*, folders or files named train."""
    names = [name for name in names if name.startswith(folder)]
    splits: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", name.removeprefix(folder))
        if match:
            splits.setdefault(match[1], []).append(name)
    for where in (r"(?:.*[-._ 0-9/])?(?:{})(?:[-._ 0-9][^/]*)?/.*", r"(?:.*[-._ 0-9/])?(?:{})[-._ 0-9][^/]*"):
        if splits:
            break
        for words in _SPLITS:
            regex = re.compile(where.format(words))
            if inside := [name for name in names if regex.fullmatch(name.removeprefix(folder))]:
                splits[words.partition("|")[0]] = inside
    return splits or ({"train": names} if names else {})


def hub_file(repo: str, commit: str, path: Any, size: Any, sha256: Any) -> WebFile:
    """Return the file of a dataset at a commit. Its path is checked: it becomes a path on this machine."""
    from huggingface_hub import constants

    names = set(_matching(r"[^\x00-\x1f\\]+", path).split("/"))
    if names & {"", ".", ".."} or type(size) is not int or size < 0:
        raise ValueError(f"{repo}: {path!r} of {size!r} bytes is not a valid file of a dataset")
    url = f"{constants.ENDPOINT}/datasets/{repo}/resolve/{commit}/{quote(path)}"
    return WebFile(url, path, size, None if sha256 is None else _matching("[0-9a-f]{64}", sha256))


def _matching(pattern: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{value!r} in a listing of a dataset's files is not what it should be")
    return value


def fetch(source: str, folder: Path, *, name: str | None = None, sha256: str | None = None) -> Path:
    """Download a file, unless it is there already, and return its path.

    The file is there whole and checked, or not at all. A broken download resumes, even in another process.

    Args:
        source: an address (https://...), or hf:REPO[@REVISION][:CONFIG[:SPLIT]], a split that is a single file.
        folder: where the file is kept; it is created if need be.
        name: of the file in `folder`. By default the last part of the address, or OWNER--REPO/PATH of the hub.
        sha256: in hex. An existing file of that name and hash is used without a request. By default it is the
            hash that the hub lists; for other addresses, only the size is checked by default.

    Raises:
        ValueError: the source is malformed, or the hub has no such config or split, or several files.
        OSError: the server refuses, is not reached within half a minute, or sends wrong content.
    """
    on_hub = parse(source)
    if on_hub is None:
        match = re.fullmatch(r"https?://[^?]+/([^/?]+)(?:\?.*)?", source)
        if match is None:
            raise ValueError(f"{source!r}: write the address of a file (https://...) or hf:REPO[:CONFIG[:SPLIT]]")
        name = name or match[1]
    if name and sha256 is not None and (folder / name).is_file():
        if disk.sha256(folder / name) == sha256:
            return folder / name
        (folder / f"{name}.json").unlink(missing_ok=True)  # the receipt would hide that the file is damaged
    if on_hub is None:
        assert name is not None
        file = WebFile(source, name, download.insist(source, lambda: _size_of(source)), sha256)
    else:
        files = list_files(on_hub).files
        if len(files) != 1:
            raise ValueError(f"{source} has {len(files)} files on the hub, not one")
        name = name or f"{on_hub.repo.replace('/', '--')}/{files[0].path}"
        file = replace(files[0], path=name, sha256=sha256 or files[0].sha256)
    return download.download_file(file, folder)


def _size_of(url: str) -> int:
    with download.get(url, 0, 1) as (_, size):
        if size is None:
            raise OSError(f"{url}: the server does not say how long the file is")
        return size


TINYSHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tinyshakespeare() -> Path:
    """Return TinyShakespeare in the user's cache, downloaded once and checked each time. Raises OSError."""
    path = disk.cache_folder() / "tinyshakespeare.txt"
    try:
        return fetch(TINYSHAKESPEARE, path.parent, name=path.name, sha256=TINYSHAKESPEARE_SHA256)
    except OSError as error:
        raise OSError(f"{str(error).rstrip('.')}; or put {TINYSHAKESPEARE} at {path}") from error


def num_shards(listing: Listing) -> int:
    """Return how many shards `stream` finds in a dataset that is not Parquet. Raises ValueError in one line."""
    with _one_line_errors(listing):
        return int(_open(listing).num_shards)


def stream(listing: Listing, shard: int, column: str = "text") -> Iterator[str | None]:
    """Yield a shard's documents in order, read by `datasets`; null becomes None. Raises ValueError in one line.

    A shard is what `datasets` makes of a data file: the same documents in whichever process reads it.
    """
    with _one_line_errors(listing):
        opened = _open(listing)
        part = opened.shard(num_shards=opened.num_shards, index=shard)
        if opened.column_names is not None and column in opened.column_names:
            part = part.select_columns([column])  # the others need not be decoded
        for batch in part.iter(batch_size=256):
            if column not in batch:
                raise ValueError(f"no column {column!r}; the columns are {', '.join(batch)}")
            for text in batch[column]:
                if not isinstance(text, str | None):
                    raise ValueError(f"column {column!r} holds {type(text).__name__}, not strings")
                yield text


@functools.lru_cache(maxsize=1)  # it takes ten requests, and shards are read one after the other
def _open(listing: Listing) -> Any:
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which an ended worker would leave behind
    try:
        import datasets
    except ImportError:
        raise ValueError("it is not Parquet: pip install 'gpt2-data[datasets]' to read it") from None
    name = listing.config  # its options, such as a CSV's separator, are in the card
    files = None if name else {listing.split: [file.path for file in listing.files]}
    return datasets.load_dataset(
        listing.repo, name=name, data_files=files, split=listing.split, revision=listing.commit, streaming=True
    )


@contextlib.contextmanager
def _one_line_errors(listing: Listing) -> Iterator[None]:
    """Turn the dozen kinds of errors that `datasets` raises, some of many lines, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise ValueError(f"hub dataset {listing.repo}: {reason}") from error
