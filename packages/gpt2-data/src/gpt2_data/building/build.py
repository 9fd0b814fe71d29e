"""A source -> a dataset folder: the same bytes whoever builds it, on whatever machine, however often it is killed.

Phase A (tokenize_units.py) tokenizes the plan's units into OUT/.build, phase B (cut_shards.py) cuts the documents
into shards. dataset.json comes last: a folder without it is no dataset.
"""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import disk, tokenizer
from gpt2_data.building import workers, workfolder
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import lay_out, shard_tasks, write_shard
from gpt2_data.building.estimate import DOWNLOADS_AT_ONCE
from gpt2_data.building.plan import WORK, Plan, check_unchanged, make_plan, request_name
from gpt2_data.building.tokenize_units import (
    Receipt,
    UnitTask,
    document_at_work,
    read_receipt,
    tokenize_carefully,
    tokenize_unit,
)
from gpt2_data.formats.manifest import FILE_NAME, Manifest, Shard
from gpt2_data.sources.download import Downloader


@dataclass(frozen=True)
class Status:
    """The progress of a build.

    Attributes:
        phase: "fetching", "tokenizing" or "writing".
        done: of `total`: bytes of files, bytes of text, or tokens, by the phase.
    """

    phase: str
    done: int
    total: int
    documents: int = 0
    tokens: int = 0
    shards: int = 0


Progress = Callable[[Status], None]


@dataclass(frozen=True)
class BuildResult:
    """The result of a build, or of a part of it that was not the last.

    Attributes:
        finished: False for such a part.
        text_mb_per_second: 10^6 bytes of text tokenized by this process, over its seconds.
    """

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


@dataclass
class _Run:
    """A call of `build`. `text_bytes` counts what it has tokenized."""

    config: BuildConfig
    backend: str
    progress: Progress
    started: float
    request: str
    text_bytes: int = 0

    @functools.cached_property
    def plan(self) -> Plan:
        return make_plan(self.config)

    @functools.cached_property
    def tasks(self) -> list[UnitTask]:
        """The units in order; a file whose SHA-256 is not known is hashed with its first unit."""
        unhashed = {item.path for item in self.plan.inputs if item.sha256 is None}
        tasks = []
        for unit in self.plan.units:
            hashed = tuple(path for path in unit.files if path in unhashed)
            unhashed.difference_update(hashed)
            tasks.append(UnitTask(self.plan.name, unit, self.config.out / WORK, self.backend, hashed))
        return tasks

    def find_finished(self) -> Manifest | None:
        """Return the dataset, if it is built already; see workfolder.find_finished."""
        return workfolder.find_finished(self.config, self.request, lambda: self.plan)

    def result(self, manifest: Manifest | None, receipts: Sequence[Receipt], is_new: bool = True) -> BuildResult:
        """Return what was built, or what a part did: the `receipts`."""
        shards = () if manifest is None else manifest.shards
        counts = workfolder.totals(receipts) if manifest is None else manifest.source
        seconds = time.monotonic() - self.started
        return BuildResult(
            out=self.config.out,
            tokens=sum(item.tokens for item in shards or receipts),
            documents=counts["documents"],
            shards=len(shards),
            val_tokens=sum(shard.tokens for shard in shards if shard.split == "val"),
            documents_empty=counts["documents_empty"],
            documents_replaced=counts["documents_replaced"],
            tokenizer=self.backend,
            already_built=not is_new,
            finished=manifest is not None,
            seconds=round(seconds, 3),
            text_mb_per_second=round(self.text_bytes / 1e6 / seconds, 3),
        )


