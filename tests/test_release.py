"""tools/release.py on a copy of the repository with a git of its own, in which things are broken on purpose."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MODEL, EVAL = "packages/gpt2-model", "packages/gpt2-eval"
UNRELEASED = "## [Unreleased]\n\n### Added\n- Something new,\n  on two lines.\n\n"
CHANGELOG = f"# Changelog\n\n{UNRELEASED}## [0.1.0] - 2026-11-22\n\n### Added\n- The first.\n"
# Imported is what pip put there, not the working tree; every public name is asked for, since most load on demand.
TRY = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
assert module.__file__.startswith(sys.prefix), f"{sys.argv[1]} comes from {module.__file__}"
for name in [*module.__all__, "__version__"]:
    getattr(module, name)
"""


def run(repo, *words):
    command = [sys.executable, repo / "tools" / "release.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def git(repo, *words) -> str:
    command = ["git", "-C", repo, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.fixture
def repo(tmp_path) -> Path:
    """The packages, all at 0.1.0 with something to release, and the tools, committed."""
    repo = tmp_path / "repo"
    for name in ("packages", "tools"):
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, repo)
    for project in repo.glob("packages/*/pyproject.toml"):
        text = re.sub(r'^version = ".*"$', 'version = "0.1.0"', project.read_text(), flags=re.MULTILINE)
        project.write_text(re.sub(r'"(gpt2-\w+)[<>=][^"]*"', r'"\1>=0.1,<0.2"', text))
        project.with_name("CHANGELOG.md").write_text(CHANGELOG)
    git(repo, "init", "-q", "-b", "main")
    for name, value in {"user.name": "A. Nother", "user.email": "a@example.org", "gc.auto": "0"}.items():
        git(repo, "config", name, value)
    git(repo, "add", "--all")
    git(repo, "commit", "-q", "-m", "the first")
    return repo


RANGE = f"{EVAL}/pyproject.toml: gpt2-model>=0.1,<0.2 leaves out gpt2-model 0.2.0: edit the range there"
PROJECT, LOG = f"{MODEL}/pyproject.toml", f"{MODEL}/CHANGELOG.md"
BROKEN = {
    "no end": (f"{EVAL}/pyproject.toml", "model>=0.1,<0.2", "model>=0.1", "gpt2-model>=0.1 has no upper end"),
    "version": (PROJECT, '"0.1.0"', '"0.1.1"', "its newest version is not that of pyproject.toml, 0.1.1"),
    "not static": (PROJECT, 'version = "0.1.0"', 'dynamic = ["version"]', "and is missing"),
    "licence": (f"{MODEL}/LICENSE", "MIT", "My", f"{MODEL}/LICENSE is not the repository's"),
    "no day": (LOG, "0] - 2026", "0] 2026", "a section is '## [Unreleased]' or "),
    "order": (LOG, "## [0.1", "## [0.0.9] - 2026-11-23\n\n## [0.1", "its newest version is not that of pyp"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_says_what_is_wrong_before_it_builds(repo, what) -> None:
    file, old, new, message = BROKEN[what]
    edit(repo / file, old, new)
    checked = run(repo, "check")
    assert checked.returncode == 1
    assert message in checked.stderr
    assert "Traceback" not in checked.stderr
    assert str(repo) not in checked.stderr


def test_a_breaking_change_below_forces_an_edit_above(repo) -> None:
    above = f"Error: {RANGE}\nError: {RANGE.replace('eval', 'train')}\n"
    cut = run(repo, "cut", "gpt2-model", "minor")
    assert (cut.returncode, cut.stderr) == (1, above)
    edit(repo / MODEL / "pyproject.toml", '"0.1.0"', '"0.2.0"')
    edit(repo / MODEL / "CHANGELOG.md", "## [Unreleased]", "## [0.2.0] - 2026-12-24")
    checked = run(repo, "check")
    assert (checked.returncode, checked.stderr) == (1, above)


def test_status(repo) -> None:
    def model() -> list[str]:
        lines = run(repo, "status").stdout.splitlines()
        assert len(lines) == 5
        return next(line.split() for line in lines if line.startswith("gpt2-model"))

    assert model() == ["gpt2-model", "0.1.0", "none", "1", "1"]
    git(repo, "tag", "gpt2-model-v0.1.0")
    git(repo, "tag", "gpt2-model-v0.0.9")
    for folder, commits in ((EVAL, "0"), (MODEL, "1")):
        edit(repo / folder / "README.md", "#", "##")
        git(repo, "commit", "-q", "--all", "-m", "a change")
        assert model() == ["gpt2-model", "0.1.0", "gpt2-model-v0.1.0", commits, "1"]
    assert "gpt2-model>=0.1,<0.2, gpt2-data>=0.1,<0.2" in run(repo, "status").stdout


def test_cut_commits_and_tags(repo) -> None:
    before = git(repo, "rev-parse", "HEAD")
    shown = run(repo, "cut", "gpt2-train", "major", "--dry-run")
    assert shown.stdout.startswith("gpt2-train-v1.0.0 would be committed and tagged, with:\n### Added\n- Some")
    assert git(repo, "tag") == git(repo, "status", "--porcelain") == ""
    done = run(repo, "cut", "gpt2-eval", "patch")
    assert done.returncode == 0, done.stderr
    assert "git push --atomic origin HEAD gpt2-eval-v0.1.1" in done.stdout
    assert git(repo, "status", "--porcelain") == ""
    after = git(repo, "rev-parse", "HEAD")
    assert git(repo, "rev-parse", "HEAD~1", "gpt2-eval-v0.1.1^{commit}").split() == [before, after]
    assert git(repo, "diff", "--stat=200", "HEAD~1").splitlines()[:-1] == [
        "packages/gpt2-eval/CHANGELOG.md   | 2 ++",
        " packages/gpt2-eval/pyproject.toml | 2 +-",
    ]
    notes = "gpt2-eval 0.1.1\n\n### Added\n- Something new,\n  on two lines."
    assert git(repo, "for-each-ref", "--format=%(objecttype) %(contents)", "refs/tags") == f"tag {notes}"
    assert "has no entry under [Unreleased]" in run(repo, "cut", "gpt2-eval", "patch").stderr


def test_cut_refuses_a_dirty_tree_a_tag_that_exists_and_wrong_words(repo) -> None:
    git(repo, "tag", "gpt2-model-v0.1.1")
    assert run(repo, "cut", "gpt2-model", "patch").stderr == "Error: the tag gpt2-model-v0.1.1 exists\n"
    wrong = run(repo, "cut", "gpt2-modle", "patch")
    assert wrong.returncode == 2
    assert "there are gpt2-data, gpt2-eval, gpt2-model, gpt2-train" in wrong.stderr
    (repo / MODEL / "new.py").write_text("untracked")
    refused = run(repo, "cut", "gpt2-data", "patch")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: there are changes that are not committed (git status)")


# What would be released: each wheel holds its sources, and works with what it requires and nothing else.


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """The working tree's wheels by package: `check` has built them, by way of an sdist, and twine accepts them."""
    dist = tmp_path_factory.mktemp("dist")
    checked = run(ROOT, "check", "--dist", dist)
    assert checked.returncode == 0, checked.stderr
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in dist.glob("*.whl")}


def reached(requirements: list[str]) -> dict[str, Distribution]:
    """What is installed here of these requirements, and of theirs, by name."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        ours = requirement.name.startswith("gpt2-") or requirement.name in found
        if not ours and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found[requirement.name] = distribution(requirement.name)
            waiting += map(Requirement, found[requirement.name].requires or [])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("package", ["gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train"])
def test_each_wheel_works_alone(wheels, tmp_path, package) -> None:
    """What it requires is linked from this environment, so an import that it does not ask for fails there."""
    env, bin, module = tmp_path / "env", tmp_path / "env" / "bin", package.replace("-", "_")
    venv.create(env, with_pip=False, symlinks=True)
    target = next(env.glob("lib/python*/site-packages"))
    needed = {"gpt2-eval": ["gpt2-model", "gpt2-data"], "gpt2-train": ["gpt2-eval", "gpt2-model", "gpt2-data"]}
    needed = [package, *needed.get(package, [])]
    projects = [(ROOT / "packages" / name / "pyproject.toml").read_text() for name in needed]
    required = [text for project in projects for text in tomllib.loads(project)["project"]["dependencies"]]
    for one in reached(required).values():
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            if not (target / top).exists():  # folders of namespace packages are several distributions'
                (target / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    pip = [sys.executable, "-m", "pip", "--python", bin / "python", "install", "--quiet", "--no-index"]
    commands = [
        [*pip, *(wheels[name] for name in needed)],  # pip refuses ranges that do not hold
        [bin / "python", "-I", "-c", TRY, module],
        [bin / package, "--version"],
        [bin / package, "--help"],
    ]
    if package == "gpt2-data":
        assert not (target / "torch").exists()
        out = tmp_path / "out"
        build = ["build", "pydocs", "--val-tokens", "100k", "--limit-docs", "100", "--out", out]
        commands += [[bin / package, *build], [bin / package, "verify", out, "--level", "full"]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for words in commands:
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr

    source = ROOT / "packages" / package / "src"
    files = {str(file.relative_to(source)) for file in (source / module).rglob("*") if file.is_file()}
    with zipfile.ZipFile(wheels[package]) as archive:
        info, names = f"{archive.namelist()[-1].partition('/')[0]}/", set(archive.namelist())
        description = message_from_bytes(archive.read(f"{info}METADATA")).get_payload(decode=True)
    assert {name for name in names if not name.startswith(info)} == {f for f in files if not f.endswith(".pyc")}
    assert f"{info}licenses/LICENSE" in names
    assert description.strip() == (ROOT / "packages" / package / "README.md").read_bytes().strip()
