"""The options of a build, checked."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import tokenizer, vocabulary
from gpt2_data.disk import cores
from gpt2_data.formats.uint16 import MAX_SHARD_TOKENS
from gpt2_data.sources.catalog import KNOWN
from gpt2_data.sources.opening import check_encoding

_WORTH_A_WORKER = 16_000_000  # bytes of text that take longer than starting a process
LIBRARIES = ("auto", "tiktoken", "gigatoken")
_CHOICES = {
    "format": ("uint16", "arrow"),
    "order": ("shuffled", "source"),
    "engine": ("local", "ray"),
    "compat": (None, "build-nanogpt"),
}


@dataclass(frozen=True)
class BuildConfig:
    """The options of `gpt2-data build`. Workers, engine and part do not change a byte of the result.

    Raises ValueError for values that cannot work.

    Attributes:
        shard_size: tokens in a shard; the last shard of a split is shorter.
        val_tokens: the first documents are for validation, as many whole ones as reach this many tokens. None:
            100M, or a tenth of all tokens if that is less, and none if that takes more than half of them.
        format: "uint16" (llm.c's shards) or "arrow".
        workers: processes. None: one per core that this process may use, fewer for little text.
        tokenizer: the library for GPT-2's vocabulary: "auto", "tiktoken" or "gigatoken"; or a tokenizer folder, or
            a tokenizer.json, with another vocabulary, which does change the result.
        order: "shuffled" (by `seed`) or "source". None: "shuffled", or with `compat` "source".
        engine: "local" for processes here, "ray" for a Ray cluster.
        part: (I, N): do only share I of N of the work units; the part that ends last cuts the shards.
        limit_docs: use only this many documents from the start of the source, including empty ones.
        column: column (Parquet) or key (JSON lines) of the text.
        downloads: where fetched files are kept, for the next build too. None: `out / "downloads"`.
        delete_downloads: delete each fetched file as soon as it is tokenized.
        compat: "build-nanogpt": validation is exactly the first shard, as in its fineweb.py.
        encoding: of text files (not Parquet) without a byte order mark, by its name in Python. None: UTF-8.
        split_on: what stands between the documents of a text file, such as a blank line, "\\n\\n"; it is left out,
            and so are blank documents. None: each text file is one document.
    """

    sources: tuple[str, ...]
    out: Path
    shard_size: int = 100_000_000
    val_tokens: int | None = None
    format: str = "uint16"
    workers: int | None = None
    tokenizer: str = "auto"
    order: str | None = None
    seed: int = 0
    engine: str = "local"
    part: tuple[int, int] | None = None
    limit_docs: int | None = None
    column: str = "text"
    downloads: Path | None = None
    delete_downloads: bool = False
    compat: str | None = None
    encoding: str | None = None
    split_on: str | None = None

    def __post_init__(self) -> None:
        # Scripts pass lists and strings; the stored types are always the same.
        object.__setattr__(self, "sources", tuple(os.path.expanduser(str(source)) for source in self.sources))
        object.__setattr__(self, "out", Path(os.path.expanduser(self.out)))
        object.__setattr__(self, "tokenizer", os.path.expanduser(str(self.tokenizer)))
        object.__setattr__(self, "downloads", self.downloads and Path(os.path.expanduser(self.downloads)))
        object.__setattr__(self, "order", self.order or ("shuffled" if self.compat is None else "source"))
        if not self.sources:
            raise ValueError(f"no source given: choose from {KNOWN}")
        if not 0 < self.shard_size <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_size is {self.shard_size:,} tokens, must be 1 to {MAX_SHARD_TOKENS:,}")
        for name, least in ("val_tokens", 0), ("workers", 1), ("limit_docs", 1):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                names = " or ".join(filter(None, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {names}")
        self._check_texts()
        if self.part is not None:
            if not 1 <= self.part[0] <= self.part[1]:
                raise ValueError(f"part {self.part[0]}/{self.part[1]}: parts are counted from 1")
            if self.engine != "local":
                raise ValueError(f"part and engine {self.engine}: both spread the work over machines, choose one")
        if self.compat is not None and (self.val_tokens is not None or self.order != "source"):
            raise ValueError(f"compat {self.compat} decides val_tokens and order: leave them out")

    def _check_texts(self) -> None:
        """Check how texts are read and tokenized."""
        if self.tokenizer not in LIBRARIES and not Path(self.tokenizer).exists():
            known = " or ".join(LIBRARIES)
            raise ValueError(f"tokenizer is {self.tokenizer!r}, must be {known} or a tokenizer folder")
        check_encoding(self.encoding or "utf-8")
        if self.split_on == "":
            raise ValueError("split_on is empty: name what stands between the documents of a text file")
        if any("\ud800" <= c <= "\udfff" for c in self.split_on or ""):
            raise ValueError(f"split_on is {self.split_on!a}, which is not UTF-8: no text file has it")

    @functools.cached_property
    def vocabulary(self) -> vocabulary.Vocabulary | None:
        """The vocabulary; None for GPT-2's. Raises ValueError if a build cannot follow it."""
        return None if self.tokenizer in LIBRARIES else vocabulary.load(Path(self.tokenizer))

    @property
    def backend(self) -> str:
        """The library that tokenizes. Raises ValueError as tokenizer.choose_backend does."""
        if self.vocabulary is not None:
            return "tokenizers"
        return tokenizer.choose_backend(self.tokenizer if self.tokenizer in LIBRARIES else "auto")

    def num_workers(self, text_bytes: int) -> int:
        """Return the number of processes for tokenizing this much text."""
        return self.workers or min(cores(), 1 + text_bytes // _WORTH_A_WORKER)
