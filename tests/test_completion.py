"""What a shell offers at Tab, by the line that each package's README has."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = "file"  # click's word for: complete files and folders


def offered(line: str) -> set[str]:
    """What bash gets for a command line whose last word is being typed; PATHS where it is to list files."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    variable = f"_{words[0].upper().replace('-', '_')}_COMPLETE"
    command = Path(sys.executable).parent / words[0]
    environment = os.environ | asked | {variable: "bash_complete"}
    done = subprocess.run([command], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {value if kind == "plain" else kind for kind, value in (row.split(",") for row in done.stdout.split())}


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("gpt2-model ", {"generate", "info", "convert"}),
        ("gpt2-model generate --", {"--model", "--top-k", "--no-compile"}),
        ("gpt2-model generate --dtype ", {"auto", "fp32", "bf16", "int8"}),
        ("gpt2-model generate -m ", {PATHS}),
        ("gpt2-model info ", {PATHS}),
        ("gpt2-data build --out ", {PATHS}),
        ("gpt2-data build ", {PATHS}),
        ("gpt2-data convert in out --to ", {"npy", "llmc", "uint16", "nanogpt", "megatron", "arrow"}),
        ("gpt2-eval task ", {"lambada", "wikitext2"}),
        ("gpt2-eval loss --data ", {PATHS}),
        ("gpt2-eval hellaswag -m ", {PATHS}),
        ("gpt2-eval hellaswag --out ", {PATHS}),
        ("gpt2-train --", {"--data", "--recipe", "--optimizer", "--no-shard-optimizer", "--help-all"}),
        ("gpt2-train --recipe ", {"124M", "350M", "774M", "1558M", "GPT-3-125M"}),
        ("gpt2-train --data ", {PATHS}),
        ("gpt2-train --recipe 124M --out ", {PATHS}),
        ("gpt2-train --config not-there.toml --optimizer ", {"adamw", "muon"}),
    ],
)
def test_offers(line, there) -> None:
    assert there <= offered(line)


def test_offers_only_what_begins_so() -> None:
    assert offered("gpt2-train --opt") == {"--optimizer"}
    assert offered("gpt2-data v") == {"verify"}


@pytest.mark.parametrize("package", ["gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train"])
def test_is_quick_and_the_readme_s_line_is_right(package) -> None:
    """Half a second of processor time would be torch; it takes about 0.15."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--version" in offered(f"{package} --")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5

    line = re.search(r'`(eval "\$\(_[^`]*)`', (ROOT / "packages" / package / "README.md").read_text())
    assert line
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bash = [shutil.which("bash") or "bash", "--norc", "-c", f"{line[1]}; complete -p {package}"]
    done = subprocess.run(bash, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path})
    assert done.stdout.endswith(f" {package}\n"), done.stderr
