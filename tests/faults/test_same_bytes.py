"""The same bytes whoever builds them: shown on more than 50,000 documents, by hash."""

import random
import subprocess
import sys

import pytest
from fineweb_like import OPTIONS, arguments, hashes

from gpt2_data import BuildConfig, build, verify
from gpt2_data import gigatoken as fast

CLI = [sys.executable, "-c", "from gpt2_data.cli import main; main()"]


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.long)])
def test_any_number_of_workers(corpus, expected, tmp_path, workers):
    result = build(BuildConfig([corpus / "*.parquet"], tmp_path / "out", workers=workers, **OPTIONS))
    assert hashes(tmp_path / "out") == expected
    assert result.shards == len(expected) // 2
    assert verify(tmp_path / "out", "full").ok


def test_either_tokenizer(corpus, expected, tmp_path):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    fast.find_proof()
    result = build(
        BuildConfig([corpus / "*.parquet"], tmp_path / "out", workers=1, tokenizer="gigatoken", **OPTIONS)
    )
    assert result.tokenizer == "gigatoken"
    assert hashes(tmp_path / "out") == expected


def test_parts_at_the_same_time(corpus, expected, tmp_path):
    """Three processes that know of each other only by the folder; the last to end cuts the shards."""
    out = tmp_path / "out"
    parts = [
        subprocess.Popen(
            [*CLI, *arguments(corpus, out, "--part", f"{i}/3", "--workers", "1")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (1, 2, 3)
    ]
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


def test_a_part_is_refused_beside_a_whole_build(corpus, tmp_path):
    out = tmp_path / "out"

    def second(_, done, *more):
        if not done:
            return
        for part in None, (1, 2):
            with pytest.raises(ValueError, match="another build is running in .*process"):
                build(BuildConfig([corpus / "*.parquet"], out, workers=1, part=part, **OPTIONS))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(BuildConfig([corpus / "*.parquet"], out, workers=1, **OPTIONS), second)
    with pytest.raises(ValueError, match="unfinished build of another source"):
        build(BuildConfig([corpus / "000*.parquet"], out, workers=1, part=(1, 2), **OPTIONS))
