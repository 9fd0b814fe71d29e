"""The text that every Python carries: help topics and the standard library's sources.

About 9 MB that needs no download. Which text it is depends on the Python version; sha256() says which one it was.
"""

import functools
import hashlib
import re
import sysconfig
from pathlib import Path

# The last two: topics.py, which is the help topics once more, and the generated tables of a hundred code pages.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
}
_INDENTATION = re.compile(r"^(?: {4})+", re.MULTILINE)


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """Return (id, text) of each document in a fixed order; ids are such as `source:json/decoder.py`."""
    return (*_topics(), *_sources())


@functools.cache
def sha256() -> str:
    """The SHA-256 over all ids and texts, in hex."""
    digest = hashlib.sha256()
    for item in documents():
        for text in item:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return [(f"topic:{name}", text) for name, text in sorted(topics.items())]


def _sources() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        folders = name.parts[:-1]
        if _SKIPPED_FOLDERS.intersection(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        if name.name.startswith("_sysconfigdata"):  # how this Python was compiled, with its paths
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:  # some __init__.py are empty
            documents.append((f"source:{name.as_posix()}", _INDENTATION.sub(_as_tabs, text)))
    return documents


def _as_tabs(spaces: re.Match[str]) -> str:
    """A tab for each four spaces. To GPT-2's vocabulary nearly each space of an indentation is a token of its own:
    such were 39 % of all tokens."""
    return "\t" * (len(spaces[0]) // 4)
