"""Datasets on the Hugging Face hub: their names and their files.

A listing is pinned to a commit and can be kept on disk, so that a build that resumes next week reads the same
bytes though `main` has moved. How configs and splits are chosen:
https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from gpt2_data.sources import files as readers
from gpt2_data.sources import web
from gpt2_data.sources.web import WebFile

SHORT = {  # name -> repository, config
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
}

_NAME = r"[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(
    rf"hf:(?P<repo>{_NAME}(?:/{_NAME})?)(?:@(?P<revision>[^\s:@]+))?(?::(?P<config>[^\s:]*)(?::(?P<split>\w[\w.]*))?)?"
)
_FOOTER = 1 << 16  # bytes of a Parquet file's end that are asked for first; FineWeb-Edu's footers have 3 MB


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the hub. revision None: main; config None: the dataset's default."""

    repo: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    @property
    def name(self) -> str:
        """As it is written on the command line, in full."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}:{self.config or ''}:{self.split}"


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
        """True if the files can be read as they are; otherwise streaming.py reads them."""
        return all(file.path.endswith(".parquet") for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return what from_json takes, for json.dump."""
        files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in self.files]
        return asdict(self) | {"files": files}

    @classmethod
    def from_json(cls, data: Any) -> "Listing":
        """Return a listing that was kept. Raises ValueError if it is none."""
        try:
            repo = _matching(_NAME + f"(/{_NAME})?", data["repo"])
            commit = _matching("[0-9a-f]{40}", data["commit"])
            config = None if data["config"] is None else _matching(r"\S+", data["config"])
            files = tuple(hub_file(repo, commit, row["path"], row["size"], row["sha256"]) for row in data["files"])
            return cls(repo, commit, config, _matching(r"[\w.]+", data["split"]), files)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a listing of a dataset's files: {error!r}") from error


def parse(text: str) -> HubSource | None:
    """Return what a SOURCE names on the hub, or None. Raises ValueError if it is meant so but malformed."""
    short, colon, config = text.partition(":")
    if short in SHORT:
        if colon and not re.fullmatch(r"[^\s:]+", config):
            raise ValueError(f"{text!r}: write {short} or {short}:CONFIG, as in {short}:{SHORT[short][1]}")
        return HubSource(SHORT[short][0], config=config or SHORT[short][1])
    if short != "hf":
        return None
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: write hf:REPO[@REVISION][:CONFIG[:SPLIT]], as in hf:roneneldan/TinyStories")
    return HubSource(match["repo"], match["revision"], match["config"] or None, match["split"] or "train")


def row_groups(file: WebFile, column: str = "text") -> list[tuple[int, int]]:
    """Return (rows, bytes of text uncompressed) of each row group of a Parquet file, by its footer alone.

    Raises:
        ValueError: the file is no Parquet, or `column` holds no strings.
        OSError: the file is not reached.
    """
    import pyarrow as pa

    footer = web.read_range(file.url, max(0, file.size - _FOOTER), file.size)
    size = 8 + int.from_bytes(footer[-8:-4], "little")
    if len(footer) < size <= file.size:
        footer = web.read_range(file.url, file.size - size, file.size)
    return readers.row_groups(pa.BufferReader(footer), column, file.path)


# --- which files


def list_files(source: HubSource) -> Listing:
    """List the source's files at the commit that its revision stands for now, by one request.

    Raises:
        ValueError: no such dataset, config or split; the known ones are named.
        OSError: not allowed, or not reached.
    """
    info = web.Patience(f"hub dataset {source.repo}").call(lambda: _dataset_info(source))
    siblings = {row.rfilename: row for row in info.siblings or []}
    names = sorted(name for name in siblings if not _NO_DATA.fullmatch(name))
    configs = (info.card_data.get("configs") if info.card_data else None) or []
    config, splits = _splits(source, configs, names)
    if source.split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"{source.name}: no split {source.split!r}; there are: {known}")
    chosen = [siblings[name] for name in _one_kind(splits[source.split])]
    if not chosen:
        raise ValueError(f"{source.name}: its card names files that the dataset does not have")
    commit = _matching("[0-9a-f]{40}", info.sha)
    files = (hub_file(source.repo, commit, row.rfilename, row.size, row.lfs and row.lfs.sha256) for row in chosen)
    return Listing(source.repo, commit, config, source.split, tuple(files))


def _dataset_info(source: HubSource) -> Any:
    """Ask the hub about the dataset, with sizes and hashes of its files. Raises web.Again, too."""
    from huggingface_hub import HfApi, constants, errors

    what = f"hub dataset {source.repo}"
    try:
        with web.transport(constants.ENDPOINT):
            return HfApi(library_name="gpt2-data").dataset_info(
                source.repo, revision=source.revision, files_metadata=True, timeout=web.READ_TIMEOUT
            )
    except errors.OfflineModeIsEnabled as error:
        raise OSError(f"{source.name}: HF_HUB_OFFLINE is set: unset it, or name local files") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{what} has no revision {source.revision!r}") from error
    except errors.HfHubHTTPError as error:
        if type(error) is errors.RepositoryNotFoundError:  # the hub does not tell a private dataset from none
            raise ValueError(f"no {what}; if it is private, {web.LOGIN}") from error
        raise web.refusal(error.response, what) from error
    except json.JSONDecodeError as error:
        raise web.Again("the hub answers with something that is not JSON") from error


