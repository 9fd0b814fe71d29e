"""What a build will amount to, before it is begun."""

from dataclasses import dataclass

from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import DEFAULT_VAL_TOKENS
from gpt2_data.building.plan import Input, Plan, text_bytes
from gpt2_data.formats.uint16 import OFFSET, TOKEN
from gpt2_data.sources import files

_BYTES_PER_TOKEN = 4.3  # of English web text
_BYTES_PER_TOKEN_OF_CODE = 2.7  # GPT-2 spends a token on each space of an indent
_MB_PER_SECOND = {"tiktoken": 8.0, "gigatoken": 55.0}
"""Text a second and core from Parquet to verified shards: measured on a Cascade Lake of 2.5 GHz."""
DOWNLOADS_AT_ONCE = 2
"""Fetched files on the disk at a time if they are deleted: one at work, and one that is ready or on its way."""


MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Estimate:
    """Sizes of what a plan will make, and of what it needs meanwhile.

    Attributes:
        counted: True if the sources count their tokens; else tokens follow from the size of the text.
        downloads_kept_bytes: of `download_bytes`, what is on the disk at the same time.
    """

    documents: int
    tokens: int
    counted: bool
    download_bytes: int
    downloads_kept_bytes: int

    def shards(self, config: BuildConfig) -> int:
        """Return how many shards there will be in both splits."""
        val = config.shard_size if config.compat else config.val_tokens
        if val is None:  # a single document is not split
            val = min(self.tokens // 10, DEFAULT_VAL_TOKENS) if self.documents > 1 else 0
        val = min(self.tokens, val)
        return -(-val // config.shard_size) + -(-(self.tokens - val) // config.shard_size)

    def check_shards(self, config: BuildConfig) -> None:
        """Raise ValueError if there would be more files than a file system likes: the M of 100M was forgotten."""
        count = self.shards(config)
        if count > MAX_SHARDS:
            raise ValueError(
                f"shard_size {config.shard_size:,} would make about {count:,} shards: "
                f"take a larger one, such as 100M; {MAX_SHARDS:,} are the most"
            )

    def dataset_bytes(self) -> int:
        """Return the size of the finished dataset."""
        return self.tokens * TOKEN.itemsize + self.documents * OFFSET.itemsize

    def peak_bytes(self) -> int:
        """Return the disk needed while building: tokenized units, shards, and where each document is."""
        return 2 * self.dataset_bytes() + 2 * self.documents * OFFSET.itemsize + self.downloads_kept_bytes

    def minutes(self, config: BuildConfig, plan: Plan, backend: str) -> float:
        """Return the time to tokenize and write here, without downloads."""
        return plan.text_bytes / 1e6 / _MB_PER_SECOND[backend] / config.num_workers(plan.text_bytes) / 60


def estimate(plan: Plan, config: BuildConfig) -> Estimate:
    """Count what can be counted quickly: rows, and the token_count column where a Parquet file here has one."""
    documents, tokens, counted = 0, 0.0, True
    for item in plan.inputs:
        units = [unit for unit in plan.units if item.path in unit.files]
        text = sum(unit.text_bytes for unit in units)
        if item.kind == "txt":  # shares its unit with other files
            count, text = 1, text_bytes([item])
        elif any(unit.documents is None for unit in units):
            count = round(text / max(_mean_document(item), 1))
        else:
            count = sum(unit.documents or 0 for unit in units)
        column = None
        if item.kind == "parquet" and item.remote is None:
            column = _token_count(item.path, count)
        per_token = _BYTES_PER_TOKEN_OF_CODE if item.kind == "pydocs" else _BYTES_PER_TOKEN
        documents += count
        counted = counted and column is not None
        tokens += count + (text / per_token if column is None else column)  # and an EOT each
    fetched = sorted((item.bytes for item, _ in plan.remote), reverse=True)
    on_disk = fetched[:DOWNLOADS_AT_ONCE] if config.delete_downloads else fetched
    return Estimate(documents, round(tokens), counted, sum(fetched), sum(on_disk))


def _mean_document(item: Input) -> float:
    """Return the mean bytes of a document: of JSON lines by the first megabyte, else those of a web page."""
    if item.kind == "tinyshakespeare":
        return 154
    if item.kind != "jsonl":
        return 4_700
    with files.naming(item.path), files.open_bytes(item.path) as file:
        sample = file.read(1_000_000)
    return len(sample) / max(sample.count(b"\n"), 1)


def _token_count(path: str, rows: int) -> int | None:
    """Sum FineWeb's column of GPT-2 token counts over the first `rows`; None if a file has none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    total, remaining = 0, rows
    try:
        with pq.ParquetFile(path, buffer_size=files.BLOCK) as file:
            schema = file.schema_arrow
            if "token_count" not in schema.names or not pa.types.is_integer(schema.field("token_count").type):
                return None
            for batch in file.iter_batches(columns=["token_count"], use_threads=False):
                total += int(pc.sum(batch.column(0).slice(0, remaining)).as_py() or 0)
                remaining -= len(batch)
                if remaining <= 0:
                    break
    except (pa.ArrowException, OSError, ValueError):  # damaged: who reads the text will say so, if it matters
        return None
    return total
