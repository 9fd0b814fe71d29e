"""tools/release.py on a copy of the repository with a git of its own, in which things are broken on purpose."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import release_tree
import release_wheels

ROOT = Path(__file__).parent.parent
MODEL, EVAL = "packages/gpt2-model", "packages/gpt2-eval"
UNRELEASED = "## [Unreleased]\n\n### Added\n- Something new,\n  on two lines.\n\n"
CHANGELOG = f"# Changelog\n\n{UNRELEASED}## [0.1.0] - 2026-11-22\n\n### Added\n- The first.\n"


def run(repo, *words, **environment):
    command = [sys.executable, repo / "tools" / "release.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def git(repo, *words) -> str:
    command = ["git", "-C", repo, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def commit(repo) -> None:
    git(repo, "commit", "-q", "--all", "-m", "a change")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The packages, all at 0.1.0 with something to release, and the tools, committed."""
    repo = tmp_path_factory.mktemp("release") / "original"
    repo.mkdir()
    for name in ("packages", "tools"):
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, repo)
    for package in release_tree.read_packages(repo):
        project = package.folder / "pyproject.toml"
        text = project.read_text().replace(f'version = "{package.version}"', 'version = "0.1.0"')
        project.write_text(re.sub(r'"(gpt2-\w+)[<>=][^"]*"', r'"\1>=0.1,<0.2"', text))
        package.changelog.write_text(CHANGELOG)
    git(repo, "init", "-q", "-b", "main")
    for name, value in {"user.name": "A. Nother", "user.email": "a@example.org", "gc.auto": "0"}.items():
        git(repo, "config", name, value)
    git(repo, "add", "--all")
    commit(repo)
    return repo


@pytest.fixture
def repo(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "repo", symlinks=True))