def _splits(source: HubSource, configs: list[Any], names: list[str]) -> tuple[str | None, dict[str, list[str]]]:
    """Return the config as the card has it, and the files of each split."""
    known = {str(entry.get("config_name", "default")): entry for entry in configs if isinstance(entry, dict)}
    there_are = f"there are: {', '.join(known)}" if known else "it has none"
    config = source.config
    if config is None and known:
        marked = [name for name, entry in known.items() if entry.get("default")]
        config = next(iter([*marked, *(["default"] if "default" in known else []), *known]))
        if len(known) > 1 and not marked and config != "default":
            raise ValueError(f"hf:{source.repo}: name a config, as in hf:{source.repo}:{config}; {there_are}")
    if config in known:
        return config, _card_splits(source, known[config], names)
    if config is None or (config == "default" and not known):
        return None, _splits_by_name(names)
    for folder in (f"data/{config}/", f"{config}/"):  # a config that the card leaves out
        if splits := _splits_by_name(names, folder):
            return None, splits
    raise ValueError(f"hf:{source.repo}: no config {config!r}; {there_are}")


def _card_splits(source: HubSource, entry: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    """Return the files of each split by an entry of the card's `configs:`.

    data_files is a string, a list, or a list of splits.
    """
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]  # huggingface_hub requires it

    base = str(entry.get("data_dir") or "").strip("/")
    base = f"{base}/" if base else ""
    given = entry.get("data_files")
    if given is None:
        return _splits_by_name(names, base)
    patterns: dict[str, list[Any]] = {}
    for row in given if isinstance(given, list) else [given]:
        split, path = (str(row.get("split")), row.get("path")) if isinstance(row, dict) else ("train", row)
        patterns.setdefault(split, []).extend(path if isinstance(path, list) else [path])
    splits = {}
    for split, globs in patterns.items():
        for pattern in globs:
            if not isinstance(pattern, str) or "://" in pattern:
                raise ValueError(f"{source.name}: its card names data files that are not its own: {pattern!r}")
        regexes = [re.compile(glob_translate(base + pattern.removeprefix("./"))) for pattern in globs]
        splits[split] = [name for name in names if any(regex.fullmatch(name) for regex in regexes)]
    return splits


_KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_NO_DATA = re.compile(
    r"(?:.*/)?(?:\.|__).*|(?:.*/)?(?:README\.md|(?:config|dataset_infos?|dataset_dict)\.json|dummy_data\.zip)"
)


def _splits_by_name(names: list[str], folder: str = "") -> dict[str, list[str]]:
    """Return the files of each split by their names: data/train-00000-of-00002*, folders or files named train."""
    names = [name for name in names if name.startswith(folder)]
    sharded: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", name.removeprefix(folder))
        if match:
            sharded.setdefault(match[1], []).append(name)
    if sharded:
        return sharded
    for where in (r"(?:.*[-._ 0-9/])?(?:{})(?:[-._ 0-9][^/]*)?/.*", r"(?:.*[-._ 0-9/])?(?:{})[-._ 0-9][^/]*"):
        splits = {}
        for split, words in _KEYWORDS.items():
            regex = re.compile(where.format(words))
            if inside := [name for name in names if regex.fullmatch(name.removeprefix(folder))]:
                splits[split] = inside
        if splits:
            return splits
    return {"train": names} if names else {}


def _one_kind(names: list[str]) -> list[str]:
    """Leave out a licence or a picture among Parquet files, as `datasets` does."""
    endings = Counter(PurePosixPath(name).suffix for name in names)
    if endings and endings.most_common(1)[0][0] == ".parquet":
        return [name for name in names if name.endswith(".parquet")]
    return names


def hub_file(repo: str, commit: str, path: Any, size: Any, sha256: Any) -> WebFile:
    """Return the file of a dataset at a commit, checked, since its path becomes one on this machine."""
    from huggingface_hub import constants

    parts = _matching(r"[^\x00-\x1f\\]+", path).split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{repo}: {path!r} is not a valid path of a dataset's file")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{repo}: {path}: {size!r} is not a valid size")
    url = f"{constants.ENDPOINT}/datasets/{repo}/resolve/{commit}/{quote(path)}"
    return WebFile(url, path, size, None if sha256 is None else _matching("[0-9a-f]{64}", sha256))


def _matching(pattern: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{value!r} in a listing of a dataset's files is not what it should be")
    return value
