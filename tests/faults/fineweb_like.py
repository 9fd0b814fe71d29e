"""Real documents in FineWeb-Edu's schema at size, and a build of them."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2_data import get_tokenizer
from gpt2_data.sources import pydocs

ROWS = 500  # a row group

OPTIONS = {"val_tokens": 100_000, "shard_size": 500_000, "order": "shuffled", "seed": 3}


def paragraphs():
    """Paragraphs and functions of Python's documentation and sources: more than 50,000 documents, some empty."""
    cut = re.compile(r"\n\s*\n|\n(?=\s*(?:def|class|return|if) )")
    return [part for _, text in pydocs.documents() for part in cut.split(text)]


def write_fineweb(path, texts):
    """A file of FineWeb-Edu's columns; token_count is right."""
    encode = get_tokenizer().encode_ordinary
    table = {
        "text": texts,
        "id": [f"<urn:uuid:{hashlib.md5(text.encode()).hexdigest()}>" for text in texts],
        "token_count": pa.array([len(encode(text)) for text in texts], pa.int64()),
    }
    same = {"dump": "CC-MAIN-2024-10", "url": "https://docs.python.org", "file_path": "s3://x", "language": "en"}
    same |= {"language_score": 0.9, "score": 3.0, "int_score": 3}
    table |= {name: [value] * len(texts) for name, value in same.items()}
    pq.write_table(pa.table(table), path, row_group_size=ROWS)


def hashes(folder: Path):
    """name -> SHA-256 of all of a dataset's files but the history of who built it."""
    assert not (folder / ".build").exists()
    names = {path.name for path in folder.iterdir()} - {"build.jsonl", "downloads"}
    listed = json.loads((folder / "dataset.json").read_bytes())["shards"]
    assert len(names) == 1 + 2 * len(listed)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def arguments(corpus, out, *more):
    """The command line of that build."""
    options = {key.replace("_", "-"): value for key, value in OPTIONS.items()}
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["build", f"{corpus}/*.parquet", "--out", str(out), *flags, *more]
