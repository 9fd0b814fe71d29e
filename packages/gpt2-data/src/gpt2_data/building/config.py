"""The options of a build, checked."""

from dataclasses import dataclass
from pathlib import Path

from gpt2_data.building import workers as engines
from gpt2_data.formats import uint16 as formats
from gpt2_data.sources import catalog as sources

_WORTH_A_WORKER = 16_000_000  # bytes of text that take longer than starting a process
_CHOICES = {
    "format": ("uint16", "arrow"),
    "tokenizer": ("auto", "tiktoken", "gigatoken"),
    "order": ("source", "shuffled"),
    "engine": ("local", "ray"),
    "compat": (None, "build-nanogpt"),
}


@dataclass(frozen=True)
class BuildConfig:
    """The options of `gpt2-data build`. Raises ValueError for values that cannot work."""

    sources: tuple[str, ...]
    """Names, files and globs, in order; sources.KNOWN lists them."""
    out: Path
    """The dataset's folder."""
    shard_size: int = 100_000_000
    """Tokens a shard; the last of a split is shorter."""
    val_tokens: int | None = None
    """The first documents go to the validation split, as many whole ones as reach this many tokens; 0 for none.
    None: 100M, or a tenth of all tokens where that is less, or none where one document is most of the source."""
    format: str = "uint16"
    workers: int | None = None
    """Processes; None: one a core that this process may use, fewer for little text. No influence on the result."""
    tokenizer: str = "auto"
    """Tokenizer library: auto, tiktoken or gigatoken. No influence on the result."""
    order: str = "source"
    """Order of the documents: source, or shuffled by the seed."""
    seed: int = 0
    engine: str = "local"
    """Where the work units run: processes here, or a Ray cluster. No influence on the result."""
    part: tuple[int, int] | None = None
    """(I, N): do only share I of N of the work units, counted from 1; the part that ends last cuts the shards."""
    limit_docs: int | None = None
    """Use only the first documents of the source, this many, empty ones counted."""
    column: str = "text"
    """Column (Parquet) or key (JSON lines) of the text."""
    downloads: Path | None = None
    """Where fetched files are kept, for the next build too; None: in `out / "downloads"`."""
    delete_downloads: bool = False
    """Delete each fetched file as soon as it is tokenized."""
    compat: str | None = None
    """"build-nanogpt": validation is the first shard to the token, as its fineweb.py cuts it."""

    def __post_init__(self) -> None:
        # Scripts hand in lists and strings; what is stored is always the same type.
        object.__setattr__(self, "sources", tuple(map(str, self.sources)))
        object.__setattr__(self, "out", Path(self.out))
        if self.downloads is not None:
            object.__setattr__(self, "downloads", Path(self.downloads))
        if not self.sources:
            raise ValueError(f"no source given: known are {sources.KNOWN}")
        if not 0 < self.shard_size <= formats.MAX_SHARD_TOKENS:
            raise ValueError(
                f"shard_size is {self.shard_size:,} tokens, must be 1 to {formats.MAX_SHARD_TOKENS:,}"
            )
        for name, least in ("val_tokens", 0), ("workers", 1), ("limit_docs", 1):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = " or ".join(str(choice) for choice in known if choice is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {choices}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"part {self.part[0]}/{self.part[1]}: parts are counted from 1")
        if self.part is not None and self.engine != "local":
            raise ValueError(f"part and engine {self.engine}: each is a way to use many machines, choose one")
        if self.compat is not None and (self.val_tokens is not None or self.order != "source"):
            raise ValueError(f"compat {self.compat}: val_tokens and order are what it decides, leave them out")

    def num_workers(self, text_bytes: int) -> int:
        """Processes to tokenize that much text with."""
        if self.workers is not None:
            return self.workers
        return min(engines.cores(), 1 + text_bytes // _WORTH_A_WORKER)
