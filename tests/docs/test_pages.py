"""Run every command and snippet of the pages, in order, on small data and models, in one directory per page.

Commands that need the internet or a cluster are only parsed; `only_read` lists them, each with its reason.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")])
PAGES.append(ROOT / "benchmarks/README.md")
CHECKPOINT = re.compile(r"runs/[\w-]+/checkpoints/step-\d+")
SMALL_MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64}
SMALL_RUN = {"steps": 1, "warmup": 1, "batch_tokens": 64, "seq_len": 64, "eval_every": 0, "model": SMALL_MODEL}
SMALL = [  # replacements that make the work of a snippet small
    (r"range\(\d+\)", "range(1)"), (r"range\(max_steps\)", "range(1)"), (r"batch_size=32", "batch_size=2"),
    (r"seq_len=(512|1024)", "seq_len=64"), (r"max_new_tokens=\d+", "max_new_tokens=3"),
    (r'"out": "runs/a"}', f'"out": "runs/a"}} | {SMALL_RUN}'), (r"tokens=100_000", "tokens=2_000"),
    (r"n_layer=16, n_head=16, n_embd=1024", "n_layer=1, n_head=2, n_embd=32"),
]  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path) -> list[tuple[str, str]]:
    """Return the language and text of each code block, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language, in order."""
    return [text for its, text in fenced(page) if its == language]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in a shell block or after a prompt."""
    lines = []
    for language, block in fenced(page):
        if language == "sh" and not block.startswith("#!"):  # a script is for a cluster
            lines += block.replace("\\\n", " ").splitlines()
        if language == "":
            lines += [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    lexers = [shlex.shlex(line, posix=True, punctuation_chars="|<>") for line in lines]  # these are words, too
    for lexer in lexers:
        lexer.whitespace_split = True
    return [words for words in map(list, lexers) if words]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (page.parent / target).exists()] == []
    tests = [name for name in re.findall(r"`(tests/[\w/.-]+)`", text) if not (ROOT / name).exists()]
    assert tests == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_snippets_run(page, sandbox) -> None:
    (sandbox / "data/pydocs").symlink_to(sandbox / "data/web")
    shutil.copytree(sandbox / "model", sandbox / "my-folder")
    for number, snippet in enumerate(blocks(page, "python")):
        for pattern, small in SMALL:
            snippet = re.sub(pattern, small, snippet)
        code = compile(ast.parse(snippet), f"{name_of(page)}, snippet {number}", "exec")
        exec(code, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_run(page, sandbox, monkeypatch) -> None:
    if ["gpt2-data", "build", "pydocs"] not in [words[:3] for words in commands(page)]:
        (sandbox / "data/pydocs").symlink_to(sandbox / "data/web")
    for words in commands(page):
        with monkeypatch.context() as patch:
            while "=" in words[0]:  # VARIABLE=value before the command
                patch.setenv(*words[0].split("=", 1))
                words = words[1:]
            run(words, patch)


def test_the_kubernetes_job_starts_what_its_pods_are_for(sandbox, monkeypatch) -> None:
    (manifest,) = blocks(ROOT / "docs/training.md", "yaml")
    service, job = yaml.safe_load_all(manifest)
    pods, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    (container,) = pods["containers"]
    words = [word.replace("=/data/", "=data/") for word in container["command"]]
    assert f"--nnodes={job['spec']['completions']}" in words
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in words
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:29500" in words
    assert pods["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods["volumes"]}
    run(words, monkeypatch)


def run(words, patch) -> None:
    """Run a command of ours in this process, or parse it; check the names in the commands of others."""
    program, *rest = [CHECKPOINT.sub("model", word) for word in words]
    for number, word in enumerate(rest[1:], 1):
        if rest[number - 1] == "-m" and word.startswith("runs/") and not Path(word, "checkpoints").exists():
            rest[number] = "model"  # a run that the page does not train
    typed = None
    if program == "echo":
        cut = rest.index("|")
        typed, (program, *rest) = " ".join(rest[:cut]), rest[cut + 1 :]
    if "<" in rest:
        cut = rest.index("<")
        typed, rest = Path(rest[cut + 1]).read_text(), rest[:cut]
    if program == "torchrun":
        cut = rest.index("-m")
        counts = dict(word.lstrip("-").split("=", 1) for word in rest[:cut] if "=" in word)
        program, rest = rest[cut + 1].replace("_", "-"), rest[cut + 2 :]
        if program == "gpt2-train":
            patch.setenv("WORLD_SIZE", str(int(counts.get("nnodes", 1)) * int(counts["nproc_per_node"])))
    if program in ("gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train"):
        of_ours(program, rest, typed)
    elif program == "python":
        of_python(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), words
    elif program == "pip":
        for word in rest[1:]:
            folder, _, extras = word.removesuffix("]").partition("[")
            project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
            assert set(extras.split(",")) - {""} <= set(project.get("optional-dependencies", {})), word
    else:
        assert program == "curl", words  # the one program of others that the pages call


def of_ours(program, words, typed) -> None:
    if "..." in words:  # stands for the options above
        cut = words.index("...")
        words = [*words[:cut], "--data", "data/fineweb-edu", "--out", "runs/more", *words[cut + 1 :]]
    command = import_module(f"{program.replace('-', '_')}.cli").main
    if only_read(program, words):
        return read(command, words)
    words = small(program, words)
    result = CliRunner().invoke(command, words, input=typed)
    line = f"{program} {' '.join(words)}"
    if program == "gpt2-train" and "--dry-run" in words:
        # Exit code 1 means that this machine is too small for the plan.
        assert result.exit_code in (0, 1), line + result.output
        assert "parameters" in result.output, line + result.output
        assert "Error" not in result.output or "memory" in result.output or "GB" in result.output, result.output
    else:
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"


def only_read(program, words) -> bool:
    """Return whether a command cannot run here."""
    verb = words[0]
    if program == "gpt2-data" and verb == "build":  # the internet, or a Ray cluster
        return "--engine" in words or not any(word.startswith(("pydocs", "texts/")) for word in words)
    if program == "gpt2-data" and verb == "convert":  # somebody's own nanoGPT
        return words[1].startswith("~")
    if program == "gpt2-eval":  # the internet
        return verb in ("task", "lm-eval") or "--hf" in words
    return program == "gpt2-train" and ("--tensorboard" in words or "--wandb" in words)  # extras


def small(program, words) -> list[str]:
    """Return the words of a command with options that leave little work, in place of its own."""
    options: dict[str, str] = {}
    if program == "gpt2-train" and "n_layer=4" in words and "--dry-run" not in words:
        options = {"--steps": "2", "--warmup": "1", "--batch-tokens": "512", "--eval-tokens": "512"}
        options |= {"--seq-len": "64", "--num-samples": "1", "--hang-seconds": "0"}
    elif program == "gpt2-train":
        words = [*(word for word in words if word != "--dry-run"), "--dry-run"]
        options = {"--device": "cpu"}
    elif program == "gpt2-model" and words[0] == "generate":
        options = {"--max-new-tokens": "3"}
    elif program == "gpt2-eval" and words[0] == "hellaswag":
        options = {"--data": "hellaswag_val.jsonl", "-d": "cpu"}
    elif program == "gpt2-eval" and words[0] == "loss":
        options = {"--tokens": "5000"}
    for option, value in options.items():
        if option in words:  # an option that is given twice is refused
            words = words[: words.index(option)] + words[words.index(option) + 2 :]
        words = [*words, option, value]
    return words


def read(command, words) -> None:
    """Parse a command line without running it."""
    with command.make_context("", list(words)) as context:
        if isinstance(command, click.Group):
            name, sub, rest = command.resolve_command(context, context._protected_args + context.args)
            sub.make_context(name, rest, parent=context).close()


def of_python(words) -> None:
    if words[0] == "-c":
        subprocess.run([sys.executable, *words], check=True)
        return
    tool = re.fullmatch(r"tools/(\w+)\.py", words[0])
    command = import_module(tool[1]).main
    alternatives = [words[1:]]
    if "|" in words:  # `train | decode | eval`
        cut = words.index("|")
        alternatives = [[word] for word in words[cut - 1 :] if word not in "|"]
    for rest in alternatives:
        if rest == ["list"] or tool[1] == "plot":
            assert CliRunner().invoke(command, rest).exit_code == 0
        else:
            read(command, rest)
