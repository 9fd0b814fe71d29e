"""Other ways to the same environment: conda, containers, pre-commit. What they name is there and fits."""

import json
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKE = (ROOT / "Makefile").read_text()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(COPY, its words), (RUN, its command), and so on."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole if line)]


def test_conda_installs_what_make_quickstart_does() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    installed = re.search(r"^\$\(VENV\)/\.installed:.*\n\t\$\(BIN\)/pip install --quiet (.*)$", MAKE, re.MULTILINE)
    assert pip == {"pip": [installed[1]]}
    assert [re.split("[=<>]", name)[0] for name in conda] == ["python", "pip"]  # all else has the pins of pip
    assert "-c constraints.txt" in (ROOT / "requirements.txt").read_text().splitlines()
    python = next(name for name in conda if name.startswith("python="))
    for file in ROOT.glob("packages/*/pyproject.toml"):
        assert f'requires-python = ">={python.removeprefix("python=")}"' in file.read_text()


def test_the_dockerfiles_differ_in_torch_alone_and_copy_what_there_is_and_are_not_root() -> None:
    cpu, cuda = (instructions(ROOT / "docker" / f"{name}.Dockerfile") for name in ("cpu", "cuda"))
    cpu = [line for line in cpu if line[0] != "ARG"]
    assert [pair for pair in zip(cpu, cuda, strict=True) if pair[0] != pair[1]] == [
        (("RUN", 'pip install --index-url "$TORCH_INDEX" torch'), ("RUN", "pip install torch"))
    ]
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = [word for name, rest in cuda if name == "COPY" for word in rest.split()[:-1]]
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch(name, line) for name in copied for line in ignore[1:] if not line.startswith("!"))
    assert [rest for name, rest in cuda if name == "USER"] == ["1000"]


@pytest.mark.slow
def test_the_dockerfiles_pip_commands_are_good(tmp_path) -> None:
    """pip resolves each, with the pins, by what is installed here, and installs nothing."""
    lines = instructions(ROOT / "docker" / "cuda.Dockerfile")
    installs = set()
    for words in [shlex.split(rest) for name, rest in lines if name == "RUN" and "pip " in rest]:
        assert words[:2] == ["pip", "install"]
        here = ["--dry-run", "--no-index", "--no-build-isolation", "--report", tmp_path / "report"]
        pip = [sys.executable, "-m", "pip", "install", *here, *words[2:]]
        environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
        subprocess.run(pip, cwd=ROOT / "packages", env=environment, check=True)
        report = json.loads((tmp_path / "report").read_text())
        installs |= {item["metadata"]["name"] for item in report["install"]}
    assert installs == {"gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train"}


def test_pre_commit_runs_the_checks_of_make() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}  # nothing is fetched
    hooks = [hook["entry"].removesuffix(" --force-exclude") for repo in config["repos"] for hook in repo["hooks"]]
    recipes = re.findall(r"^(?:lint|check):.*\n((?:\t.*\n)+)", MAKE, re.MULTILINE)
    check = "".join(recipes).splitlines()
    assert hooks == [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in check]


def test_citation_is_of_the_licence_s_authors() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text()
