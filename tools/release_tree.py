"""What the repository says of its releases: the packages' versions and ranges, and their changelogs."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
TITLE = re.compile(r"## \[Unreleased\]|## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)( \[YANKED\])?")


@dataclass(frozen=True)
class Package:
    """What a pyproject.toml says. `ours`: what it requires of this repository; `others`: of the package index."""

    name: str
    folder: Path
    version: Version
    ours: tuple[Requirement, ...]
    others: tuple[Requirement, ...]

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def changelog(self) -> Path:
        return self.folder / "CHANGELOG.md"


@dataclass
class Release:
    """A section of a changelog. `version` and `day` are None for Unreleased; `kinds`: entries of each."""

    version: Version | None
    day: date | None
    lines: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        return sum(self.kinds.values())


def read_packages(root: Path) -> list[Package]:
    """The packages, each after those that it depends on. ValueError: a version that is not three numbers."""
    projects = {
        file: tomllib.loads(file.read_text())["project"] for file in root.glob("packages/*/pyproject.toml")
    }
    names = {project["name"] for project in projects.values()}
    found = {}
    for file, project in sorted(projects.items()):
        name, version = project["name"], project.get("version", "missing")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"{file}: version must be three numbers, like 0.1.0, and is {version}")
        wanted = [Requirement(text) for text in project["dependencies"]]
        ours = tuple(requirement for requirement in wanted if requirement.name in names)
        others = tuple(requirement for requirement in wanted if requirement.name not in names)
        found[name] = Package(name, file.parent, Version(version), ours, others)
    order = TopologicalSorter({p.name: [r.name for r in p.ours] for p in found.values()}).static_order()
    return [found[name] for name in order]


def with_lower(package: Package, packages: list[Package]) -> list[Package]:
    """What of the repository it needs, lowest first, and itself as the last."""
    needed = {package.name}
    for other in reversed(packages):
        if other.name in needed:
            needed.update(requirement.name for requirement in other.ours)
    return [other for other in packages if other.name in needed]


def read_changelog(path: Path) -> list[Release]:
    """The sections of a changelog, newest first. ValueError, with the line, if it does not keep the format."""
    releases: list[Release] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].startswith("# "):
        raise ValueError(f"{path}:1: must be the title, '# Changelog of ...'")
    for number, line in enumerate(lines[1:], 2):
        wrong = _read_line(line, releases)
        if wrong:
            raise ValueError(f"{path}:{number}: {wrong}")
    if any(release.version is None for release in releases[1:]):
        raise ValueError(f"{path}: [Unreleased] must stand once, above all versions")
    released = [(release.version, release.day) for release in releases if release.version and release.day]
    for above, below in pairwise(released):
        if above[0] <= below[0] or above[1] < below[1]:
            raise ValueError(f"{path}: {above[0]} stands above {below[0]}: newest first, by number and by date")
    for release in releases:
        for kind in (kind for kind, entries in release.kinds.items() if not entries):
            raise ValueError(f"{path}: '### {kind}' of {release.version or 'Unreleased'} has no entry")
    return releases


def _read_line(line: str, releases: list[Release]) -> str:
    """Take a line in; what is wrong with it, or nothing."""
    if line.startswith("## "):
        title = TITLE.fullmatch(line)
        if not title:
            return "a section is '## [Unreleased]' or '## [0.1.0] - 2026-11-22'"
        try:
            day = date.fromisoformat(title[2]) if title[2] else None
        except ValueError:
            return f"{title[2]} is no date"
        releases.append(Release(Version(title[1]) if title[1] else None, day))
    elif releases:
        release = releases[-1]
        release.lines.append(line)
        if line.startswith("### "):
            if line[4:] not in KINDS or line[4:] in release.kinds:
                return f"{line!r} must be one of {', '.join(KINDS)}, each once"
            release.kinds[line[4:]] = 0
        elif line.startswith("- ") and release.kinds:
            release.kinds[list(release.kinds)[-1]] += 1
        elif line.strip() and not (line.startswith("  ") and release.entries):
            return "neither '### Added' or the like, nor '- ' below it, nor the next line of an entry"
    return ""


def span(requirement: Requirement) -> str:
    """Its range as people write it, the lower end first: packaging sorts `<` before `>`."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def range_problems(packages: list[Package], cut: Mapping[str, Version] | None = None) -> list[str]:
    """A line for each range between the packages that leaves a version out, or that has no upper end.

    Args:
        cut: versions that are about to be, by package; of the others the tree's count.
    """
    versions = {package.name: package.version for package in packages} | dict(cut or {})
    problems = []
    for package in packages:
        for requirement in package.ours:
            name, version = requirement.name, versions[requirement.name]
            said = f"packages/{package.folder.name}/pyproject.toml: {name}{span(requirement)}"
            if not requirement.specifier.contains(version):
                problems.append(f"{said} leaves out {name} {version}: edit the range there")
            elif requirement.specifier.contains("9999.0.0"):
                problems.append(f"{said} has no upper end, so that a breaking change below would go unseen")
    return problems


def package_problems(root: Path, package: Package) -> list[str]:
    """What is wrong with a package's changelog, version or licence, a line each."""
    where = f"packages/{package.folder.name}"
    problems = []
    try:
        released = [release.version for release in read_changelog(package.changelog) if release.version]
        newest = released[0] if released else "none"
        if newest != package.version:
            problems.append(f"{where}: pyproject.toml has version {package.version}, the changelog {newest}")
    except (ValueError, OSError) as error:
        problems.append(str(error).replace(f"{root}/", ""))
    licence = package.folder / "LICENSE"
    if not licence.is_file() or licence.read_bytes() != (root / "LICENSE").read_bytes():
        problems.append(f"{where}/LICENSE is not the repository's: copy it there")
    return problems
