"""T5, T6, T20: what is damaged, or of another version, is told by name before any of it is used."""

import json
import shutil

import pytest
from train_faults import checkpoint, edit_json, good_steps, seal, snapshot

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


def test_the_list_of_files_is_whole(runs) -> None:
    assert {path.name for path in checkpoint(runs.whole(), 60).iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path, runs, name, damage) -> None:
    from gpt2_train import find_checkpoint

    out = runs.copy(tmp_path / "run")
    damage(checkpoint(out, 60) / name)
    found, problems = find_checkpoint(out)
    assert found == checkpoint(out, 57)
    assert len(problems) == 1
    assert str(checkpoint(out, 60) / name) in problems[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"])
def test_the_run_goes_back_says_so_and_ends_the_same(tmp_path, runs, name) -> None:
    out = runs.copy(tmp_path / "run")
    flip(checkpoint(out, 60) / name) if name != "manifest.json" else DAMAGE["cut"](checkpoint(out, 60) / name)
    runs.must_finish_as_whole(out)
    warning = next(line for line in runs.said(out).splitlines() if line.startswith("warning: "))
    assert str(checkpoint(out, 60) / name) in warning
    assert f"going back to {checkpoint(out, 57)}" in warning
    assert good_steps(out) == [54, 57, 60]


def test_two_damaged_ones_and_one_that_is_half_there(tmp_path, runs) -> None:
    out = runs.copy(tmp_path / "run")
    for step in (60, 57):
        flip(checkpoint(out, step) / "model.safetensors")
    checkpoint(out, 63).mkdir()
    runs.must_finish_as_whole(out)
    assert f"going back to {checkpoint(out, 54)}" in runs.said(out)


def test_a_file_too_many_does_no_harm(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    (checkpoint(out, 57) / "notes.txt").write_text("of somebody")
    runs.must_finish_as_whole(out)


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


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_an_absurd_manifest_is_a_damaged_one(tmp_path, runs, content) -> None:
    from gpt2_train import find_checkpoint

    out = runs.copy(tmp_path / "run")
    (checkpoint(out, 60) / "manifest.json").write_bytes(content)
    folder, problems = find_checkpoint(out)
    assert folder == checkpoint(out, 57)
    assert problems


def test_a_checkpoint_asked_for_by_name_is_all_or_nothing(tmp_path, runs) -> None:
    out = runs.copy(tmp_path / "run")
    flip(checkpoint(out, 57) / "optimizer.safetensors")
    before = snapshot(out / "checkpoints")
    assert runs.run(out, resume=checkpoint(out, 57)) == 2
    assert f"Error: cannot resume {checkpoint(out, 57)}" in runs.said(out)
    assert "optimizer.safetensors is damaged" in runs.said(out)
    assert snapshot(out / "checkpoints") == before


def test_nothing_good_left_is_an_error_that_says_what_to_do(tmp_path, runs) -> None:
    out = runs.copy(tmp_path / "run")
    for step in (54, 57, 60):
        flip(checkpoint(out, step) / "model.safetensors")
    before = snapshot(out)
    assert runs.run(out) == 2
    said = runs.said(out)
    assert f"every checkpoint in {out} is damaged" in said
    assert f"delete {out / 'checkpoints'} to begin again at step 0" in said
    assert "Traceback" not in said
    after = snapshot(out)
    assert {name: after[name] for name in before if name != ".lock"} == {
        name: before[name] for name in before if name != ".lock"
    }
    shutil.rmtree(out / "checkpoints")
    runs.must_finish_as_whole(out)


@pytest.mark.parametrize("resume", ["auto", "named"])
@pytest.mark.parametrize("file", ["manifest.json", "trainer.json"])
def test_a_newer_format_is_refused_and_not_passed_over(tmp_path, runs, file, resume) -> None:
    out = runs.copy(tmp_path / "run")
    folder = checkpoint(out, 60)
    edit_json(folder / file, format_version=99)
    if file == "trainer.json":
        seal(folder)
    before = snapshot(out / "checkpoints")
    assert runs.run(out, **({} if resume == "auto" else {"resume": folder})) == 2, runs.said(out)
    assert "newer gpt2-train" in runs.said(out)
    assert snapshot(out / "checkpoints") == before


def test_other_versions_of_torch_and_python_are_told(tmp_path, runs) -> None:
    out = runs.wind_back(tmp_path / "run", 57)
    runs.must_finish_as_whole(out, ("unlike_versions", {}))
    said = runs.said(out)
    assert "9.9.9" in said
    assert "3.99.0" in said
    written = json.loads((checkpoint(out, 60) / "trainer.json").read_text())["versions"]
    assert written["torch"] == "9.9.9"
