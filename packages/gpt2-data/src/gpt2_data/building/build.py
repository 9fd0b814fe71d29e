"""A source -> a dataset folder: the same bytes whoever builds it, on whatever, killed as often as may be.

Phase A (units.py) tokenizes the plan's units into OUT/.build, phase B (shards.py) cuts the documents into
shards. dataset.json comes last: a folder without it is no dataset.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import tokenizer
from gpt2_data.building import cut_shards as shards
from gpt2_data.building import history, workfolder
from gpt2_data.building import tokenize_units as units
from gpt2_data.building import workers as engines
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.plan import WORK, Plan, check_unchanged, make_plan
from gpt2_data.building.tokenize_units import HashTask, Receipt, Result, Task, UnitTask, read_receipt
from gpt2_data.formats import manifest
from gpt2_data.formats import uint16 as formats
from gpt2_data.formats.manifest import Manifest
from gpt2_data.sources import fetching

_HASHED_AT_ONCE = 64_000_000  # bytes of small local files that one task hashes


@dataclass(frozen=True)
class Status:
    """How far a build is, for whoever shows it."""

    phase: str
    """"fetching", "tokenizing" or "writing"."""
    done: int
    total: int
    """Of the phase: bytes of files, bytes of text, or tokens."""
    documents: int = 0
    tokens: int = 0
    shards: int = 0


Progress = Callable[[Status], None]


@dataclass(frozen=True)
class BuildResult:
    """What a build made; of a part that was not the last, what it did."""

    out: Path
    tokens: int
    documents: int
    shards: int
    val_tokens: int
    documents_empty: int
    documents_replaced: int
    tokenizer: str
    already_built: bool
    finished: bool
    seconds: float
    text_mb_per_second: float
    """10^6 bytes of text tokenized in this run, over its seconds."""


def build(config: BuildConfig, progress: Progress = lambda status: None) -> BuildResult:
    """Make the dataset that `config` describes; what an interrupted build of it left is used.

    With more than one worker the calling script needs its `if __name__ == "__main__":`, for processes are spawned.
    Raises ValueError or OSError with one line that says what to do. A finished dataset is not touched.
    """
    started = time.monotonic()
    backend = tokenizer.choose_backend(config.tokenizer)
    workfolder.check(config.out)
    if (made := history.finished(config)) is not None:
        return _result(config, made, backend, True, started, 0)
    if config.part is not None:
        return _build_part(config, backend, started, progress)
    return _build_whole(config, backend, started, progress)


def _build_whole(
    config: BuildConfig, backend: str, started: float, progress: Progress, tokenized: int = 0
) -> BuildResult:
    """`tokenized`: bytes of text that this process has tokenized before, as a part."""
    with workfolder.locked(config.out):
        if (made := history.finished(config)) is not None:  # by the build that held the lock before us
            return _result(config, made, backend, True, started, 0)
        return _build_all(config, backend, started, progress, tokenized)


def _build_all(
    config: BuildConfig, backend: str, started: float, progress: Progress, tokenized: int
) -> BuildResult:
    work = config.out / WORK
    plan = make_plan(config)
    workfolder.prepare(work, plan.name)
    workfolder.check_space(plan, config)
    tasks = _tasks(plan, work, backend)
    results = _run(config, plan, tasks, progress)
    receipts = [result[0] for result in results if isinstance(result, tuple)]
    fresh = tokenized + _text_bytes(results)
    check_unchanged(plan)
    hashes = iter([sha256 for result in results if isinstance(result, list) for sha256 in result])
    input_hashes = [item.sha256 or next(hashes) for item in plan.inputs]
    content = plan.content_hash(input_hashes)
    unit_tasks = [task for task in tasks if isinstance(task, UnitTask)]
    written = _write_shards(config, unit_tasks, receipts, content, progress)
    source = history.source_record(plan, input_hashes, content, receipts)
    made = Manifest(tokenizer.identity(), source, history.options(config), written)
    history.append(config, backend, made, time.monotonic() - started, fresh, work)
    with formats.atomic(config.out / manifest.FILE_NAME, work) as file:
        file.write(made.to_bytes())
    shutil.rmtree(work)
    return _result(config, made, backend, False, started, fresh)


def _build_part(config: BuildConfig, backend: str, started: float, progress: Progress) -> BuildResult:
    """Do this part's share of the units; cut the shards if no part is still at work and nothing is missing."""
    assert config.part is not None
    number, count = config.part
    with workfolder.shared(config.out, number, count):
        work = config.out / WORK
        plan = make_plan(config)
        workfolder.prepare_part(work, plan.name)
        workfolder.check_space(plan, config)
        tasks = _tasks(plan, work, backend)
        share = tasks[len(tasks) * (number - 1) // count : len(tasks) * number // count]
        results = _run(config, plan, share, progress)
    text_bytes = _text_bytes(results)
    # The lock is let go before looking: of parts that end together, the last to let go sees all done.
    if all(task.receipt_file.exists() for task in tasks):
        with contextlib.suppress(workfolder.Busy):  # another part looked, too, and is at it
            whole = dataclasses.replace(config, part=None)
            return _build_whole(whole, backend, started, progress, text_bytes)
    receipts = [result[0] for result in results if isinstance(result, tuple)]
    seconds = time.monotonic() - started
    return BuildResult(
        out=config.out,
        tokens=sum(receipt.tokens for receipt in receipts),
        documents=sum(receipt.documents for receipt in receipts),
        shards=0,
        val_tokens=0,
        documents_empty=sum(receipt.documents_empty for receipt in receipts),
        documents_replaced=sum(receipt.documents_replaced for receipt in receipts),
        tokenizer=backend,
        already_built=False,
        finished=False,
        seconds=round(seconds, 3),
        text_mb_per_second=round(text_bytes / 1e6 / seconds, 3),
    )


def _text_bytes(results: list[Result]) -> int:
    """Tokenized in this run, and not before."""
    return sum(result[0].text_bytes for result in results if isinstance(result, tuple) and result[1])


# --- phase A


def _tasks(plan: Plan, work: Path, backend: str) -> list[Task]:
    """The units in order, and in front of a file's units the task to hash it."""
    tasks: list[Task] = []
    left = iter(plan.units)
    unit = next(left, None)
    waiting: list[tuple[str, int, int]] = []
    for i, item in enumerate(plan.inputs):
        if item.sha256 is None:
            waiting.append((item.path, item.bytes, item.mtime_ns))
        last = i + 1 == len(plan.inputs)
        if waiting and (last or item.kind != "txt" or sum(size for _, size, _ in waiting) >= _HASHED_AT_ONCE):
            tasks.append(HashTask(len(tasks), tuple(waiting), work))
            waiting = []
        while unit is not None and item.path == unit.files[-1]:
            tasks.append(UnitTask(plan.name, unit, work, backend))
            unit = next(left, None)
    assert unit is None
    assert not waiting
    return tasks


def _run(config: BuildConfig, plan: Plan, tasks: list[Task], progress: Progress) -> list[Result]:
    """The results of all tasks in order; files are fetched meanwhile."""
    total = sum(task.unit.text_bytes for task in tasks if isinstance(task, UnitTask))
    done = documents = tokens = 0
    progress(Status("tokenizing", 0, total))
    wanted = [task for task in tasks if isinstance(task, UnitTask) and read_receipt(task) is None]
    with fetching.Fetcher(plan, config, wanted) as fetcher:

        def tell(task: Task, result: Result) -> None:
            nonlocal done, documents, tokens
            if isinstance(task, UnitTask) and isinstance(result, tuple):
                done += task.unit.text_bytes
                documents += result[0].documents
                tokens += result[0].tokens
                fetcher.release(task)
            progress(Status("tokenizing", done, total, documents, tokens))

        def ready(task: Task) -> bool:
            if fetcher.ready(task):
                return True
            progress(Status("fetching", fetcher.done_bytes, fetcher.total_bytes, documents, tokens))
            return False

        job = engines.Job(units.do_task, units.do_task_again, units.blame, tell, ready)
        try:
            if config.engine == "ray":
                from gpt2_data.building import ray_engine

                return ray_engine.run(job, tasks, config.workers)
            return engines.run(job, tasks, config.num_workers(total))
        finally:
            workfolder.remove_temporaries(config.out / WORK, [task.receipt_file.stem for task in tasks])


# --- phase B


def _write_shards(
    config: BuildConfig, tasks: list[UnitTask], receipts: list[Receipt], content: str, progress: Progress
) -> tuple[manifest.Shard, ...]:
    work = config.out / WORK
    files = [
        shards.UnitFiles(task.tokens_file, task.lengths_file, receipt.tokens, receipt.documents)
        for task, receipt in zip(tasks, receipts, strict=True)
    ]
    seed = config.seed if config.order == "shuffled" else None
    exact = config.shard_size if config.compat is not None else None
    layout = shards.lay_out(files, work, seed, config.val_tokens, exact)
    cuts = shards.shard_tasks(layout, config.shard_size, config.out, work, config.format)
    workfolder.remove_other_shards(config.out, [cut.file for cut in cuts])
    key = history.shards_key(config, content)
    done = 0

    def write(cut: shards.ShardTask) -> manifest.Shard:
        shard = workfolder.kept_shard(cut, key)
        if shard is None:
            shard = shards.write_shard(cut)
            workfolder.keep_shard(cut, key, shard)
        return shard

    # Threads: hashing and copying leave the interpreter free, and a process takes longer to start than a shard
    # to write. Twice as many as cores, since half of them wait for the disk.
    with ThreadPoolExecutor(2 * config.num_workers(2 * layout.num_tokens)) as pool:
        futures = [pool.submit(write, cut) for cut in cuts]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                done += future.result().tokens
                progress(
                    Status("writing", done, layout.num_tokens, layout.num_documents, layout.num_tokens, count)
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)


def _result(
    config: BuildConfig, made: Manifest, backend: str, existed: bool, started: float, text_bytes: int
) -> BuildResult:
    seconds = time.monotonic() - started
    return BuildResult(
        out=config.out,
        tokens=made.tokens("train") + made.tokens("val"),
        documents=made.documents("train") + made.documents("val"),
        shards=len(made.shards),
        val_tokens=made.tokens("val"),
        documents_empty=made.source["documents_empty"],
        documents_replaced=made.source["documents_replaced"],
        tokenizer=backend,
        already_built=existed,
        finished=True,
        seconds=round(seconds, 3),
        text_mb_per_second=round(text_bytes / 1e6 / seconds, 3),
    )
