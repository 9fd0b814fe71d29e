"""T5, T6, T20: what is damaged, or of another version, is told by name before any of it is used."""

import json
import shutil

import pytest
from train_faults import checkpoint, good_steps, snapshot

from gpt2_train import find_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "generation_config.json",
         "manifest.json")  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}
MANIFESTS = {
    "garbage": b"\xff\xfe{",
    "deep": b"[" * 200_000,
    "a list": b"[]",
    "files is a list": b'{"format_version": 2, "files": []}',
    "no files": b'{"format_version": 2, "files": {}}',
    "a number's place": b'{"format_version": 2, "files": {"model.safetensors": 3}}',
    "negative size": b'{"format_version": 2, "files": {"model.safetensors": {"bytes": -1, "sha256": 5}}}',
    "outside": b'{"format_version": 2, "files": {"../../../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "version is text": b'{"format_version": "new", "files": {}}',
    "an older format": b'{"format_version": 1, "files": {}}',
    "huge number": b'{"format_version": 1e999, "files": {}}',
}


def test_a_damaged_checkpoint_is_named(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run")
    folder, whole = checkpoint(out, 60), checkpoint(runs.whole(), 60)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    cases = [(name, damage) for name in FILES for damage in DAMAGE.values()]
    cases += [("manifest.json", lambda path, content=content: path.write_bytes(content))
              for content in MANIFESTS.values()]  # fmt: skip
    for name, damage in cases:
        damage(folder / name)
        newest, problems = find_checkpoint(out)
        assert newest == checkpoint(out, 57), name
        assert str(folder) in problems[0]
        assert len(problems) == 1 or name == "manifest.json"
        assert name in problems[0] or (folder / name).read_bytes() in MANIFESTS.values()
        shutil.copy(whole / name, folder)
    assert find_checkpoint(out) == (folder, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"])
def test_the_run_goes_back_says_so_and_ends_the_same(tmp_path, runs, name) -> None:
    """Also beside one that is half there, and with a file too many."""
    out = runs.wind_back(tmp_path / "run")
    DAMAGE["cut" if name == "manifest.json" else "a bit"](checkpoint(out, 60) / name)
    (checkpoint(out, 57) / "notes.txt").write_text("of somebody")
    checkpoint(out, 63).mkdir()
    warnings = [line for line in runs.must_finish_as_whole(out).splitlines() if line.startswith("warning: ")]
    assert str(checkpoint(out, 60) / name) in warnings[1]
    assert f"resuming from {checkpoint(out, 57)}" in warnings[1]
    assert good_steps(out) == [54, 57, 60]


def test_a_checkpoint_asked_for_by_name_is_all_or_nothing(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run")
    for step in (57, 60):
        flip(checkpoint(out, step) / "optimizer.safetensors")
    before, folder = snapshot(out / "checkpoints"), checkpoint(out, 57)
    says = [f"Error: cannot resume {folder}", "optimizer.safetensors is damaged"]
    runs.fail(out, resume=folder, code=2, says=says)
    assert snapshot(out / "checkpoints") == before
    assert f"resuming from {checkpoint(out, 54)}" in runs.must_finish_as_whole(out)


def test_nothing_good_left_is_an_error_that_says_what_to_do(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run")
    for step in (54, 57, 60):
        flip(checkpoint(out, step) / "model.safetensors")
    before = snapshot(out)
    says = [f"every checkpoint in {out} is damaged", f"delete {out / 'checkpoints'} to begin again at step 0"]
    runs.fail(out, code=2, says=says)
    assert {**snapshot(out), ".lock": ""} == {**before, ".lock": ""}
    shutil.rmtree(out / "checkpoints")
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("resume", ["auto", "named"])
def test_a_newer_format_is_refused_and_not_passed_over(tmp_path, runs, resume) -> None:
    out = runs.wind_back(tmp_path / "run")
    folder = checkpoint(out, 60)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    before = snapshot(out / "checkpoints")
    runs.fail(out, code=2, says=["newer gpt2-train"], **({} if resume == "auto" else {"resume": folder}))
    assert snapshot(out / "checkpoints") == before


def test_other_versions_of_torch_and_python_are_told(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    said = runs.must_finish_as_whole(out, ("unlike_versions", {}))
    assert "9.9.9" in said
    assert "3.99.0" in said
    assert json.loads((checkpoint(out, 60) / "trainer.json").read_text())["versions"]["torch"] == "9.9.9"
