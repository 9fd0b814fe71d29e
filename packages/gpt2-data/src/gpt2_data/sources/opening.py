"""Files opened as bytes, decompressed, or as UTF-8, whatever their encoding."""

import codecs
import contextlib
import io
import itertools
import lzma
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

_BUFFER = 4_000_000
_SAMPLE = 1 << 16  # bytes at the start of a text file by which its encoding and line ends are judged
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16's, which begin alike
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
COMPRESSED = tuple(_COMPRESSION)


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """Open a file, decompressed if its name says so. Raises ValueError, naming it, if it cannot be read."""
    import pyarrow as pa

    compression = _COMPRESSION.get(_ending(path))
    try:
        with open(path, "rb", buffering=0) as raw:
            if compression == "xz":
                data: Any = lzma.LZMAFile(raw)  # noqa: SIM115  # the BufferedReader closes it
            else:
                data = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) if compression else raw
            with io.BufferedReader(data, _BUFFER) as file:
                yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def is_compressed(path: str) -> bool:
    """True if the file can be read from its start only."""
    return _ending(path) in _COMPRESSION


def codec(start: bytes, encoding: str | None) -> str | None:
    """Return the codec of a text file by its first bytes, or else as named; None for UTF-8."""
    by_mark = next((name for mark, name in _BOMS.items() if start.startswith(mark)), None)
    if by_mark or start.startswith(codecs.BOM_UTF8) or encoding is None:
        return by_mark
    name = codecs.lookup(encoding).name
    # Without a mark the order of bytes is this machine's: a build is the same on all of them.
    return {"utf-8": None, "utf-8-sig": None, "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(name, name)


def check_encoding(name: str) -> None:
    """Raise ValueError if Python has no text encoding of this name."""
    try:
        "x".encode(name)
    except (LookupError, ValueError):
        raise ValueError(f"{name!r} is no encoding: write utf-16, latin-1, cp1252, shift_jis, ...") from None


def is_utf8(path: str, encoding: str | None) -> bool:
    """True if the file's own bytes are taken for UTF-8."""
    with open_bytes(path) as file:
        return codec(file.read(4), encoding) is None


def _mark_unreadable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be read by a byte that UTF-8 never has: later it becomes U+FFFD and is counted."""
    if isinstance(error, UnicodeDecodeError):
        return "\udcff", error.end
    assert isinstance(error, UnicodeEncodeError)
    return b"\xff" * (error.end - error.start), error.end


codecs.register_error("gpt2-data", _mark_unreadable)


class _Recoded(io.RawIOBase):
    """A text file as UTF-8, with line feeds for CRLF if `crlf`."""

    def __init__(self, file: BinaryIO, sample: bytes, codec: str | None, crlf: bool) -> None:
        self._left = b""
        self._blocks = self._recode(itertools.chain([sample], iter(lambda: file.read(_BUFFER), b"")), codec, crlf)

    @staticmethod
    def _recode(blocks: Iterator[bytes], codec: str | None, crlf: bool) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(codec)("gpt2-data") if codec else None
        held = b""
        for block in itertools.chain(blocks, [b""]):
            data = decoder.decode(block, not block).encode("utf-8", "gpt2-data") if decoder else block
            if crlf:
                data = held + data
                held = b"\r" if block and data.endswith(b"\r") else b""
                data = data[: len(data) - len(held)].replace(b"\r\n", b"\n")
            if data:
                yield data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._blocks, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


@contextlib.contextmanager
def open_text(path: str, encoding: str | None = None, lines: bool = False) -> Iterator[io.BufferedReader]:
    """Open a text file as UTF-8: its byte order mark tells its encoding, else `encoding`, which is UTF-8 if None.

    A mark of UTF-8 stays. With `lines`, a file whose line ends are all CRLF has LF; any other stays as it is.
    Raises ValueError, naming the file, also if most of it is unreadable.
    """
    with open_bytes(path) as file:
        sample = file.read(_SAMPLE)
        name = codec(sample, encoding)
        text = codecs.getincrementaldecoder(name or "utf-8")("replace").decode(sample)
        bad = text.count("\ufffd") - sample.count("\ufffd".encode()) * (name is None)
        nul = text.count("\0")
        # Some letters of a short text may be wrong, or half of three words; a NUL is each second byte of UTF-16.
        if nul > 0.3 * len(text) or bad > max(0.1 * len(text), min(16, len(text) * 2 / 3)):
            order = "utf-16-be" if sample[::2].count(0) > nul / 2 else "utf-16"
            try_ = order if nul > bad else "latin-1, cp1252 or utf-16"
            raise ValueError(
                f"{path}: most of it cannot be read as {name or 'UTF-8'}: name its encoding, as in --encoding "
                f"{try_}, or leave it out if it is no text"
            )
        cut = len(sample) == _SAMPLE and text.endswith("\r")  # its line feed comes next
        crlf = lines and 0 < text.count("\r\n") == text.count("\n") == text.count("\r") - cut
        if name is None and not crlf and not is_compressed(path):
            file.seek(0)  # as it is: this reads JSON lines three times as fast
            yield file
        else:
            yield io.BufferedReader(_Recoded(file, sample, name, crlf), _BUFFER)


def first_line(error: BaseException) -> str:
    """The first line of an error's text: Arrow's have several."""
    return str(error).strip().partition("\n")[0]
