"""A disk that fills up or cannot be written, a folder that another build works in."""

import json
import shutil
import subprocess
import sys

import pytest
from fineweb_like import arguments, hashes

# In a mount namespace of its own: a small disk, filled by somebody else in the middle of the build; then room is
# made; then it is mounted for reading only.
SCRIPT = """
import contextlib, json, pathlib, subprocess, sys, time
disk, saved = map(pathlib.Path, sys.argv[1:3])
command = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]
build = command + sys.argv[3:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], check=True)
report = {}

def run(name, arguments, meanwhile=lambda: None):
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    meanwhile()
    out, err = process.communicate(timeout=120)
    report[name] = [process.returncode, out, err]

def fill():
    while not (disk / "out" / ".build" / "unit-00003.json").exists():
        time.sleep(0.005)
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

run("full", build, fill)
report["left"] = sorted(str(path.relative_to(disk)) for path in disk.rglob("*"))
run("still full", build)
(disk / "filler").unlink()
run("room", build)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
run("verify", command + ["verify", str(disk / "out"), "--level", "full"])
run("read-only", [text.replace(str(disk / "out"), str(disk / "other")) for text in build])
subprocess.run(["cp", "-r", disk / "out", saved], check=True)
print(json.dumps(report))
"""


def own_mounts():
    """Whether this user may mount a disk of its own."""
    return (
        shutil.which("unshare") and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not own_mounts(), reason="no mount namespace for this user, so no small disk to fill")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills_up(corpus, expected, tmp_path, workers):
    disk, saved = tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", SCRIPT, str(disk), str(saved)]
    command += arguments(corpus, disk / "out", "--workers", workers, "--tokenizer", "tiktoken")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    code, _, error = report["full"]
    assert code == 1
    assert error.startswith(f"Error: {disk}/out/")
    assert error.endswith("No space left on device: make room and run the same command again\n")
    assert error.count("\n") == 1
    unwanted = (".bin", ".docs", "dataset.json")
    assert not [name for name in report["left"] if ".tmp-" in name or name.endswith(unwanted)]
    assert [name for name in report["left"] if name.endswith("unit-00003.json")]
    code, _, error = report["still full"]
    assert (code, error.count("\n"), "make room" in error) == (1, 1, True)
    assert report["room"][0] == 0, report["room"]
    assert hashes(saved) == expected
    size = sum(path.stat().st_size for path in saved.iterdir() if path.suffix in (".bin", ".docs")) / 1e6
    said = f"{disk}/out: {len(expected) - 1} files, {size:.1f} MB: nothing wrong (full)\n"
    assert report["verify"] == [0, said, ""]
    code, _, error = report["read-only"]
    assert (code, error) == (1, f"Error: {disk}/other: Read-only file system\n")
