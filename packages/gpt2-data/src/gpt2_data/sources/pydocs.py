"""The text that every Python carries: help topics, the standard library's sources, compiled modules' docstrings.

About 9 MB that needs no download. Which text it is depends on the Python version; sha256() says which one it was.
"""

import functools
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import re
import subprocess
import sys
import sysconfig
import warnings
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
_SKIPPED_MODULES = {"readline", "_tkinter", "this", "antigravity"}  # importing them does something
_SKIPPED_PREFIXES = ("_test", "_xx", "xx", "_ctypes_test")  # CPython's own test modules


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """(id, text) of each document in a fixed order; `topic:assignment`, `source:json/decoder.py`, `doc:math`."""
    return (*_topics(), *_sources(), *_compiled())


@functools.cache
def sha256() -> str:
    """SHA-256 over all ids and texts."""
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
    found = []
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
            found.append((f"source:{name.as_posix()}", _INDENTATION.sub(_as_tabs, text)))
    return found


def _as_tabs(spaces: re.Match[str]) -> str:
    """A tab for each four spaces. To GPT-2's vocabulary nearly each space of an indentation is a token of its own:
    such were 39 % of all tokens."""
    return "\t" * (len(spaces[0]) // 4)


def _compiled() -> list[tuple[str, str]]:
    """Docstrings of modules without Python source; those of the others stand in their sources already.

    Asked of an interpreter of its own, 0.3 s: what this process has replaced would be missing. A notebook's has
    input() and faulthandler.enable() replaced, and built another dataset than its own workers.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(
            f"{sys.executable} does not tell its modules' docstrings: {done.stderr.decode(errors='replace')}"
        )
    return [(name, text) for name, text in json.loads(done.stdout)]


def _compiled_here() -> list[tuple[str, str]]:
    seen: set[str] = set()
    found = []
    for name in _compiled_names():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are deprecated
                module = importlib.import_module(name)
        except Exception:  # a module of this Python that lacks its library is not our concern
            continue
        text = "\n\n".join(_docstrings(module, name, seen))
        if text:
            found.append((f"doc:{name}", f"{name}\n\n{text}\n"))
    return found


def _compiled_names() -> list[str]:
    names = set(sys.builtin_module_names)
    folder = sysconfig.get_config_var("DESTSHARED")
    for path in Path(folder).iterdir() if folder and Path(folder).is_dir() else ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if path.name.endswith(suffix):
                names.add(path.name.removesuffix(suffix))
                break
    return sorted(n for n in names if n not in _SKIPPED_MODULES and not n.startswith(_SKIPPED_PREFIXES))


def _docstrings(module: object, name: str, seen: set[str]) -> list[str]:
    """A module's docstrings that no module before had: accelerators such as _io and _datetime share theirs."""
    found = []
    own = getattr(module, "__doc__", None)
    if isinstance(own, str) and own not in seen:
        found.append(own)
        seen.add(own)
    for title, member in _members(module, name):
        text = getattr(member, "__doc__", None)
        if not isinstance(text, str) or not text.strip() or text in seen:
            continue
        seen.add(text)
        # "($module, x, /)" -> "(x, /)"
        signature = re.sub(r"^\(\$\w+(, /)?(, )?", "(", getattr(member, "__text_signature__", None) or "")
        found.append(f"{title}{signature}\n{inspect.cleandoc(text)}")
    return found


def _members(module: object, name: str) -> list[tuple[str, object]]:
    """Public compiled functions and classes, and the classes' methods. What Python code put there is left out."""
    found: list[tuple[str, object]] = []
    for key, value in sorted(vars(module).items()):
        # site adds exit() and quit(), test runners replace sys.excepthook: neither belongs to Python's text
        if key.startswith("_") or (name == "sys" and key.endswith("hook")):
            continue
        if inspect.isbuiltin(value):
            found.append((f"{name}.{key}", value))
        elif inspect.isclass(value):
            found.append((f"{name}.{key}", value))
            found += [
                (f"{name}.{key}.{method}", member)
                for method, member in sorted(vars(value).items())
                if not method.startswith("_")
                and (inspect.ismethoddescriptor(member) or inspect.isgetsetdescriptor(member))
            ]
    return found


if __name__ == "__main__":  # _compiled asks
    print(json.dumps(_compiled_here()))