def build(config: BuildConfig, progress: Progress = lambda status: None) -> BuildResult:
    """Build the dataset that `config` describes, or resume its build. A finished dataset stays as it is.

    With more than one worker the calling script needs its `if __name__ == "__main__":`, for processes are spawned.

    Args:
        progress: is called with a Status as the build advances. What it raises ends the build.

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    workfolder.check(config.out)
    backend = tokenizer.choose_backend(config.tokenizer)
    run = _Run(config, backend, progress, time.monotonic(), request_name(config))
    if (manifest := run.find_finished()) is not None:
        return run.result(manifest, [], is_new=False)
    if not run.plan.units:  # planned before the folder is there: a source that is wrong leaves nothing behind
        raise ValueError("the source contains no text")
    return _build_whole(run) if config.part is None else _build_part(run, *config.part)


def _build_whole(run: _Run) -> BuildResult:
    config, work = run.config, run.config.out / WORK
    with workfolder.locked(config.out):
        if (manifest := run.find_finished()) is not None:  # by the build that held the lock before us
            return run.result(manifest, [], is_new=False)
        workfolder.prepare(work, run.plan, alone=True)
        workfolder.check_space(run.plan, config)
        receipts = _tokenize(run, run.tasks)
        check_unchanged(run.plan)
        if sum(receipt.tokens for receipt in receipts) == sum(receipt.documents for receipt in receipts):
            shutil.rmtree(work)  # nothing but an EOT for each document
            raise ValueError("the source contains no text")
        source = workfolder.source_record(run.plan, _input_hashes(run, receipts), receipts)
        options = workfolder.options(config)
        shards = _write_shards(run, receipts)
        manifest = Manifest(tokenizer.identity(), source, options, shards)
        result = run.result(manifest, receipts)
        facts = {name: getattr(result, name) for name in ("tokenizer", "seconds", "text_mb_per_second")}
        workfolder.append_history(config, facts | {"request": run.request, "dataset": manifest.hash})
        with disk.write_whole(config.out / FILE_NAME, work) as file:
            file.write(manifest.to_bytes())
        shutil.rmtree(work)
        return result


def _build_part(run: _Run, number: int, count: int) -> BuildResult:
    """Do this part's share of the units; cut the shards if no part is still at work and nothing is missing."""
    with workfolder.shared(run.config.out, number, count):
        workfolder.prepare(run.config.out / WORK, run.plan, alone=False)
        workfolder.check_space(run.plan, run.config)
        share = run.tasks[len(run.tasks) * (number - 1) // count : len(run.tasks) * number // count]
        receipts = _tokenize(run, share)
    # The lock is let go before looking: of parts that end together, the last to let go sees all done.
    if all(task.file("json").exists() for task in run.tasks):
        with contextlib.suppress(disk.Busy):  # another part looked, too, and cuts them
            return _build_whole(run)
    return run.result(None, receipts)


def _input_hashes(run: _Run, receipts: Sequence[Receipt]) -> list[str]:
    """Return the SHA-256 of each input; one without documents has no unit that hashed it."""
    hashes: dict[str, str] = {}
    for task, receipt in zip(run.tasks, receipts, strict=True):
        hashes.update(zip(task.hashed, receipt.sha256, strict=True))
    return [item.sha256 or hashes.get(item.path) or disk.sha256(Path(item.path)) for item in run.plan.inputs]


# --- phase A


def _tokenize(run: _Run, tasks: list[UnitTask]) -> list[Receipt]:
    """Return the receipts of all tasks in order; files are fetched meanwhile."""
    config, total = run.config, sum(task.unit.text_bytes for task in tasks)
    done = documents = tokens = 0
    run.progress(Status("tokenizing", 0, total))
    remote = {item.path: item.remote for item in run.plan.inputs if item.remote is not None}
    waiting: dict[Path, set[int]] = {}  # a file to be fetched -> the units of it that are not tokenized
    for task in tasks:
        if task.unit.files[0] in remote and read_receipt(task, check_files=False) is None:
            waiting.setdefault(Path(task.unit.files[0]), set()).add(task.unit.index)
    # A file lies in the folder of its commit as in its repository.
    fetched = [(remote[str(path)], Path(str(path).removesuffix(remote[str(path)].path))) for path in waiting]
    ahead = DOWNLOADS_AT_ONCE if config.delete_downloads else None

    def ready(task: UnitTask) -> bool:
        path = Path(task.unit.files[0])
        if task.unit.index not in waiting.get(path, ()) or downloader.ready(path):
            return True
        run.progress(Status("fetching", downloader.bytes_done, downloader.bytes_total, documents, tokens))
        return False

    def note(task: UnitTask, result: tuple[Receipt, bool]) -> None:
        nonlocal done, documents, tokens
        receipt, is_new = result
        done += task.unit.text_bytes
        documents += receipt.documents
        tokens += receipt.tokens
        run.text_bytes += receipt.text_bytes * is_new
        path = Path(task.unit.files[0])
        if task.unit.index in waiting.get(path, ()):
            waiting[path].remove(task.unit.index)
            if not waiting[path]:
                downloader.release(path)
        run.progress(Status("tokenizing", done, total, documents, tokens))

    job = workers.Job(tokenize_unit, tokenize_carefully, document_at_work, note, ready)
    with Downloader(fetched, ahead, config.delete_downloads) as downloader:
        try:
            if config.engine == "ray":
                results = workers.run_on_ray(job, tasks, config.workers)
            else:
                results = workers.run(job, tasks, config.num_workers(total))
        finally:
            workfolder.remove_temporaries(config.out / WORK, [task.file("json").stem for task in tasks])
    return [receipt for receipt, _ in results]


# --- phase B


def _write_shards(run: _Run, receipts: Sequence[Receipt]) -> tuple[Shard, ...]:
    layout = lay_out(run.config, run.tasks, receipts)
    cuts = shard_tasks(layout, run.config)
    workfolder.remove_other_shards(run.config.out, [cut.file for cut in cuts])
    done = 0
    # Threads: hashing and copying leave the interpreter free, and a process takes longer to start than a shard
    # to write. Twice as many as cores, since half of them wait for the disk.
    with ThreadPoolExecutor(2 * run.config.num_workers(2 * layout.num_tokens)) as pool:
        futures = [pool.submit(write_shard, cut) for cut in cuts]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                done += future.result().tokens
                run.progress(
                    Status("writing", done, layout.num_tokens, layout.num_documents, layout.num_tokens, count)
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)
