"""Build the packages, look into the wheels, and install each in an environment that has nothing else."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release_tree import Package, with_lower

# Imported is what pip put there, not the working tree; every public name is asked for, since most load on demand.
TRY = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
assert module.__file__.startswith(sys.prefix), f"{sys.argv[1]} comes from {module.__file__}"
assert module.__version__ == sys.argv[2], f"{sys.argv[1]}.__version__ is {module.__version__}"
for name in module.__all__:
    getattr(module, name)
"""


def build(package: Package, out: Path) -> Path:
    """Build the sdist, from that the wheel, and return the wheel's path. ValueError: the backend's last line."""
    command: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, package.folder]
    _run(command, f"building {package.name}")
    return out / f"{package.module}-{package.version}-py3-none-any.whl"


def sdist(package: Package, out: Path) -> Path:
    return out / f"{package.module}-{package.version}.tar.gz"


def twine_check(files: Iterable[Path]) -> None:
    """ValueError: a description or a field that the package index would refuse or show badly."""
    _run([sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files], "twine check --strict")


def wheel_problems(package: Package, wheel: Path) -> list[str]:
    """What the wheel lacks of the package's source folder, or has beyond it (tests, say); a line each."""
    info = f"{package.module}-{package.version}.dist-info"
    source = package.folder / "src"
    files = (path for path in (source / package.module).rglob("*") if path.is_file())
    wanted = {str(path.relative_to(source)) for path in files if path.suffix != ".pyc"}
    wanted |= {f"{package.module}/py.typed", f"{info}/licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - names)]
    extra = sorted(name for name in names - wanted if not name.startswith(f"{info}/"))
    problems += [f"{wheel.name} holds {name}, which is no file of src/{package.module}" for name in extra]
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    if description.strip() != (package.folder / "README.md").read_bytes().strip():
        problems.append(f"{wheel.name} does not have README.md as its description")
    return problems


def install_alone(
    package: Package, packages: list[Package], wheels: dict[str, Path], env: Path, pins: Path | None
) -> int:
    """Install a wheel with those below it and what they require, and try its command and its names.

    Args:
        env: where the environment is made.
        pins: a constraints file; pip then fetches what is required. None: it is linked from the environment that
            runs this, only what the requirements reach, so that an import which none of them covers fails here.

    Returns:
        how many distributions from elsewhere the environment has. ValueError: what failed.
    """
    needed = with_lower(package, packages)
    venv.create(env, with_pip=False, symlinks=True)
    python = env / "bin" / "python"
    if not pins:
        link(reached(requirement for other in needed for requirement in other.others), env)
    # pip's resolver refuses ranges, of ours or of others, that do not hold.
    source: list[str | Path] = ["-c", pins] if pins else ["--no-index"]
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *source]
    _run([*pip, *(wheels[other.name] for other in needed)], f"installing {package.name}")
    _run([python, "-I", "-c", TRY, package.module, str(package.version)], f"import {package.module}")
    command = env / "bin" / package.name
    if str(package.version) not in _run([command, "--version"], f"{package.name} --version"):
        raise ValueError(f"{package.name} --version does not say {package.version}")
    if "Usage:" not in _run([command, "--help"], f"{package.name} --help"):
        raise ValueError(f"{package.name} --help does not say how it is used")
    return len(list(env.glob("lib/python*/site-packages/*.dist-info"))) - len(needed)


def reached(requirements: Iterable[Requirement]) -> list[Distribution]:
    """The installed distributions that these requirements bring, theirs included. ValueError: one is not here."""
    found: dict[tuple[str, str], Distribution] = {}  # by name and extra
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key not in found:
                try:
                    found[key] = distribution(requirement.name)
                except PackageNotFoundError:
                    raise ValueError(f"{requirement} is missing: pip install -r requirements-dev.txt") from None
                waiting += [(Requirement(text), wanted) for text in found[key].requires or []]
    return [one for (_, extra), one in found.items() if not extra]


def link(distributions: Iterable[Distribution], env: Path) -> None:
    """Let an environment have these: torch, half a gigabyte, is there at once."""
    target = next(env.glob("lib/python*/site-packages"))
    for one in distributions:
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            place = target / top
            if not place.exists():  # folders of namespace packages are several distributions'
                place.symlink_to(Path(str(one.locate_file(top))).resolve())


def _run(command: list[str | Path], what: str) -> str:
    """Stdout. Its environment has no PYTHON... variables, by which it would find the working tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"{what} failed: {' | '.join(lines[-3:])}")
    return done.stdout
