"""tools/same_losses.py in a repository of its own: a change of the maths, a harmless one, and code that fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = ["--flags", "--steps 3 --warmup 1"]


def git(repository: Path, *words: str) -> str:
    command = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compare(repository: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / "tools" / "same_losses.py", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert len(git(repository, "worktree", "list").splitlines()) == 1  # none is left behind
    return result


@pytest.fixture
def repository(tmp_path):
    """Today's packages and the tool, as one commit."""
    for name in ("packages", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for words in ("init --quiet", "add --all", "commit --quiet --message all"):
        git(tmp_path, *words.split())
    return tmp_path


@pytest.mark.slow
def test_a_change_of_the_maths_is_found_and_a_harmless_one_is_not(repository) -> None:
    train = repository / "packages" / "gpt2-train" / "src" / "gpt2_train"
    with (train / "loop.py").open("a") as file:
        file.write("\n\ndef of_no_use() -> None:\n    pass\n")
    same = compare(repository, "HEAD", *QUICK)
    assert same.returncode == 0, same.stderr
    found = json.loads(same.stdout)
    assert (found["equal"], found["steps"], found["steps_that_differ"]) == (True, 3, 0)
    assert found["tensors"]["model"] == {"tensors": 28, "differ": 0, "names": []}

    config = (train / "config.py").read_text()
    assert config.count("_option(1e-8") == 1
    (train / "config.py").write_text(config.replace("_option(1e-8", "_option(1.001e-8"))
    changed = compare(repository, "HEAD", *QUICK)
    assert changed.returncode == 1, changed.stderr
    found = json.loads(changed.stdout)
    # The loss of step 2 is the first after an update.
    assert (found["equal"], found["steps_that_differ"], found["first_difference"]["base"]["step"]) == (False, 2, 2)
    assert found["tensors"]["model"]["differ"] > 0
    assert found["tensors"]["optimizer"]["differ"] > 0


@pytest.mark.slow
def test_what_cannot_be_compared_says_why(repository) -> None:
    unknown = compare(repository, "nowhere")
    assert unknown.returncode == 1
    assert unknown.stderr == f"Error: 'nowhere' is no commit of {repository}: give a branch, a tag or a hash\n"
    assert compare(repository).returncode == 2

    (repository / "packages" / "gpt2-train" / "src" / "gpt2_train" / "loop.py").write_text("oops(")
    broken = compare(repository, "HEAD", *QUICK)
    assert broken.returncode == 1
    assert "SyntaxError: '(' was never closed" in broken.stderr
