"""Versions and releases of the four packages: python tools/release.py status | check | cut PACKAGE LEVEL

A package's version is static in its pyproject.toml, its changelog keeps the format of keepachangelog.com, its tags
are called gpt2-model-v0.1.0. Nothing here pushes or uploads.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from datetime import date
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.version import Version

from gpt2_model.command import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
SECTION = re.compile(r"^## \[(Unreleased|\d+\.\d+\.\d+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """What a pyproject.toml says, and its changelog; `ours` is what it requires of this repository."""

    name: str
    folder: Path
    version: Version
    ours: tuple[Requirement, ...]
    changelog: str

    @property
    def unreleased(self) -> str:
        text = self.changelog.partition("## [Unreleased]\n")[2]
        return text.partition("\n## ")[0].strip()


def read_packages() -> list[Package]:
    """The packages, each after those that it depends on."""
    packages = {}
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project.get("version", "missing")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"packages/{name}: version must be three numbers, like 0.1.0, and is {version}")
        required = map(Requirement, project["dependencies"])
        ours = tuple(one for one in required if (ROOT / "packages" / one.name).is_dir())
        changelog = file.with_name("CHANGELOG.md").read_text(encoding="utf-8")
        packages[name] = Package(name, Path("packages", name), Version(version), ours, changelog)
    order = TopologicalSorter({name: [one.name for one in package.ours] for name, package in packages.items()})
    return [packages[name] for name in order.static_order()]


def problems_of(package: Package) -> list[str]:
    """What is wrong with a package's changelog, version or licence, a line each."""
    text, file, problems = package.changelog, package.folder / "CHANGELOG.md", []
    sections = SECTION.findall(text)
    versions = [(Version(name), day) for name, day in sections if name != "Unreleased"]
    if len(sections) != len(re.findall("^## ", text, re.MULTILINE)) or any(not day for _, day in versions):
        problems.append(f"{file}: a section is '## [Unreleased]' or '## [0.1.0] - 2026-11-22'")
    if "Unreleased" in [name for name, _ in sections[1:]]:
        problems.append(f"{file}: [Unreleased] must stand once, above all versions")
    if any(above[0] <= below[0] or above[1] < below[1] for above, below in pairwise(versions)):
        problems.append(f"{file}: the newest version stands first, by number and by date")
    if not versions or versions[0][0] != package.version:
        problems.append(f"{file}: its newest version is not that of pyproject.toml, {package.version}")
    for kind, entries in re.findall(r"^### (.*)\n((?:(?!#).*\n?)*)", text, re.MULTILINE):
        if kind not in KINDS or not re.match(r"\s*- ", entries):
            problems.append(f"{file}: '### {kind}' must be one of {', '.join(KINDS)}, with entries '- ...'")
    if (ROOT / package.folder / "LICENSE").read_bytes() != (ROOT / "LICENSE").read_bytes():
        problems.append(f"{package.folder}/LICENSE is not the repository's: copy it there")
    return problems


def range_problems(packages: list[Package], cut: dict[str, Version]) -> list[str]:
    """A line for each range that leaves a package out, `cut` as it is about to be, or that has no upper end."""
    versions = {package.name: package.version for package in packages} | cut
    problems = []
    for package in packages:
        for requirement in package.ours:
            name, allowed = requirement.name, requirement.specifier
            text = f"{package.folder}/pyproject.toml: {name}{span(requirement)}"
            if not allowed.contains(versions[name]):
                problems.append(f"{text} leaves out {name} {versions[name]}: edit the range there")
            elif allowed.contains("9999.0.0"):
                problems.append(f"{text} has no upper end, so that a breaking change below would go unseen")
    return problems


def span(requirement: Requirement) -> str:
    """The range as people write it, the lower end first: packaging sorts `<` before `>`."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def status_of(package: Package) -> dict[str, Any]:
    """Version, last tag, commits since then, entries under Unreleased, and ranges."""
    tags = run("git", "tag", "--list", "--merged", "HEAD", "--sort=-v:refname", f"{package.name}-v*").splitlines()
    since = f"{tags[0]}..HEAD" if tags else "HEAD"
    return {
        "package": package.name,
        "version": str(package.version),
        "last_tag": tags[0] if tags else "none",
        "commits": int(run("git", "rev-list", "--count", since, "--", package.folder)),
        "unreleased": len(re.findall(r"^- ", package.unreleased, re.MULTILINE)),
        "depends": {requirement.name: span(requirement) for requirement in package.ours},
    }


def refuse(problems: list[str]) -> None:
    """Stop here, with a line for each problem."""
    if problems:
        raise click.ClickException("\nError: ".join(problems))


def run(*words: str | Path) -> str:
    """Run a command in the repository and return what it printed. Its last words are ours where it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise click.ClickException(f"{' '.join(map(str, words[:4]))} failed: {' | '.join(lines[-3:])}")
    return done.stdout.strip()


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Show, check and cut versions of the four packages; nothing is pushed or uploaded."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the table.")
def status(as_json: bool) -> None:
    """Show each package's version, last tag, commits since then, unreleased entries, and ranges."""
    rows = [status_of(package) for package in read_packages()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    line = "{:<12}{:<9}{:<20}{:>13}{:>12}  {}"
    click.echo(line.format("package", "version", "last tag", "commits since", "unreleased", "depends on"))
    for *row, depends in (row.values() for row in rows):
        click.echo(line.format(*row, ", ".join(f"{name} {span}" for name, span in depends.items())).rstrip())


@main.command()
@click.option("--dist", type=click.Path(file_okay=False, path_type=Path), help="Keep the sdists and wheels here.")
def check(dist: Path | None) -> None:
    """Check that the packages can be released as they are; if not, exit 1 with a line for each reason.

    Changelogs and versions agree, ranges between the packages hold, sdists and wheels build, twine accepts them.
    """
    packages = read_packages()
    refuse([line for package in packages for line in problems_of(package)] + range_problems(packages, {}))
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
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
def cut(name: str, level: str, dry_run: bool) -> None:
    """Create a package's next version locally: a commit and an annotated tag.

    The changelog's Unreleased section becomes the version's, with today's date.
    """
    packages = read_packages()
    package = next((package for package in packages if package.name == name), None)
    if package is None:
        raise click.UsageError(f"no package {name}: there are {', '.join(package.name for package in packages)}")
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
        problems.append(f"{package.folder}/CHANGELOG.md has no entry under [Unreleased]: nothing to release")
    refuse(problems + range_problems(packages, {name: version}))
    for other in packages:
        if other.name in [requirement.name for requirement in package.ours] and other.unreleased:
            click.echo(f"Note: {other.name} has unreleased changes; if {name} needs them, cut it first.", err=True)
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
