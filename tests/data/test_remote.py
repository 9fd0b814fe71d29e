"""Parquet on the hub read without a download, against a hub on this machine."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import FIRST, Drop, NoRanges, Refuse

from gpt2_data.sources import remote
from gpt2_data.sources.hub import HubSource, hub_file, list_files


def write(path, rows=3000, group=1000, **columns):
    texts = [f"document {i} " * 20 for i in range(rows)]
    table = pa.table({"text": texts, "token_count": np.arange(rows, dtype=np.int64)} | columns)
    pq.write_table(table, path, row_group_size=group)
    return path


def listed(server, *files):
    server.add("a/b", {path.name: path for path in files})
    return list(list_files(HubSource("a/b")).files)


def test_a_footer_takes_two_requests(server, tmp_path):
    """A footer beyond what a reader asks for at first, as FineWeb-Edu's 3 MB."""
    path = write(tmp_path / "a.parquet", 4000, 2)
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little")
    assert footer > 300_000
    (file,) = listed(server, path)
    groups = remote.row_groups(file)
    metadata = pq.read_metadata(path)
    assert groups == [(2, metadata.row_group(i).column(0).total_uncompressed_size) for i in range(2000)]
    assert len(server.asked("a.parquet", store=True)) == 2
    assert len(server.asked("resolve")) == 1
    assert server.sent("a.parquet") < footer + 65536 + 100

    with remote.RemoteFile(file) as opened:
        table = pq.ParquetFile(opened).read_row_group(7)
    assert table == pq.read_table(path)[14:16]


def test_token_counts_are_read_by_themselves(server, tmp_path):
    """One request to the hub a file; of the store, only footers and the column; threads share what they know."""
    names = [
        write(tmp_path / f"{i}.parquet", rows=20_000 + i, group=500, url=["u"] * (20_000 + i)) for i in range(3)
    ]
    files = listed(server, *names)
    server.requests.clear()
    seen = []
    counts = list(remote.token_counts(files, threads=4, progress=seen.append))
    assert counts == [n * (n - 1) // 2 for n in (20_000, 20_001, 20_002)]
    assert sum(seen) == 40 + 41 + 41
    assert len(server.asked(store=False)) == 3
    assert len(server.asked(store=True)) <= 122 + 2 * 3
    assert all(request.range for request in server.requests)
    footers = sum(int.from_bytes(path.read_bytes()[-8:-4], "little") for path in names)
    assert server.sent("") < footers + 3 * 65536 + 3 * 20_000 * 12
    assert sum(path.stat().st_size for path in names) > 0


def test_no_token_counts(server, tmp_path):
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"text": ["a"]}), plain)
    strange = tmp_path / "strange.parquet"
    pq.write_table(pa.table({"text": ["a"], "token_count": ["5"]}), strange)
    nulls = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "token_count": pa.array([None, 5], pa.int32())}), nulls)
    files = {file.path: file for file in listed(server, plain, strange, nulls)}
    asked = [files["plain.parquet"], files["nulls.parquet"], files["strange.parquet"]]
    assert list(remote.token_counts(asked)) == [None, 5, None]
    assert list(remote.token_counts([])) == []


def test_a_signed_link_is_renewed(server, tmp_path):
    (file,) = listed(server, write(tmp_path / "a.parquet"))
    server.link_seconds = 0.3
    opened = remote.RemoteFile(file)
    assert opened.read(4) == b"PAR1"
    time.sleep(0.35)
    server.link_seconds = 100
    opened.seek(-4, 2)
    assert opened.read() == b"PAR1"
    assert opened.read() == b""
    assert len(server.asked("resolve")) == 2
    assert len(server.asked("cdn")) == 3  # the one that was refused among them


def test_reads_outlast_faults(server, tmp_path):
    path = write(tmp_path / "a.parquet")
    (file,) = listed(server, path)
    server.chunk = 1000
    server.faults = [
        Refuse(status=503),
        Drop(at=10_000),
        Drop(at=0),
        Refuse(store=False, path="resolve", status=500),
    ]
    assert remote.RemoteFile(file).read() == path.read_bytes()
    assert server.sent("a.parquet") == path.stat().st_size  # what had arrived was not asked for again
    server.faults = [NoRanges(times=5)]
    with pytest.raises(OSError, match="sends no ranges of a file: download it instead"):
        remote.RemoteFile(file).read(10)


def test_parquet_that_cannot_be_used(server, tmp_path):
    numbers, other, words, broken = (
        tmp_path / f"{name}.parquet" for name in ("numbers", "other", "words", "broken")
    )
    pq.write_table(pa.table({"text": [1, 2]}), numbers)
    pq.write_table(pa.table({"n": [{"a": 1, "b": 2}], "body": ["x"]}), other)
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), words)
    broken.write_bytes(b"this is no Parquet file")
    files = {file.path: file for file in listed(server, numbers, other, words, broken)}
    for name, message in {
        "numbers.parquet": "numbers.parquet: column 'text' holds int64, not strings",
        "other.parquet": "other.parquet: no column 'text'; the columns are n, body",
        "broken.parquet": "broken.parquet: not a readable Parquet file",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            remote.row_groups(files[name])
        assert "\n" not in str(error.value)
    assert remote.row_groups(files["other.parquet"], "body")[0][0] == 1
    assert remote.row_groups(files["words.parquet"])[0][0] == 3  # a dictionary of strings, as in a local file
    with pytest.raises(OSError, match=r"gone.parquet: no such file \(HTTP 404\)"):
        remote.row_groups(hub_file("a/b", FIRST, "gone.parquet", 100, None))
