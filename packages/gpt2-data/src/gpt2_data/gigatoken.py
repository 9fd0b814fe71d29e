"""Encode text with gigatoken, many times as fast as tiktoken, if it is proven to give tiktoken's tokens.

A proof (proven.json, written by tools/prove_gigatoken.py) holds for a pair of versions and lists the characters
that the two treat differently, such as letters of a Unicode version that only one of them knows. Text with one of
those is left to tiktoken.
"""

import base64
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_GROWTH = 250_000_000
"""Bytes by which the process may grow before gigatoken's cache is dropped, which costs about 0.2 s.

The cache remembers every word. Its table doubles at times, so the process grows by up to twice this. Books make it
grow by 100 MB in all; random letters reach the bound after 35 MB of text."""

_GROWTH_PER_BYTE = 7  # of new text; for systems where a process cannot measure its own memory

PROVEN = Path(__file__).with_name("proven.json")
_BLOCK = 1 << 17  # bytes that stay in the cache of a core while they are searched


@dataclass(frozen=True)
class Proof:
    """Two versions that give the same tokens, except for some characters."""

    gigatoken: str
    tiktoken: str
    machine: str  # the kind of processor: gigatoken has code of its own for each
    strings: int  # how many were compared
    differ: tuple[str, ...]  # hexadecimal code points and ranges, the last one included: "88f", "a7ce-a7cf"

    @property
    def versions(self) -> tuple[str, str, str]:
        return self.gigatoken, self.tiktoken, self.machine

    def code_points(self) -> NDArray[np.int64]:
        """The code points that differ, ascending."""
        ends = [[int(end, 16) for end in item.split("-")] for item in self.differ]
        return np.concatenate([np.empty(0, np.int64), *(np.arange(item[0], item[-1] + 1) for item in ends)])


def installed_versions() -> tuple[str, str, str]:
    """Return the versions of gigatoken and tiktoken, and the machine. Raises ValueError without gigatoken."""
    try:
        gigatoken = importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("gigatoken is not installed: pip install 'gpt2-data[fast]'") from None
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
    return gigatoken, importlib.metadata.version("tiktoken"), machine


def read_proofs(file: Path) -> list[Proof]:
    """Return the proofs in a file."""
    return [Proof(**item | {"differ": tuple(item["differ"])}) for item in json.loads(file.read_bytes())]


def find_proof() -> Proof:
    """Return the proof for what is installed. Raises ValueError if there is none."""
    gigatoken, tiktoken, machine = versions = installed_versions()
    for proof in read_proofs(PROVEN):
        if proof.versions == versions:
            return proof
    raise ValueError(
        f"gigatoken {gigatoken} is not proven to give the tokens of tiktoken {tiktoken} on {machine}: "
        "build with --tokenizer tiktoken"
    )


class CharacterSet:
    """Finds characters of a set in UTF-8; quick if few of their first bytes occur in the text."""

    def __init__(self, code_points: NDArray[np.int64]) -> None:
        self._first_bytes = {chr(code_point).encode()[0] for code_point in code_points.tolist()}
        self._wanted = np.zeros(sys.maxunicode + 1, bool)
        self._wanted[code_points] = True

    def find(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the byte offsets, in no order, of the set's characters in valid UTF-8."""
        offsets = [np.empty(0, np.int64)]
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            raw = block.tobytes()  # memchr on a copy is the quickest test there is: 0.3 ns a byte, copy included
            for first in (first for first in self._first_bytes if first in raw):
                at = np.flatnonzero(block == first) + start
                size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
                code_points = np.full(len(at), first & (0x7F >> size), np.int64)
                for i in range(1, size):
                    code_points = code_points << 6 | data[at + i] & 0x3F
                offsets.append(at[self._wanted[code_points]])
        return np.concatenate(offsets)


class Encoder:
    """gigatoken's tokenizer for GPT-2, with a bound on the size of its cache. For use by one thread."""

    def __init__(self, ranks: Mapping[bytes, int], max_growth: int = MAX_GROWTH) -> None:
        self.renewals = -1
        self._tokenizer: Any = None
        self._base: int | None = None  # memory from which growth counts
        self._text = 0  # bytes encoded since the last renewal
        self._max_growth = max_growth
        self._ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        self._renew()

    def encode(
        self, data: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the tokens of the texts `data[offsets[i] : offsets[i + 1]]`, valid UTF-8, and their offsets."""
        import awkward as ak

        if self._growth() > self._max_growth:
            self._renew()
        self._text += len(data)
        # Without a copy, and never parallel: a build has a process per core, and threads would compete for them.
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        lists = self._tokenizer.encode_batch(ak.Array(strings), parallel=False).layout
        return lists.content.data, lists.offsets.data

    def _growth(self) -> int:
        memory = _memory()
        if memory is None:
            return _GROWTH_PER_BYTE * self._text
        self._base = min(self._base or memory, memory)  # memory that the caller frees is no room for the cache
        return memory - self._base

    def _renew(self) -> None:
        import gigatoken

        self._tokenizer = None  # frees its memory before the new one takes any
        with tempfile.NamedTemporaryFile(prefix="gpt2-data-", suffix=".tiktoken") as file:
            file.write(self._ranks)
            file.flush()
            # Special tokens are left out: the literal "<|endoftext|>" is text.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(Path(file.name), "gpt2", {})
        if (memory := _memory()) is not None:
            # The allocator keeps some memory, and the caller may hold more: the new cache gets half the bound.
            self._base = max(self._base or memory, memory - self._max_growth // 2)
        self._text = 0
        self.renewals += 1


def _memory() -> int | None:
    """Return the bytes of this process's own memory, without mapped files; None if there is no /proc."""
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
