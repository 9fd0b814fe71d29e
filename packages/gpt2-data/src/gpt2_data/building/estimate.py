"""Estimate the size and the time of a build before it begins."""

import functools
from dataclasses import dataclass

from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import DEFAULT_VAL_TOKENS
from gpt2_data.building.plan import Plan
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
    """Sizes of what a plan will make, and of what it needs meanwhile, in bytes but for the counts.

    Attributes:
        tokens: in proportion to the text.
        dataset_bytes: the size of the finished dataset.
        peak_bytes: the disk needed while building: tokenized units, shards, where documents are, and downloads.
    """

    documents: int
    tokens: int
    shards: int
    download_bytes: int
    dataset_bytes: int
    peak_bytes: int


def estimate(plan: Plan, config: BuildConfig) -> Estimate:
    """Estimate a build. Raises ValueError if it has more files than a file system likes: the M was forgotten."""
    documents, tokens = 0, 0.0
    for unit in plan.units:
        count = unit.documents
        if count is None:
            count = round(unit.text_bytes / _mean_document(unit.kind, unit.files[0]))
        documents += count
        per_token = _BYTES_PER_TOKEN_OF_CODE if unit.kind == "pydocs" else _BYTES_PER_TOKEN
        tokens += count + unit.text_bytes / per_token  # an EOT each
    total = round(tokens)
    val = config.shard_size if config.compat else config.val_tokens
    if val is None:  # a single document is not split
        val = min(total // 10, DEFAULT_VAL_TOKENS) if documents > 1 else 0
    val = min(total, val)
    shards = -(-val // config.shard_size) + -(-(total - val) // config.shard_size)
    if shards > MAX_SHARDS:
        raise ValueError(
            f"shard_size {config.shard_size:,} would make about {shards:,} shards: "
            f"use a larger one, such as 100M; the limit is {MAX_SHARDS:,} shards"
        )
    downloads = sorted((item.bytes for item in plan.inputs if item.remote is not None), reverse=True)
    on_disk = sum(downloads[:DOWNLOADS_AT_ONCE] if config.delete_downloads else downloads)
    positions = documents * OFFSET.itemsize
    dataset = total * TOKEN.itemsize + positions
    return Estimate(documents, total, shards, sum(downloads), dataset, 2 * dataset + 2 * positions + on_disk)


def minutes(plan: Plan, config: BuildConfig, backend: str) -> float:
    """Return the time to tokenize and write here, without downloads."""
    return plan.text_bytes / 1e6 / _MB_PER_SECOND[backend] / config.num_workers(plan.text_bytes) / 60


@functools.lru_cache
def _mean_document(kind: str, path: str) -> float:
    """Return the mean bytes of a document: of JSON lines by the first megabyte, else those of a web page."""
    if kind != "jsonl":
        return 154 if kind == "tinyshakespeare" else 4_700
    with files.open_bytes(path) as file:
        sample = file.read(1_000_000)
    return max(len(sample) / max(sample.count(b"\n"), 1), 1)
