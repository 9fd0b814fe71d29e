"""Build a dataset folder from a source: the same bytes on any machine, however often the build was killed.

Phase A (tokenize_units.py) tokenizes the plan's units into OUT/.build, phase B (cut_shards.py) cuts the documents
into shards. dataset.json comes last: a folder without it is no dataset.
"""

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from gpt2_data import disk, vocabulary
from gpt2_data.building import workers, workfolder
from gpt2_data.building.config import BuildConfig
from gpt2_data.building.cut_shards import cut_stream, lay_out, write_shard
from gpt2_data.building.estimate import DOWNLOADS_AT_ONCE
from gpt2_data.building.plan import WORK, Plan, check_unchanged, make_plan, request_name
from gpt2_data.building.tokenize_units import Receipt, UnitTask, document_at_work, read_receipt, tokenize_unit
from gpt2_data.formats.manifest import FILE_NAME, Manifest, Shard
from gpt2_data.sources.download import Downloader

Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class BuildResult:
    """The result of a build, or of a part of it that was not the last.

    Attributes:
        finished: False for such a part.
        text_mb_per_second: 10^6 bytes of text tokenized by this process, over its seconds.
        replaced_in: the files in which bytes that could not be read became U+FFFD; none if only halves of
            surrogate pairs did.
        end_marks: how often <|endoftext|> stands in text files that were not split. Like `replaced_in`, it is not
            known of a dataset that was there before.
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
    replaced_in: tuple[str, ...] = ()
    end_marks: int = 0


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
        tasks, own = [], self.config.vocabulary
        eot = None if own is None else own.eot
        for unit in self.plan.units:
            hashed = tuple(path for path in unit.files if path in unhashed)
            unhashed.difference_update(hashed)
            tasks.append(UnitTask(self.plan.name, unit, self.config.out / WORK, self.backend, hashed, eot))
        return tasks

    def find_finished(self) -> BuildResult | None:
        """Return the result of an earlier build of the same dataset; see workfolder.find_finished."""
        dataset = workfolder.find_finished(self.config, self.request, lambda: self.plan)
        return None if dataset is None else self.result(dataset.source, dataset.shards, already_built=True)

    def result(
        self, counts: dict[str, int], shards: Sequence[Shard] = (), tokens: int = 0, already_built: bool = False
    ) -> BuildResult:
        """Return what was built: `counts` as in dataset.json's `source`, and the shards or a part's tokens."""
        seconds = time.monotonic() - self.started
        return BuildResult(
            out=self.config.out,
            tokens=tokens + sum(shard.tokens for shard in shards),
            shards=len(shards),
            val_tokens=sum(shard.tokens for shard in shards if shard.split == "val"),
            documents=counts["documents"],
            documents_empty=counts["documents_empty"],
            documents_replaced=counts["documents_replaced"],
            tokenizer=self.backend,
            already_built=already_built,
            finished=bool(shards),
            seconds=round(seconds, 3),
            text_mb_per_second=round(self.text_bytes / 1e6 / seconds, 3),
        )


def build(config: BuildConfig, progress: Progress = lambda *_: None) -> BuildResult:
    """Build the dataset that `config` describes, or resume its build. A finished dataset stays as it is.

    With more than one worker the calling script needs `if __name__ == "__main__":`, since processes are spawned.

    Args:
        progress: is called with "fetching" (bytes of files), "tokenizing" (bytes of text) or "writing" (tokens);
            how much of it is done; the total; and the tokens so far. An exception from it ends the build.

    Raises:
        ValueError, OSError: one line that says what to do.
    """
    workfolder.check(config)
    run = _Run(config, config.backend, progress, time.monotonic(), request_name(config))
    if (result := run.find_finished()) is not None:
        return result
    if not run.plan.units:  # planned before the folder exists: a wrong source leaves nothing behind
        raise ValueError("the source contains no text")
    return _build_whole(run) if config.part is None else _build_part(run, *config.part)


def _build_whole(run: _Run) -> BuildResult:
    config, work = run.config, run.config.out / WORK
    with workfolder.locked(config.out):
        if (result := run.find_finished()) is not None:  # by the build that held the lock before us
            return result
        workfolder.prepare(config, run.plan, alone=True)
        receipts = _tokenize(run, run.tasks)
        check_unchanged(run.plan)
        if not any(receipt.text_bytes for receipt in receipts):
            shutil.rmtree(work)
            raise ValueError("the source contains no text")
        source = workfolder.source_record(run.plan, receipts)
        shards = _write_shards(run, receipts)
        result = dataclasses.replace(
            run.result(source, shards),
            replaced_in=tuple(dict.fromkeys(path for receipt in receipts for path in receipt.replaced_in)),
            end_marks=sum(receipt.end_marks for receipt in receipts),
        )
        dataset = Manifest(run.plan.tokenizer, source, workfolder.options(config), shards)
        facts = {name: getattr(result, name) for name in ("tokenizer", "seconds", "text_mb_per_second")}
        workfolder.append_history(config, facts | {"request": run.request, "dataset": dataset.hash})
        if config.vocabulary is not None:
            with disk.write_whole(config.out / vocabulary.FILE_NAME, work) as file:
                file.write(config.vocabulary.data)
        with disk.write_whole(config.out / FILE_NAME, work) as file:
            file.write(dataset.to_bytes())
        shutil.rmtree(work)
        return result


def _build_part(run: _Run, number: int, count: int) -> BuildResult:
    """Do this part's share of the units; cut the shards if no other part is running and nothing is missing."""
    with workfolder.shared(run.config.out, number, count):
        workfolder.prepare(run.config, run.plan, alone=False)
        share = run.tasks[len(run.tasks) * (number - 1) // count : len(run.tasks) * number // count]
        receipts = _tokenize(run, share)
    # The lock is released before looking: of parts that end together, the last to release it sees all done.
    if all(task.file("json").exists() for task in run.tasks):
        with contextlib.suppress(disk.Busy):  # another part has seen it, too, and cuts the shards
            return _build_whole(run)
    return run.result(workfolder.totals(receipts), tokens=sum(receipt.tokens for receipt in receipts))


def _tokenize(run: _Run, tasks: list[UnitTask]) -> list[Receipt]:
    """Return the receipts of all tasks in order; files are fetched meanwhile."""
    config, total = run.config, sum(task.unit.text_bytes for task in tasks)
    done = tokens = 0
    run.progress("tokenizing", 0, total, 0)
    remote = {item.path: item.remote for item in run.plan.inputs if item.remote is not None}
    awaited = {  # unit -> the file that it needs, unless it is already tokenized
        task.unit.index: path
        for task in tasks
        if (path := task.unit.files[0]) in remote and read_receipt(task, check_files=False) is None
    }
    # In its commit's folder, a file has the same path as in its repository.
    fetched = [
        (remote[path], Path(path.removesuffix(remote[path].path))) for path in dict.fromkeys(awaited.values())
    ]

    def ready(task: UnitTask) -> bool:
        path = awaited.get(task.unit.index)
        if path is None or downloader.ready(Path(path)):
            return True
        run.progress("fetching", downloader.bytes_done, downloader.bytes_total, tokens)
        return False

    def note(task: UnitTask, result: tuple[Receipt, bool]) -> None:
        nonlocal done, tokens
        receipt, is_new = result
        done += task.unit.text_bytes
        tokens += receipt.tokens
        run.text_bytes += receipt.text_bytes * is_new
        path = awaited.pop(task.unit.index, None)
        if path is not None and path not in awaited.values():
            downloader.release(Path(path))
        run.progress("tokenizing", done, total, tokens)

    names = {task.file("json").stem for task in tasks}
    job = workers.Job(tokenize_unit, document_at_work, note, ready)
    ahead = DOWNLOADS_AT_ONCE if config.delete_downloads else None
    with Downloader(fetched, ahead, config.delete_downloads) as downloader:
        try:
            on_ray = config.engine == "ray"
            results = workers.run(job, tasks, config.workers if on_ray else config.num_workers(total), on_ray)
        except ValueError:
            workfolder.discard(config.out / WORK, names)
            raise
        finally:
            workfolder.remove_temporaries(config.out / WORK, names)
    return [receipt for receipt, _ in results]


def _write_shards(run: _Run, receipts: Sequence[Receipt]) -> tuple[Shard, ...]:
    layout = lay_out(run.config, run.tasks, receipts)
    cuts = cut_stream(layout, run.config)
    workfolder.remove_other_shards(run.config.out, [cut.path for cut in cuts])
    done = 0
    # Threads: hashing and copying release the GIL, and starting a process takes longer than writing a shard.
    # There are twice as many as cores, since half of them wait for the disk.
    with ThreadPoolExecutor(2 * run.config.num_workers(2 * layout.num_tokens)) as pool:
        futures = [pool.submit(write_shard, layout, cut) for cut in cuts]
        try:
            for future in as_completed(futures):
                done += future.result().tokens
                run.progress("writing", done, layout.num_tokens, layout.num_tokens)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)
