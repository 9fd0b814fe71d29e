"""What a shell offers at Tab, by the line that each package's README has."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

ROOT = Path(__file__).parent.parent
PATHS = "file"  # click's word for: complete files and folders


def offered(line: str) -> set[str]:
    """What a shell gets for a command line whose last word is being typed; PATHS where it is to list files."""
    program, *words, incomplete = line.split(" ")
    command = import_module(f"{program.replace('-', '_')}.cli").main
    items = ShellComplete(command, {}, program, "").get_completions(words, incomplete)
    return {item.value if item.type == "plain" else item.type for item in items}


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
        ("gpt2-train --opt", {"--optimizer"}),
        ("gpt2-data v", {"verify"}),
        ("gpt2-train --config not-there.toml --optimizer ", {"adamw", "muon"}),
    ],
)
def test_offers(line, there) -> None:
    assert there <= offered(line)
    assert all(word.startswith(line.rpartition(" ")[2]) for word in offered(line) - {PATHS})


@pytest.mark.parametrize("package", ["gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train"])
def test_is_quick_and_the_readme_s_line_is_right(package) -> None:
    """Half a second of processor time would be torch; it takes about 0.15."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = {"PATH": path, "COMP_WORDS": f"{package} --", "COMP_CWORD": "1"}
    variable = f"_{package.upper().replace('-', '_')}_COMPLETE"
    before = os.times()
    options = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run([package], env=os.environ | asked | {variable: "bash_complete"}, **options)
    after = os.times()
    assert "plain,--version\n" in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5

    line = re.search(r'`(eval "\$\(_[^`]*)`', (ROOT / "packages" / package / "README.md").read_text())
    assert line
    bash = [shutil.which("bash") or "bash", "--norc", "-c", f"{line[1]}; complete -p {package}"]
    done = subprocess.run(bash, env=os.environ | {"PATH": path}, **options)
    assert done.stdout.endswith(f" {package}\n"), done.stderr
