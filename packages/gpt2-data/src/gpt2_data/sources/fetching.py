"""Files of the hub beside the work on them: the next is fetched while one is tokenized."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from gpt2_data.building.config import BuildConfig
from gpt2_data.building.estimate import DOWNLOADS_AT_ONCE
from gpt2_data.building.plan import Plan, folder_of
from gpt2_data.building.tokenize_units import HashTask, UnitTask
from gpt2_data.sources import download


class Fetcher:
    """What the units in `wanted` still need of the plan's remote files, fetched in order in the background."""

    def __init__(self, plan: Plan, config: BuildConfig, wanted: Sequence[UnitTask]) -> None:
        self._left = Counter(task.unit.files[0] for task in wanted)
        files = [(item, remote) for item, remote in plan.remote if item.path in self._left]
        self._remote = {item.path for item, _ in files}
        self._wanted = {task.unit.index for task in wanted}
        self._downloader = None
        if files:
            ahead = DOWNLOADS_AT_ONCE if config.delete_downloads else None
            self._downloader = download.Downloader(
                [(remote, folder_of(item, remote)) for item, remote in files], ahead, config.delete_downloads
            )

    def ready(self, task: UnitTask | HashTask) -> bool:
        """Whether the task's file is there, or is not needed. Raises what ended the fetching."""
        if self._downloader is None or isinstance(task, HashTask) or task.unit.index not in self._wanted:
            return True
        path = task.unit.files[0]
        return path not in self._remote or self._downloader.ready(Path(path))

    def release(self, task: UnitTask) -> None:
        """The task is done, and with the last of its file the file too."""
        path = task.unit.files[0]
        if self._downloader is None or path not in self._remote or task.unit.index not in self._wanted:
            return
        self._left[path] -= 1
        if not self._left[path]:
            self._downloader.release(Path(path))

    @property
    def done_bytes(self) -> int:
        """Of total_bytes; what an earlier build had fetched counts."""
        return self._downloader.bytes_done if self._downloader is not None else 0

    @property
    def total_bytes(self) -> int:
        """Of the files that are needed."""
        return self._downloader.bytes_total if self._downloader is not None else 0

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._downloader is not None:
            self._downloader.close()
