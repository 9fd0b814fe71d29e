"""gigatoken, many times as fast as tiktoken, where it is proven to give tiktoken's tokens.

A proof (proven.json, written by tools/prove_gigatoken.py) holds for a pair of versions and lists the characters
that the two treat differently, such as letters of a Unicode version that only one of them knows. Text with one of
those is left to tiktoken.
"""

import base64
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_GROWTH = 250_000_000
"""Bytes by which the process may have grown when gigatoken's cache is dropped, which costs about 0.2 s.

The cache remembers every word: 7 bytes for a byte of text that it has not seen. Its table doubles at times, so the
process grows by up to twice this. Books make it grow by 100 MB in all, random letters reach the bound in 35 MB."""

MAX_TEXT = 64_000_000
"""Bytes of text before the cache is dropped where a process cannot tell its memory: 450 MB of new words."""

PROVEN = Path(__file__).with_name("proven.json")
_BLOCK = 1 << 17  # bytes that stay in the cache of a core while they are searched


@dataclass(frozen=True)
class Proof:
    """Two versions that give the same tokens, but for some characters.

    Attributes:
        machine: the kind of processor; gigatoken has code of its own for each.
        strings: how many were compared.
        differ: the characters, as hexadecimal code points and ranges, the last one included: "88f", "a7ce-a7cf".
    """

    gigatoken: str
    tiktoken: str
    machine: str
    strings: int
    differ: tuple[str, ...]

    @property
    def versions(self) -> tuple[str, str, str]:
        """What it holds for."""
        return self.gigatoken, self.tiktoken, self.machine

    def code_points(self) -> NDArray[np.int64]:
        """All that differ, ascending."""
        ends = [[int(end, 16) for end in item.split("-")] for item in self.differ]
        return np.concatenate([np.empty(0, np.int64), *(np.arange(item[0], item[-1] + 1) for item in ends)])


def installed_versions() -> tuple[str, str, str]:
    """The versions of gigatoken and tiktoken, and the kind of machine. Raises ValueError without gigatoken."""
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
    versions = installed_versions()
    for proof in read_proofs(PROVEN):
        if proof.versions == versions:
            return proof
    raise ValueError(
        f"gigatoken {versions[0]} is not proven to give the tokens of tiktoken {versions[1]} on {versions[2]}: "
        "build with --tokenizer tiktoken"
    )


class CharacterSet:
    """Finds characters of a set in UTF-8; built for sets that are rare in text."""

    def __init__(self, code_points: NDArray[np.int64]) -> None:
        assert len(code_points) == 0 or code_points[0] >= 0x80, "ASCII would be found everywhere"
        self._code_points = np.sort(code_points)
        self._second_bytes: dict[int, NDArray[np.bool_]] = {}  # of each first byte
        for character in map(chr, code_points.tolist()):
            first, second = character.encode()[:2]
            self._second_bytes.setdefault(first, np.zeros(256, bool))[second] = True

    def find(self, data: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the byte offsets, in no order, of the set's characters in valid UTF-8."""
        places = [np.empty(0, np.int64)]
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            # memchr on a copy is the quickest test there is: 0.3 ns a byte for three first bytes, copy included
            raw = block.tobytes()
            for first, second_bytes in self._second_bytes.items():
                if raw.find(first) >= 0:
                    offsets = np.flatnonzero(block == first) + start
                    offsets = offsets[second_bytes[data[offsets + 1]]]
                    code_points = _decode(data, offsets, first)
                    at = np.searchsorted(self._code_points, code_points).clip(max=len(self._code_points) - 1)
                    places.append(offsets[self._code_points[at] == code_points])
        return np.concatenate(places)


def _decode(data: NDArray[np.uint8], offsets: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """The code points at `offsets`, which all start with the byte `first`."""
    size = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    code_points = np.full(len(offsets), first & (0x7F >> size), np.int64)
    for i in range(1, size):
        code_points = code_points << 6 | data[offsets + i] & 0x3F
    return code_points


class Encoder:
    """gigatoken's tokenizer for GPT-2, with a bound on what its cache may hold. For one thread."""

    def __init__(self, ranks: Mapping[bytes, int], max_growth: int = MAX_GROWTH, max_text: int = MAX_TEXT) -> None:
        self.renewals = -1
        self._tokenizer: Any = None
        self._base: int | None = None  # memory from which growth counts
        self._text = 0  # bytes encoded since the last renewal
        self._max_growth, self._max_text = max_growth, max_text
        self._ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
        self._renew()

    def encode(
        self, data: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the tokens of the texts `data[offsets[i] : offsets[i + 1]]`, valid UTF-8, and their offsets."""
        import awkward as ak

        if self._has_grown():
            self._renew()
        self._text += len(data)
        # Without a copy; and never parallel: the build has a process a core, and threads would fight for them.
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        lists = self._tokenizer.encode_batch(ak.Array(strings), parallel=False).layout
        return lists.content.data, lists.offsets.data

    def _has_grown(self) -> bool:
        memory = _memory()
        if memory is None:
            return self._text >= self._max_text
        self._base = min(self._base or memory, memory)  # what the caller gives back must not count as room
        return memory - self._base > self._max_growth

    def _renew(self) -> None:
        import gigatoken

        self._tokenizer = None  # its memory goes back before the new one takes any
        with tempfile.TemporaryDirectory(prefix="gpt2-data-") as folder:
            file = Path(folder) / "gpt2.tiktoken"
            file.write_bytes(self._ranks)
            # Special tokens are left out: the literal "<|endoftext|>" is text.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(file, "gpt2", {})
        if (memory := _memory()) is not None:
            # The allocator keeps some, and the caller may hold more by now: half the bound is for the new cache.
            self._base = max(self._base or memory, memory - self._max_growth // 2)
        self._text = 0
        self.renewals += 1


def _memory() -> int | None:
    """The bytes of this process's own memory, without what it maps of files; None if the system does not say."""
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
