"""Check that a dataset's files are what its dataset.json says."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_data import disk
from gpt2_data.formats import arrow, foreign, manifest, uint16
from gpt2_data.formats.manifest import FILE_NAME, Manifest, Shard
from gpt2_data.formats.uint16 import Numbers, TokenFile
from gpt2_data.vocabulary import FILE_NAME as TOKENIZER

_BLOCK = 1 << 18  # bytes hashed and checked at once: what a core's cache holds
_DAMAGED = f"damaged: its SHA-256 is not the one in {FILE_NAME}"


@dataclass(frozen=True)
class Report:
    """The result of verify."""

    level: str
    files: int
    bytes: int
    problems: tuple[str, ...]  # each begins with a file's name

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


def verify(path: str | Path, level: str = "fast", workers: int | None = None) -> Report:
    """Compare a dataset's files with its dataset.json. Each file is read once.

    Args:
        path: the dataset's folder.
        level: "fast" checks that the tokenizer is GPT-2's, or the tokenizer.json in the folder; and that every
            file is there, with the right size and header, and no other shard beside them. "full" also checks the
            SHA-256 of every file, that ids are in the vocabulary, and that an EOT stands at each document's start
            and nowhere else.
        workers: threads, each of which checks a shard at a time; by default one per core.

    Raises:
        ValueError: there is no valid dataset.json. What is wrong with the files is in the report.
    """
    if level not in ("fast", "full"):
        raise ValueError(f"level is {level!r}, must be fast or full")
    folder = Path(os.path.expanduser(path))
    if not (folder / FILE_NAME).exists() and (other := foreign.sniff(folder)) is not None:
        raise ValueError(
            f"{folder} is {foreign.NAMES[other.format]}'s, with nothing to verify it against: "
            f"gpt2-data convert {folder} OUT --to llmc makes a dataset that can be verified"
        )
    dataset = manifest.load(folder)
    problems = [problem] if (problem := manifest.tokenizer_problem(folder, dataset)) else []
    with ThreadPoolExecutor(workers or disk.cores()) as pool:  # hashlib and numpy release the GIL
        for of_shard in pool.map(lambda shard: _shard_problems(folder, shard, dataset, level), dataset.shards):
            problems += of_shard
    listed = {name for shard in dataset.shards for name in shard.files}
    extra = sorted({entry.name for entry in folder.iterdir() if manifest.is_shard_name(entry.name)} - listed)
    problems += [f"{name}: not part of this dataset; delete it" for name in extra]
    size = sum(shard.bytes + (shard.docs.bytes if shard.docs else 0) for shard in dataset.shards)
    if dataset.own_tokenizer:
        listed.add(TOKENIZER)
        size += (folder / TOKENIZER).stat().st_size if (folder / TOKENIZER).exists() else 0
    return Report(level, len(listed), size, tuple(problems))


def _shard_problems(folder: Path, shard: Shard, dataset: Manifest, level: str) -> list[str]:
    problems: list[str] = []
    documents = file = None
    for name in reversed(shard.files):  # the sidecar first
        try:
            if name == shard.file:
                file = manifest.open_shard(folder, shard)
            else:
                documents = manifest.open_documents(folder, shard)
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {str(error).removeprefix(f'{folder / name}: ')}")
    if level == "fast" or file is None:
        return problems
    try:
        return problems + _content_problems(shard, dataset, file, documents)
    except (ValueError, OSError) as error:  # the files changed meanwhile
        return [*problems, f"{shard.file}: {error}"]


def _content_problems(shard: Shard, dataset: Manifest, file: TokenFile, documents: Numbers | None) -> list[str]:
    """Read the shard once and check its hash, and its tokens, which a faulty builder may have got wrong."""
    problems: list[str] = []
    if shard.docs is None:
        rows = arrow.check_shard(file.path, shard.tokens, shard.documents)
        if rows.rows.read(0, 1) != 0 or rows.ids.read().min() < 0:
            problems.append(f"{shard.file}: impossible row starts or ids: damaged")
        documents = rows.documents
    elif documents is not None and hashlib.sha256(documents.path.read_bytes()).hexdigest() != shard.docs.sha256:
        problems.append(f"{shard.docs.file}: {_DAMAGED}")
    starts = np.empty(0, np.int64) if documents is None else documents.read()
    vocab_size, eot = dataset.vocab_size, dataset.eot
    position = eots = eots_at_starts = 0
    bad_id = ""
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as source:
        digest.update(source.read(file.start))
        buffer = memoryview(bytearray(_BLOCK))
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            # An Arrow file has more after the tokens.
            tokens = np.frombuffer(buffer[: count // 2 * 2], uint16.TOKEN)[: file.tokens - position]
            if not bad_id and len(tokens) and int(tokens.max()) >= vocab_size:
                at = int(np.argmax(tokens >= vocab_size))
                bad_id = f"token {position + at:,} is {tokens[at]}, not below {vocab_size}"
            is_eot = tokens == eot
            here = slice(*np.searchsorted(starts, [position, position + len(tokens)]))
            eots += int(np.count_nonzero(is_eot))
            eots_at_starts += int(np.count_nonzero(is_eot[starts[here] - position]))
            position += len(tokens)
    if digest.hexdigest() != shard.sha256:
        problems.append(f"{shard.file}: {_DAMAGED}")
    if bad_id:
        problems.append(f"{shard.file}: {bad_id}")
    in_order = (np.diff(starts, prepend=-1, append=file.tokens) > 0).all()
    if documents is not None and not (in_order and eots == eots_at_starts == len(starts)):
        problems.append(f"{shard.files[-1]}: document offsets do not fit the tokens of {shard.file}")
    return problems
