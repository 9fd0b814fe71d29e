"""Versions and releases of the four packages: python tools/release.py status | check | cut PACKAGE LEVEL

A package's version is static in its pyproject.toml, its changelog keeps the format of keepachangelog.com, its tags
are called gpt2-model-v0.1.0. Nothing here pushes or uploads.
"""

import difflib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import click
from packaging.version import Version

from release_tree import Package, package_problems, range_problems, read_changelog, read_packages, span, with_lower
from release_wheels import build, install_alone, sdist, twine_check, wheel_problems

ROOT = Path(__file__).resolve().parent.parent


class _Group(click.Group):
    """What a person can mend is one line, or a line each, and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error).replace(f"{ROOT}/", "")) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Versions and releases of the four packages; nothing is pushed or uploaded."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def status(as_json: bool) -> None:
    """Each package's version, last tag, commits since then, unreleased entries, and ranges of what is below it."""
    rows = [_status(package) for package in read_packages(ROOT)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'package':<12}{'version':<9}{'last tag':<20}{'commits since':>13}{'unreleased':>12}  depends on")
    for row in rows:
        depends = ", ".join(f"{name} {span}" for name, span in row["depends"].items())
        click.echo(
            f"{row['package']:<12}{row['version']:<9}{row['last_tag'] or 'none':<20}"
            f"{row['commits']:>13}{row['unreleased']:>12}  {depends}".rstrip()
        )


@main.command()
@click.option(
    "--full", is_flag=True, help="Let pip fetch what a package requires, torch too, instead of linking it."
)
@click.option("--dist", type=click.Path(file_okay=False, path_type=Path), help="Keep the sdists and wheels here.")
def check(full: bool, dist: Path | None) -> None:
    """Say whether the packages could be released as they are; if not, exit 1 with a line for each reason.

    Changelogs and versions agree, ranges between the packages hold, sdists and wheels build, twine accepts them,
    a wheel holds its sources and nothing else, and installs alone, with only what it requires: its command
    answers, its public names load. Without --full what it requires is linked from the environment that runs this.
    """
    packages = read_packages(ROOT)
    _refuse([line for package in packages for line in package_problems(ROOT, package)] + range_problems(packages))
    with tempfile.TemporaryDirectory(prefix="gpt2-release-") as temporary:
        out = (dist or Path(temporary) / "dist").resolve()
        wheels = {package.name: build(package, out) for package in packages}
        twine_check([*wheels.values(), *(sdist(package, out) for package in packages)])
        _refuse([line for package in packages for line in wheel_problems(package, wheels[package.name])])
        pins = ROOT / "constraints.txt" if full else None

        def alone(package: Package) -> int:
            return install_alone(package, packages, wheels, Path(temporary) / package.name, pins)

        with ThreadPoolExecutor(1 if full else 2) as pool:
            for package, others in zip(packages, pool.map(alone, packages), strict=True):
                size = wheels[package.name].stat().st_size / 1000
                name = f"{package.name} {package.version}"
                click.echo(f"{name:<18}wheel of {size:.0f} kB, works with its own {others} dependencies alone")


