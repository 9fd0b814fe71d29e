"""Versions and releases of the four packages: python tools/release.py status | check | cut PACKAGE LEVEL

A package's version is static in its pyproject.toml, its changelog has the format of keepachangelog.com, its tags
look like gpt2-model-v0.1.0. Nothing here pushes or uploads.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.version import Version

from gpt2_model.command import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"^## (?:\[Unreleased\]|\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d)$", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A package, from its pyproject.toml and its changelog."""

    name: str
    folder: Path
    version: Version
    ours: dict[str, str]  # the packages of this repository that it requires, as written: "gpt2-model>=0.1,<0.2"
    changelog: str
    unreleased: str


def read_packages() -> list[Package]:
    packages = []
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project.get("version", "missing")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"packages/{name}: version must be three numbers, like 0.1.0, and is {version}")
        required = {Requirement(text).name: text for text in project["dependencies"]}
        ours = {other: text for other, text in required.items() if (ROOT / "packages" / other).is_dir()}
        changelog = file.with_name("CHANGELOG.md").read_text(encoding="utf-8")
        unreleased = changelog.partition("## [Unreleased]\n")[2].partition("\n## ")[0].strip()
        packages.append(Package(name, Path("packages", name), Version(version), ours, changelog, unreleased))
    return packages


def problems_of(package: Package) -> list[str]:
    """Return what is wrong with a package's changelog, version or licence, one line per problem."""
    text, file = package.changelog, package.folder / "CHANGELOG.md"
    versions = SECTION.findall(text)  # "" is Unreleased
    holds = {
        f"{file}: a section is '## [Unreleased]' or '## [0.1.0] - 2026-11-22'":
            len(versions) == len(re.findall("^## ", text, re.MULTILINE)),
        f"{file}: its newest version is not that of pyproject.toml, {package.version}":
            next(filter(None, versions), "") == str(package.version),
        f"{package.folder}/LICENSE is not the repository's: copy it there":
            (ROOT / package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes(),
    }  # fmt: skip
    return [problem for problem, fine in holds.items() if not fine]


def range_problems(packages: Iterable[Package]) -> list[str]:
    """Return a line for each version range that excludes another package's version, or has no upper end."""
    versions, problems = {package.name: package.version for package in packages}, []
    for package in packages:
        for name, text in package.ours.items():
            where, allowed = f"{package.folder}/pyproject.toml: {text}", Requirement(text).specifier
            if not allowed.contains(versions[name]):
                problems.append(f"{where} leaves out {name} {versions[name]}: edit the range there")
            elif allowed.contains("9999.0.0"):
                problems.append(f"{where} has no upper end: add one, so that a breaking change is seen")
    return problems


def run(*words: str | Path) -> str:
    """Run a command in the repository and return its output. If it fails, the error shows its last lines."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise click.ClickException(f"{' '.join(map(str, words[:4]))} failed: {' | '.join(lines[-3:])}")
    return done.stdout.strip()


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Show, check and create versions of the four packages; nothing is pushed or uploaded."""


@main.command()
def status() -> None:
    """Show versions, last tags, changes since then, and ranges."""
    line = "{:<12}{:<9}{:<20}{:>13}{:>12}  {}"
    click.echo(line.format("package", "version", "last tag", "commits since", "unreleased", "depends on"))
    for package in read_packages():
        tags = run("git", "tag", "--list", "--merged", "HEAD", "--sort=-v:refname", f"{package.name}-v*")
        tag = tags.split("\n")[0] or "none"
        commits = run("git", "rev-list", "--count", f"{tag}..HEAD" if tags else "HEAD", "--", package.folder)
        entries = len(re.findall(r"^- ", package.unreleased, re.MULTILINE))
        ranges = ", ".join(package.ours.values())
        click.echo(line.format(package.name, str(package.version), tag, commits, entries, ranges).rstrip())


@main.command()
@click.option("--dist", type=click.Path(file_okay=False, path_type=Path), help="Keep the sdists and wheels here.")
def check(dist: Path | None) -> None:
    """Check that the packages can be released as they are.

    Changelogs and versions must agree, the ranges between the packages must hold, and twine must accept the sdists
    and wheels that are built. If not, exit with 1 and a line for each reason.
    """
    packages = read_packages()
    if problems := [line for package in packages for line in problems_of(package)] + range_problems(packages):
        raise click.ClickException("\nError: ".join(problems))
    with tempfile.TemporaryDirectory(prefix="gpt2-release-") as temporary:
        out = (dist or Path(temporary)).resolve()
        for package in packages:
            run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, package.folder)
        files = sorted(out.glob("gpt2_*"))
        run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files)
        for file in files:
            click.echo(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


@main.command()
@click.argument("name", metavar="PACKAGE")
@click.argument("level", type=click.Choice(["major", "minor", "patch"]))
@click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")
def cut(name: str, level: str, dry_run: bool) -> None:
    """Create a package's next version locally, as a commit and a tag.

    The changelog's Unreleased section becomes the version's, with today's date.
    """
    packages = {package.name: package for package in read_packages()}
    if name not in packages:
        raise click.UsageError(f"no package {name}: there are {', '.join(packages)}")
    package = packages[name]
    place = ("major", "minor", "patch").index(level)
    numbers = [*package.version.release[:place], package.version.release[place] + 1, 0, 0][:3]
    version = Version(".".join(map(str, numbers)))
    tag, notes = f"{name}-v{version}", package.unreleased
    problems = problems_of(package)
    if run("git", "status", "--porcelain"):
        problems.append("there are changes that are not committed (git status): commit or stash them")
    if run("git", "tag", "--list", tag):
        problems.append(f"the tag {tag} exists")
    if not notes:
        problems.append(f"{package.folder}/CHANGELOG.md has no entry under [Unreleased]: add one to release")
    problems += range_problems((packages | {name: replace(package, version=version)}).values())
    if problems:
        raise click.ClickException("\nError: ".join(problems))
    if dry_run:
        click.echo(f"{tag} would be committed and tagged, with:\n{notes}")
        return
    edits = {
        "pyproject.toml": (f'version = "{package.version}"', f'version = "{version}"'),
        "CHANGELOG.md": ("## [Unreleased]\n", f"## [Unreleased]\n\n## [{version}] - {date.today()}\n"),
    }
    for file, (old, new) in edits.items():
        path = ROOT / package.folder / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    run("git", "commit", "--quiet", "--all", "-m", f"{name} {version}")
    # Headings begin with '#', and git takes such lines out of a message unless told otherwise.
    run("git", "tag", "-a", tag, "--cleanup=whitespace", "-m", f"{name} {version}", "-m", notes)
    click.echo(
        f"{tag} is committed and tagged here. Next:\n"
        f"  python tools/release.py check --dist dist\n"
        f"  git push --atomic origin HEAD {tag}\n"
        f"  python -m twine upload dist/{name.replace('-', '_')}-{version}*\n"
        f"or undo it: git tag -d {tag} && git reset --hard HEAD~1"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {str(error).replace(f'{ROOT}/', '')}")