@pytest.mark.slow
def test_the_packages_could_be_released_as_they_are() -> None:
    """The working tree itself: versions, changelogs, ranges; sdists, wheels; each installs and works alone."""
    checked = run(ROOT, "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(" dependencies alone\n") == 4


RANGE = f"{EVAL}/pyproject.toml: gpt2-model>=0.1,<0.2 leaves out gpt2-model 0.2.0: edit the range there"
BROKEN = {
    "no upper end": (
        f"{EVAL}/pyproject.toml",
        "model>=0.1,<0.2",
        "model>=0.1",
        "gpt2-model>=0.1 has no upper end",
    ),
    "version": (f"{MODEL}/pyproject.toml", '"0.1.0"', '"0.1.1"', "has version 0.1.1, the changelog 0.1.0"),
    "not static": (f"{MODEL}/pyproject.toml", 'version = "0.1.0"', 'dynamic = ["version"]', "and is missing"),
    "licence": (f"{MODEL}/LICENSE", "MIT", "My", f"{MODEL}/LICENSE is not the repository's"),
    "kind": (f"{MODEL}/CHANGELOG.md", "### Added", "### New", "CHANGELOG.md:5: '### New' must be one of Added, "),
    "no entry": (f"{MODEL}/CHANGELOG.md", "- Something new,\n  on two lines.\n", "", "of Unreleased has no entry"),
    "stray": (f"{MODEL}/CHANGELOG.md", "- Something", "Something", "CHANGELOG.md:6: neither"),
    "no day": (f"{MODEL}/CHANGELOG.md", "0] - 2026", "0] 2026", "a section is '## [Unreleased]' or "),
    "bad day": (f"{MODEL}/CHANGELOG.md", "2026-11-22", "2026-13-22", "2026-13-22 is no date"),
    "order": (
        f"{MODEL}/CHANGELOG.md",
        "## [0.1.0]",
        "## [0.0.9] - 2026-11-23\n\n### Fixed\n- It.\n\n## [0.1.0]",
        "0.0.9 stands above 0.1.0",
    ),
    "two": (
        f"{MODEL}/CHANGELOG.md",
        "## [Unreleased]",
        UNRELEASED + "## [Unreleased]",
        "must stand once, above all",
    ),
    "title": (f"{MODEL}/CHANGELOG.md", "# Changelog", "Changelog", "CHANGELOG.md:1: must be the title"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_says_what_is_wrong_on_a_line_before_it_builds(repo, what) -> None:
    file, old, new, message = BROKEN[what]
    edit(repo / file, old, new)
    checked = run(repo, "check")
    assert checked.returncode == 1
    assert message in checked.stderr
    assert checked.stderr.count("\n") == 1
    assert str(repo) not in checked.stderr


def test_a_breaking_change_below_forces_an_edit_above(repo) -> None:
    edit(repo / MODEL / "pyproject.toml", '"0.1.0"', '"0.2.0"')
    edit(repo / MODEL / "CHANGELOG.md", "## [Unreleased]", "## [0.2.0] - 2026-12-24")
    above = f"Error: {RANGE}\nError: {RANGE.replace('eval', 'train')}\n"
    checked = run(repo, "check")
    assert (checked.returncode, checked.stderr) == (1, above)


def test_a_wheel_has_its_sources_and_nothing_else(repo, tmp_path) -> None:
    """engine.c excluded, a test and another text than README.md packed: three lines, one each."""
    (repo / MODEL / "tests").mkdir()
    (repo / MODEL / "tests" / "test_it.py").write_text("")
    edit(repo / MODEL / "pyproject.toml", '["src/gpt2_model"]', '["src/gpt2_model", "tests"]\nexclude = ["*.c"]')
    model = next(p for p in release_tree.read_packages(repo) if p.name == "gpt2-model")
    wheel = release_wheels.build(model, tmp_path)
    edit(repo / MODEL / "README.md", "Exact GPT-2", "Exactly GPT-2")
    name = "gpt2_model-0.1.0-py3-none-any.whl"
    assert release_wheels.wheel_problems(model, wheel) == [
        f"{name} lacks gpt2_model/engine.c",
        f"{name} holds tests/test_it.py, which is no file of src/gpt2_model",
        f"{name} does not have README.md as its description",
    ]


def test_what_is_imported_but_not_required_is_found(repo, tmp_path) -> None:
    """numpy is in this environment, and must not be in the one that is made for the wheel."""
    edit(repo / "packages/gpt2-data/pyproject.toml", '    "numpy>=1.26",\n', "")
    packages = release_tree.read_packages(repo)
    data = next(package for package in packages if package.name == "gpt2-data")
    wheels = {data.name: release_wheels.build(data, tmp_path)}
    with pytest.raises(ValueError, match=r"import gpt2_data failed: .*No module named 'numpy'"):
        release_wheels.install_alone(data, packages, wheels, tmp_path / "env", None)


def test_status(repo) -> None:
    def model() -> dict:
        rows = json.loads(run(repo, "status", "--json").stdout)
        return next(row for row in rows if row["package"] == "gpt2-model")

    fresh = {
        "package": "gpt2-model",
        "version": "0.1.0",
        "last_tag": None,
        "commits": 1,
        "unreleased": 1,
        "depends": {},
    }
    assert model() == fresh
    git(repo, "tag", "gpt2-model-v0.1.0")
    git(repo, "tag", "gpt2-model-v0.0.9")
    edit(repo / EVAL / "README.md", "#", "##")
    commit(repo)
    assert model() == fresh | {"last_tag": "gpt2-model-v0.1.0", "commits": 0}
    edit(repo / MODEL / "README.md", "#", "##")
    commit(repo)
    assert model() == fresh | {"last_tag": "gpt2-model-v0.1.0", "commits": 1}
    table = run(repo, "status").stdout
    assert "gpt2-model >=0.1,<0.2, gpt2-data >=0.1,<0.2" in table
    assert len(table.splitlines()) == 5


def test_cut_commits_and_tags(repo) -> None:
    before = git(repo, "rev-parse", "HEAD")
    done = run(repo, "cut", "gpt2-eval", "patch")
    assert done.returncode == 0, done.stderr
    assert "git push --atomic origin HEAD gpt2-eval-v0.1.1" in done.stdout
    assert "Note: gpt2-model has unreleased changes" in done.stderr
    assert git(repo, "status", "--porcelain") == ""
    assert git(repo, "rev-parse", "HEAD~1", "gpt2-eval-v0.1.1^{commit}").split() == [
        before,
        git(repo, "rev-parse", "HEAD"),
    ]
    assert git(repo, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert git(repo, "diff", "--stat=200", "HEAD~1").splitlines()[:-1] == [
        "packages/gpt2-eval/CHANGELOG.md   | 2 ++",
        " packages/gpt2-eval/pyproject.toml | 2 +-",
    ]
    eval_ = next(package for package in release_tree.read_packages(repo) if package.name == "gpt2-eval")
    assert str(eval_.version) == "0.1.1"
    assert [str(release.version) for release in release_tree.read_changelog(eval_.changelog)] == [
        "None",
        "0.1.1",
        "0.1.0",
    ]
    assert release_tree.package_problems(repo, eval_) == []
    notes = "gpt2-eval 0.1.1\n\n### Added\n- Something new,\n  on two lines."
    assert git(repo, "for-each-ref", "--format=%(objecttype) %(contents)", "refs/tags") == f"tag {notes}"
    assert "has no entry under [Unreleased]" in run(repo, "cut", "gpt2-eval", "patch").stderr


def test_cut_of_a_breaking_version_waits_for_the_ranges_above(repo) -> None:
    refused = run(repo, "cut", "gpt2-model", "minor")
    assert refused.returncode == 1
    assert refused.stderr == f"Error: {RANGE}\nError: {RANGE.replace('eval', 'train')}\n"
    for name in ("gpt2-eval", "gpt2-train"):
        edit(repo / "packages" / name / "pyproject.toml", "gpt2-model>=0.1,<0.2", "gpt2-model>=0.1,<0.3")
    commit(repo)
    assert run(repo, "cut", "gpt2-model", "minor").returncode == 0
    assert git(repo, "tag") == "gpt2-model-v0.2.0"


def test_cut_shows_without_doing(repo) -> None:
    shown = run(repo, "cut", "gpt2-data", "minor", "--dry-run")
    assert shown.returncode == 1  # <0.2 above
    shown = run(repo, "cut", "gpt2-train", "major", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert '-version = "0.1.0"\n+version = "1.0.0"\n' in shown.stdout
    assert "+## [1.0.0] - " in shown.stdout
    assert git(repo, "tag") == git(repo, "status", "--porcelain") == ""


@pytest.mark.parametrize("how", ["edited", "staged", "untracked"])
def test_cut_refuses_a_dirty_tree(repo, how) -> None:
    file = repo / MODEL / ("new.py" if how == "untracked" else "README.md")
    file.write_text("changed")
    if how == "staged":
        git(repo, "add", file)
    refused = run(repo, "cut", "gpt2-model", "patch")
    assert refused.returncode == 1
    assert refused.stderr == "Error: there are changes that are not committed (git status): commit or stash them\n"
    assert file.read_text() == "changed"


def test_cut_refuses_a_tag_that_exists_and_wrong_words(repo) -> None:
    git(repo, "tag", "gpt2-model-v0.1.1")
    assert run(repo, "cut", "gpt2-model", "patch").stderr == "Error: the tag gpt2-model-v0.1.1 exists\n"
    wrong = run(repo, "cut", "gpt2-modle", "patch")
    assert wrong.returncode == 2
    assert "there are gpt2-data, gpt2-model, gpt2-eval, gpt2-train" in wrong.stderr


def test_cut_killed_anywhere_leaves_all_as_it_was_or_a_whole_tag(repo, tmp_path) -> None:
    """The git that it calls kills it instead, at its first call, at its second, and so on."""
    before = git(repo, "rev-parse", "HEAD")
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/calls\n"
        f'[ "$(wc -l < {tmp_path}/calls)" -ne "$KILLED" ] || {{ kill -9 $PPID; exit 1; }}\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    fake.chmod(0o755)
    killing = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    tagged = 0
    for call in range(1, 100):
        (tmp_path / "calls").write_text("")
        cut = run(repo, "cut", "gpt2-data", "patch", **killing, KILLED=str(call))
        if cut.returncode == 0:
            break
        assert cut.returncode == -9, cut.stderr
        assert git(repo, "rev-parse", "HEAD") == before
        assert git(repo, "status", "--porcelain") == ""
        if git(repo, "tag"):
            tagged += 1
            mend = run(repo, "cut", "gpt2-data", "patch").stderr
            assert "`git merge --ff-only gpt2-data-v0.1.1` ends it" in mend
            git(repo, "tag", "-d", "gpt2-data-v0.1.1")
    assert call > 8
    assert tagged == 1
    assert git(repo, "rev-parse", "gpt2-data-v0.1.1~1") == before


def test_a_cut_that_was_stopped_is_ended_by_a_merge(repo) -> None:
    run(repo, "cut", "gpt2-data", "patch")
    whole = git(repo, "rev-parse", "HEAD")
    git(repo, "reset", "-q", "--hard", "HEAD~1")  # as if killed between the tag and the branch
    git(repo, "merge", "-q", "--ff-only", "gpt2-data-v0.1.1")
    assert git(repo, "rev-parse", "HEAD") == whole
    assert git(repo, "status", "--porcelain") == ""
