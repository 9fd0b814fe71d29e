"""What the fault tests of gpt2-train share: a run that is disturbed, gone on with, and compared."""

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import soak
from gpt2_train import verify_checkpoint

STEPS = soak.SETTINGS["steps"]


class Runs:
    """Begins runs of the small model as forks of one server, with a dataset and the undisturbed run R to compare.

    Attributes:
        data: the dataset.
        whole: folder of R on one rank.
    """

    def __init__(self, folder: Path) -> None:
        self.server = soak.ForkServer()
        self.folder = folder
        self.data = soak.make_dataset(folder)
        self._whole = {}

    def whole(self, ranks=1) -> Path:
        """The undisturbed run."""
        if ranks not in self._whole:
            out = self.folder / f"whole-{ranks}"
            assert self.run(out, ranks=ranks) == 0, self.said(out)
            self._whole[ranks] = out
        return self._whole[ranks]

    def begin(self, out: Path, *faults, ranks=1, env=None, **changes):
        """Start; returns a Child a rank."""
        words = soak.command_line(self.data, out, **changes)
        return soak.start_ranks(self.server, words, self.log(out), ranks, faults, **(env or {}))

    def run(self, out: Path, *faults, ranks=1, seconds=60, env=None, **changes) -> int:
        """Start and wait; returns rank 0's exit code."""
        return self.codes(self.begin(out, *faults, ranks=ranks, env=env, **changes), seconds)[0]

    @staticmethod
    def codes(children, seconds=60) -> list[int]:
        """Exit code of each rank."""
        until = time.monotonic() + seconds
        return [child.wait(max(0.1, until - time.monotonic())) for child in children]

    @staticmethod
    def log(out: Path) -> Path:
        return out.with_name(f"{out.name}.log")

    def said(self, out: Path, rank=0) -> str:
        """All that the runs in a folder wrote to stdout and stderr."""
        log = self.log(out)
        log = log.with_name(f"{log.name}.{rank}") if rank else log
        return log.read_text(errors="replace") if log.exists() else ""

    def must_finish_as_whole(self, out: Path, *faults, ranks=1, **changes) -> None:
        """The same command goes on, and ends as the undisturbed run."""
        assert self.run(out, *faults, ranks=ranks, **changes) == 0, self.said(out)
        self.must_equal_whole(out, ranks)

    def must_equal_whole(self, out: Path, ranks=1) -> None:
        whole = self.whole(ranks)
        assert soak.loss_log(out) == soak.loss_log(whole)
        assert soak.outcome(out) == soak.outcome(whole)
        assert not list((out / "checkpoints").glob(".tmp*"))

    def copy(self, out: Path, ranks=1) -> Path:
        """R's folder, to do something to."""
        shutil.copytree(self.whole(ranks), out)
        return out

    def wind_back(self, out: Path, step: int, ranks=1) -> Path:
        """A folder as R's was at a step: its rows go on, its checkpoints do not."""
        self.copy(out, ranks)
        kept = checkpoint(out, step)
        assert kept.exists(), "R keeps its last three checkpoints"
        for folder in steps_of(out):
            if folder > step:
                shutil.rmtree(checkpoint(out, folder))
        return out


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def steps_of(out: Path) -> list[int]:
    """Steps that have a checkpoint folder."""
    return sorted(int(path.name[-8:]) for path in (out / "checkpoints").glob("step-*"))


def good_steps(out: Path) -> list[int]:
    """Steps whose checkpoint verifies."""
    return [step for step in steps_of(out) if not verify_checkpoint(checkpoint(out, step))]


def rows(out: Path, kind="loss") -> list[dict]:
    """Rows of metrics.jsonl that have a field."""
    return [row for row in soak.read_rows(out / "metrics.jsonl") if kind in row]


def wait_for_step(out: Path, step: int, seconds=60.0) -> None:
    """Until the run has logged a step."""
    wait_until(lambda: any(row["step"] >= step for row in rows(out)), seconds)


def wait_until(condition, seconds=60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def seal(folder: Path) -> None:
    """Write a checkpoint's manifest anew, after a change that is to look meant."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def kill(children) -> None:
    """SIGKILL, for the tests that leave something running."""
    for child in children:
        child.send(signal.SIGCONT)
        child.send(signal.SIGKILL)
