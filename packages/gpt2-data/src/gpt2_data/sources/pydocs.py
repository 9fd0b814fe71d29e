"""The text that every Python carries: about 9 MB of help topics and the standard library's sources.

Which text it is depends on the Python version; sha256() says which one it was.
"""

import functools
import hashlib
import re
import sysconfig
from pathlib import Path

_FOLDERS = "site-packages|dist-packages|__pycache__|test|tests|idle_test|config-[^/]*"
# pydoc_data is the help topics once more, encodings are generated tables of a hundred code pages, and
# _sysconfigdata says how this Python was compiled, with its paths.
_SKIPPED = re.compile(rf"(?:.*/)?(?:(?:{_FOLDERS}|pydoc_data|encodings)/.*|_sysconfigdata[^/]*)")
_INDENTATION = re.compile(r"^(?: {4})+", re.MULTILINE)


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """Return (id, text) of each document in a fixed order; ids are such as `source:json/decoder.py`."""
    from pydoc_data.topics import topics

    items = [(f"topic:{name}", text) for name, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if _SKIPPED.fullmatch(name):
            continue
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text:  # some __init__.py are empty
            # A tab for each four spaces: to GPT-2 nearly each space of an indentation is a token, 39 % of all.
            text = _INDENTATION.sub(lambda spaces: "\t" * (len(spaces[0]) // 4), text)
            items.append((f"source:{name}", text))
    return tuple(items)


@functools.cache
def sha256() -> str:
    """The SHA-256 over all ids and texts, in hex."""
    digest = hashlib.sha256()
    for item in documents():
        for text in item:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
