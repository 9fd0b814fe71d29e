"""The same bytes whoever builds them: shown on more than 50,000 documents, by hash."""

import dataclasses
import os
import random
import subprocess
import sys

import pytest
from fineweb_like import OPTIONS, arguments, hashes

from gpt2_data import BuildConfig, build, verify
from gpt2_data import gigatoken as fast

CLI = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]


@pytest.mark.parametrize(
    "options", [{"workers": 2}, pytest.param({"workers": 5}, marks=pytest.mark.long), {"tokenizer": "gigatoken"}]
)
def test_any_number_of_workers_and_either_tokenizer(corpus, expected, tmp_path, options):
    if "tokenizer" in options:
        pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
        fast.find_proof()
    options = {"workers": 1, **options, **OPTIONS}
    result = build(BuildConfig([corpus / "*.parquet"], tmp_path / "out", **options))
    assert result.tokenizer == options.get("tokenizer", result.tokenizer)
    assert hashes(tmp_path / "out") == expected
    assert result.shards == len(expected) // 2
    assert verify(tmp_path / "out", "full").ok


def test_parts_at_the_same_time(corpus, expected, tmp_path):
    """Three processes that know of each other only by the folder; the last to end cuts the shards."""
    out = tmp_path / "out"
    commands = [[*CLI, *arguments(corpus, out, "--part", f"{i}/3", "--workers", "1")] for i in (1, 2, 3)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parts = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [part.communicate(timeout=120) for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0], outputs
    assert sum("other parts are not finished yet" in output for output, _ in outputs) == 2
    (last,) = (output for output, _ in outputs if "other parts" not in output)
    assert " MB/s with " in last  # of its own units, not of the cutting alone
    assert hashes(out) == expected


def test_parts_that_die_and_come_back(corpus, expected, tmp_path):
    """Each part is killed at a random instant until it has ended; none waits for another."""
    rng = random.Random(5)
    out = tmp_path / "out"
    waiting, kills = [1, 2, 3, 4], 0
    while waiting:
        number = rng.choice(waiting)
        command = [*CLI, *arguments(corpus, out, "--part", f"{number}/4", "--workers", "1")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            # The first while Python starts: a fast machine may have done with a part in half a second.
            until = rng.uniform(0.3, 1.5) if kills else 0.1
            output, _ = process.communicate(timeout=until if kills < 6 else 120)
            assert process.returncode == 0, output
            waiting.remove(number)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills
    assert hashes(out) == expected


def test_one_build_at_a_time(corpus, tmp_path):
    config = BuildConfig([corpus / "*.parquet"], tmp_path / "out", workers=1, **OPTIONS)

    def second(_, done, *more):
        for part in (None, (1, 2)) if done else ():
            who = f"another build is running in {tmp_path}/out .process {os.getpid()} on "
            with pytest.raises(ValueError, match=who):
                build(dataclasses.replace(config, part=part))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, second)
    with pytest.raises(ValueError, match="unfinished build of another source"):
        build(dataclasses.replace(config, sources=[corpus / "000*.parquet"], part=(1, 2)))
