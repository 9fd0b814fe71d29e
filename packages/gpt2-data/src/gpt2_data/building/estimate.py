"""What a build will amount to, before it is begun."""

from collections.abc import Callable
from dataclasses import dataclass

from gpt2_data.building import cut_shards as shards
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.plan import Input, Plan, text_bytes
from gpt2_data.formats import uint16 as formats
from gpt2_data.sources import files as readers

_BYTES_PER_TOKEN = 4.3  # of English web text
_BYTES_PER_TOKEN_OF_CODE = 2.7  # GPT-2 spends a token on each space of an indent
_MB_PER_SECOND = {"tiktoken": 8.0, "gigatoken": 55.0}
"""Text a second and core from Parquet to verified shards: measured on a Cascade Lake of 2.5 GHz."""
DOWNLOADS_AT_ONCE = 2
"""Fetched files on the disk at a time if they are deleted: one at work, and one that is ready or on its way."""


MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Estimate:
    """Sizes of what a plan will make, and of what it needs meanwhile."""

    documents: int
    tokens: int
    counted: bool
    """True if the tokens are counted by the sources themselves; else they follow from the size of the text."""
    download_bytes: int
    """To be fetched."""
    downloads_kept_bytes: int
    """Of that on the disk at the same time."""

    def shards(self, config: BuildConfig) -> int:
        """How many shards, validation's and training's."""
        val = config.shard_size if config.compat else config.val_tokens
        if val is None:  # a single document is not split
            val = min(self.tokens // 10, shards.DEFAULT_VAL_TOKENS) if self.documents > 1 else 0
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
        """Size of the finished dataset."""
        return self.tokens * formats.TOKEN.itemsize + self.documents * formats.OFFSET.itemsize

    def peak_bytes(self) -> int:
        """Disk needed while it is built: tokenized units and shards stand side by side, and where documents go."""
        extra = 2 * self.documents * formats.OFFSET.itemsize
        return 2 * self.dataset_bytes() + extra + self.downloads_kept_bytes

    def minutes(self, config: BuildConfig, plan: Plan, backend: str) -> float:
        """Of tokenizing and writing here, downloads left out."""
        return plan.text_bytes / 1e6 / _MB_PER_SECOND[backend] / config.num_workers(plan.text_bytes) / 60


def estimate(
    plan: Plan, config: BuildConfig, remote: bool = False, progress: Callable[[int], object] | None = None
) -> Estimate:
    """Count what can be counted quickly: rows, and the token_count column where a Parquet file has one.

    `remote`: of files on the hub too, which takes a request for each row group; `progress` is told how many
    are done.
    """
    documents, tokens, counted = 0, 0.0, True
    of_hub = _remote_tokens(plan, progress) if remote else {}
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
        if item.remote is not None:
            column = of_hub.get(item.path) if count == sum(rows for rows, _ in item.row_groups) else None
        elif item.kind == "parquet":
            column = _token_counts(item.path, count)
        per_token = _BYTES_PER_TOKEN_OF_CODE if item.kind == "pydocs" else _BYTES_PER_TOKEN
        documents += count
        counted = counted and column is not None
        tokens += count + (text / per_token if column is None else column)  # and an EOT each
    fetched = sorted((item.bytes for item, _ in plan.remote), reverse=True)
    kept = fetched[:DOWNLOADS_AT_ONCE] if config.delete_downloads else fetched
    return Estimate(documents, round(tokens), counted, sum(fetched), sum(kept))


def _mean_document(item: Input) -> float:
    """Bytes a document, by the first megabyte of JSON lines; of what cannot be looked at a web page's."""
    if item.kind == "tinyshakespeare":
        return 154
    if item.kind != "jsonl":
        return 4_700
    with readers.naming(item.path), readers.open_bytes(item.path) as file:
        sample = file.read(1_000_000)
    return len(sample) / max(sample.count(b"\n"), 1)


def _token_counts(path: str, rows: int) -> int | None:
    """FineWeb's column of GPT-2 token counts, summed over the first `rows`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    total, left = 0, rows
    try:
        with pq.ParquetFile(path, buffer_size=readers.BLOCK) as file:
            schema = file.schema_arrow
            if "token_count" not in schema.names or not pa.types.is_integer(schema.field("token_count").type):
                return None
            for batch in file.iter_batches(columns=["token_count"], use_threads=False):
                total += int(pc.sum(batch.column(0).slice(0, left)).as_py() or 0)
                left -= len(batch)
                if left <= 0:
                    break
    except (pa.ArrowException, OSError, ValueError):  # damaged: who reads the text will say so, if it matters
        return None
    return total


def _remote_tokens(plan: Plan, progress: Callable[[int], object] | None) -> dict[str, int]:
    from gpt2_data.sources import remote

    wanted = [(item.path, file) for item, file in plan.remote]
    counts = remote.token_counts([file for _, file in wanted], progress=progress)
    return {path: count for (path, _), count in zip(wanted, counts, strict=True) if count is not None}