@main.command()
@click.argument("name", metavar="PACKAGE")
@click.argument("level", type=click.Choice(["major", "minor", "patch"]))
@click.option("--dry-run", is_flag=True, help="Show the change; make none.")
def cut(name: str, level: str, dry_run: bool) -> None:
    """Make a package's next version here: a commit and an annotated tag.

    What its changelog has under Unreleased becomes the version's, with today's date. The commit is made beside the
    working tree, which follows by a fast-forward once the tag is there: killed at any time, this leaves everything
    as it was, or a whole tag, from which `git merge --ff-only` goes on.
    """
    packages = read_packages(ROOT)
    package = next((package for package in packages if package.name == name), None)
    if package is None:
        raise click.UsageError(f"no package {name}: there are {', '.join(package.name for package in packages)}")
    version = _next(package.version, level)
    tag = f"{name}-v{version}"
    _refuse(_obstacles(package, packages, version, tag))
    texts = _edited(package, version)
    for lower in with_lower(package, packages)[:-1]:
        if _status(lower)["unreleased"]:
            click.echo(f"Note: {lower.name} has unreleased changes; if {name} needs them, cut it first.", err=True)
    if dry_run:
        click.echo(f"{_diff(texts)}Would be committed, and tagged {tag}.")
        return
    notes = "\n".join(read_changelog(package.changelog)[0].lines).strip()
    commit = _commit(texts, f"{name} {version}")
    # Headings begin with '#', and git takes such lines out of a message unless told otherwise.
    _git("tag", "-a", tag, commit, "--cleanup=whitespace", "-m", f"{name} {version}", "-m", notes)
    _git("merge", "--quiet", "--ff-only", commit)
    click.echo(
        f"{tag} is committed and tagged here. Next:\n"
        f"  python tools/release.py check --dist dist\n"
        f"  git push --atomic origin HEAD {tag}\n"
        f"  python -m twine upload dist/{package.module}-{version}*\n"
        f"or undo it: git tag -d {tag} && git reset --hard HEAD~1"
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\nError: ".join(problems))


def _status(package: Package) -> dict[str, Any]:
    found = _git("tag", "--list", "--merged", "HEAD", "--sort=-v:refname", f"{package.name}-v*").splitlines()
    tag = found[0] if found else None
    since = f"{tag}..HEAD" if tag else "HEAD"
    newest = read_changelog(package.changelog)[:1]
    return {
        "package": package.name,
        "version": str(package.version),
        "last_tag": tag,
        "commits": int(_git("rev-list", "--count", since, "--", str(package.folder))),
        "unreleased": sum(release.entries for release in newest if release.version is None),
        "depends": {requirement.name: span(requirement) for requirement in package.ours},
    }


def _next(version: Version, level: str) -> Version:
    steps = {
        "major": (version.major + 1, 0, 0),
        "minor": (version.major, version.minor + 1, 0),
        "patch": (version.major, version.minor, version.micro + 1),
    }
    return Version(".".join(map(str, steps[level])))


def _obstacles(package: Package, packages: list[Package], version: Version, tag: str) -> list[str]:
    """Why this version cannot be made now."""
    problems = []
    if _git("status", "--porcelain"):
        problems.append("there are changes that are not committed (git status): commit or stash them")
    if _git("tag", "--list", tag):
        whole = subprocess.run(["git", "-C", str(ROOT), "merge-base", "--is-ancestor", tag, "HEAD"], check=False)
        mend = f": an earlier cut was stopped; `git merge --ff-only {tag}` ends it, `git tag -d {tag}` undoes it"
        problems.append(f"the tag {tag} exists{mend if whole.returncode else ''}")
    problems += package_problems(ROOT, package)
    if not problems and not _status(package)["unreleased"]:
        problems.append(f"{package.changelog} has no entry under [Unreleased]: nothing to release")
    return problems + range_problems(packages, {package.name: version})


def _edited(package: Package, version: Version) -> dict[Path, str]:
    """The two files as they are to be, by path."""
    project, changelog = package.folder / "pyproject.toml", package.changelog
    line = re.compile(rf'^version = "{re.escape(str(package.version))}"$', re.MULTILINE)
    text, changed = line.subn(f'version = "{version}"', project.read_text(encoding="utf-8"))
    if changed != 1:
        raise ValueError(f'{project}: needs one line version = "{package.version}", and has {changed}')
    title = f"## [Unreleased]\n\n## [{version}] - {date.today()}"
    return {project: text, changelog: changelog.read_text(encoding="utf-8").replace("## [Unreleased]", title, 1)}


def _diff(texts: dict[Path, str]) -> str:
    lines: list[str] = []
    for path, text in texts.items():
        name, old = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        lines += difflib.unified_diff(
            old.splitlines(True), text.splitlines(True), f"a/{name}", f"b/{name}", n=1
        )  # fmt: skip
    return "".join(lines)


def _commit(texts: dict[Path, str], message: str) -> str:
    """A commit on top of HEAD with these files, by an index of its own: neither branch nor tree has it yet."""
    with tempfile.TemporaryDirectory(prefix="gpt2-release-") as temporary:
        index = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
        _git("read-tree", "HEAD", **index)
        for path, text in texts.items():
            blob = _git("hash-object", "-w", "--stdin", text=text)
            _git("update-index", "--cacheinfo", f"100644,{blob},{path.relative_to(ROOT)}", **index)
        return _git("commit-tree", _git("write-tree", **index), "-p", "HEAD", "-m", message)


def _git(*words: str, text: str | None = None, **environment: str) -> str:
    """Git's stdout without the newline at its end. ValueError: what it says."""
    done = subprocess.run(["git", *words], cwd=ROOT, input=text, capture_output=True, text=True, check=False,
                          env=os.environ | environment)  # fmt: skip
    if done.returncode:
        raise ValueError(f"git {words[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    main()
