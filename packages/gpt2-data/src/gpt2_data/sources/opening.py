"""Files opened as bytes, decompressed, or as text, whatever their encoding."""

import codecs
import contextlib
import io
import lzma
import os
from collections.abc import Iterator
from typing import Any

_BUFFER = 4_000_000
_CONTROLS = "".join(map(chr, {*range(32)} - {*b"\t\n\r\f\x1b"}))
_SAMPLE = 1 << 16  # bytes at the start of a text file by which its encoding and line ends are judged
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16's, which begin alike
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}
# Without a mark the order of bytes is this machine's: a build is the same on all of them.
_CODECS = {"utf-8": "utf-8-sig", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
COMPRESSED = tuple(_COMPRESSION)

# Bytes that cannot be read become a lone surrogate, which later becomes U+FFFD and is counted.
UNREADABLE = "\udcff"
MARK_UNREADABLE = "gpt2-data"
codecs.register_error(MARK_UNREADABLE, lambda error: (UNREADABLE, error.end))  # type: ignore[attr-defined]


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


def check_encoding(name: str) -> None:
    """Raise ValueError if Python has no text encoding of this name."""
    try:
        "x".encode(name)
    except (LookupError, ValueError):
        raise ValueError(f"{name!r} is no encoding: write utf-16, latin-1, cp1252, shift_jis, ...") from None


def judge(path: str, encoding: str | None) -> tuple[str, bool]:
    """Return a text file's codec, and whether all its lines end with CRLF, by its first bytes.

    A byte order mark tells the codec, else `encoding`; None means UTF-8, whose codec is utf-8-sig. JSON, and
    any longer text, is read as UTF-8 if it is that, although UTF-16 is named. Raises ValueError, naming the file,
    if most of it is unreadable.
    """
    with open_bytes(path) as file:
        sample = file.read(_SAMPLE)
    named = codecs.lookup(encoding or "utf-8").name
    codec = next((codec for mark, codec in _BOMS.items() if sample.startswith(mark)), _CODECS.get(named, named))
    if codec.startswith(("utf-16-", "utf-32-")) and b"\0" not in sample:
        with contextlib.suppress(UnicodeDecodeError):  # short UTF-16 may be UTF-8, too
            codecs.getincrementaldecoder("utf-8")().decode(sample)
            codec = "utf-8-sig" if len(sample) > 64 or sample.lstrip()[:1] in (b"[", b"{", b'"') else codec
    text = codecs.getincrementaldecoder(codec)(MARK_UNREADABLE).decode(sample)
    bad, odd = text.count(UNREADABLE), sum(map(text.count, _CONTROLS))
    # Some letters of a short text may be wrong, or half of three words. In UTF-16 each second byte is a NUL, or
    # another control character such as 4 in Russian; in Chinese only line ends and spaces have a NUL.
    one_side = bad or not (sample[::2].count(0) and sample[1::2].count(0))
    utf16 = odd > 0.3 * len(text) or ("\0" in text and one_side and bad + odd + text.count("\t") > 0.1 * len(text))
    if utf16 or bad > max(0.1 * len(text), min(16, len(text) * 2 / 3)):
        order = "utf-16-be" if sum(map(sample[::2].count, _CONTROLS.encode())) > odd / 2 else "utf-16"
        try_ = order if utf16 else "latin-1, cp1252 or utf-16"
        raise ValueError(
            f"{path}: most of it cannot be read as {encoding or 'UTF-8'}: name its encoding, as in --encoding "
            f"{try_}, or leave it out if it is no text"
        )
    cut = len(sample) == _SAMPLE and text.endswith("\r")  # its line feed comes next
    return codec, 0 < text.count("\r\n") == text.count("\n") == text.count("\r") - cut


@contextlib.contextmanager
def open_text(
    path: str, encoding: str | None = None, newline: str | None = "\n", start: int = 0, stop: int = 0
) -> Iterator[io.TextIOWrapper]:
    """Open a text file without its byte order mark. Raises ValueError as `judge` does.

    Args:
        newline: as for `open`; but None changes CRLF to LF only if all of the file's lines end so.
        start: the byte to begin at; with `stop`, only the bytes before it are read, at once.
    """
    codec, crlf = judge(path, encoding)
    with open_bytes(path) as file:
        if stop:
            file.seek(start)
        part = io.BytesIO(file.read(stop - start)) if stop else file
        yield io.TextIOWrapper(part, codec, MARK_UNREADABLE, "\n" if newline is None and not crlf else newline)


def first_line(error: BaseException) -> str:
    """The first line of an error's text: Arrow's have several."""
    return str(error).strip().partition("\n")[0]
