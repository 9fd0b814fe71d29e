"""Files of the hub beside the work on them: the next is fetched while one is tokenized."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpt2_data.building.config import BuildConfig
from gpt2_data.building.estimate import DOWNLOADS_AT_ONCE
from gpt2_data.building.plan import Plan, folder_of
from gpt2_data.building.tokenize_units import HashTask, UnitTask
from gpt2_data.sources.download import Downloader


class Fetcher:
    """What the units in `wanted` still need of the plan's remote files, fetched in order in the background."""

    def __init__(self, plan: Plan, config: BuildConfig, wanted: Sequence[UnitTask]) -> None:
        self._wanted = {task.unit.index for task in wanted}
        uses = Counter(Path(task.unit.files[0]) for task in wanted)
        files = [(file, folder_of(item, file)) for item, file in plan.remote if Path(item.path) in uses]
        ahead = DOWNLOADS_AT_ONCE if config.delete_downloads else None
        self._downloader = Downloader(files, uses, ahead, config.delete_downloads)
        self.total_bytes = self._downloader.bytes_total

    def ready(self, task: UnitTask | HashTask) -> bool:
        """True if the task's file is there, or is not needed. Raises what ended the fetching."""
        if isinstance(task, HashTask) or task.unit.index not in self._wanted:
            return True
        return self._downloader.ready(Path(task.unit.files[0]))

    def release(self, task: UnitTask) -> None:
        """Take note that a task is done, and with the last of its file the file too."""
        if task.unit.index in self._wanted:
            self._downloader.release(Path(task.unit.files[0]))

    @property
    def done_bytes(self) -> int:
        """Of total_bytes; what an earlier build had fetched counts."""
        return self._downloader.bytes_done

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._downloader.close()
