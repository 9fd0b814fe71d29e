"""The pages, their code blocks, and the commands in their shell blocks."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")])
PAGES.append(ROOT / "benchmarks/README.md")


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
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>")  # these are words of their own
    lexer.whitespace_split = True
    return list(lexer)
