"""Large files to disk, whatever happens on the way, against a hub on this machine."""

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import FIRST, Drop, NoRanges, Refuse, Short, Spoil, Stall, until
from huggingface_hub import constants

import gpt2_data
from gpt2_data.sources import download, hub
from gpt2_data.sources.download import Downloader, WebFile, download_file
from gpt2_data.sources.hub import HubSource, list_files, tinyshakespeare

SIZE = 3_000_000
CONTENT = random.Random(0).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = random.Random(1).randbytes(SIZE)


@pytest.fixture
def file(server):
    server.add("a/b", {"data/big.parquet": CONTENT})
    return list_files(HubSource("a/b")).files[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fetching(server, folder, before=""):
    """A process that fetches the file."""
    code = (
        f"import sys\n{before}\nfrom pathlib import Path\n"
        "from gpt2_data.sources import download, hub\ndownload.FIRST_WAIT = 0.01\n"
        f"file = hub.hub_file('a/b', {FIRST!r}, 'data/big.parquet', {SIZE}, {SHA256!r})\n"
        f"try:\n    print(download.download_file(file, Path({str(folder)!r})))\n"
        "except OSError as error:\n    sys.exit(f'{type(error).__name__} {error.filename}: {error}')\n"
    )
    return server.start(code)


def ranges(server):
    return [request.range for request in server.asked("cdn")]


def test_a_file_arrives_and_is_known_again(server, file, tmp_path):
    seen = []
    path = download_file(file, tmp_path, seen.append)
    assert path == tmp_path / "data" / "big.parquet"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["big.parquet", "big.parquet.json", "big.parquet.lock"]
    receipt = json.loads((tmp_path / "data" / "big.parquet.json").read_text())
    assert (receipt["size"], receipt["sha256"], receipt["url"]) == (SIZE, SHA256, file.url)
    assert seen[-1] == SIZE
    assert seen == sorted(seen)
    assert len(server.asked("resolve")) == 1  # the hub limits the rate of these

    server.requests.clear()
    assert download_file(file, tmp_path) == path
    (tmp_path / "data" / "big.parquet.json").unlink()  # killed before it was written: hashed, not fetched
    assert download_file(file, tmp_path) == path
    assert download.is_done(path, file)
    assert server.requests == []

    # It changed on the disk: in its bytes, or in its size.
    path.write_bytes(OTHER)
    assert not download.is_done(path, file)
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1])
    assert download_file(file, tmp_path).read_bytes() == CONTENT


def test_killed_and_resumed_in_another_process(server, file, tmp_path):
    """Bytes that were on the disk when kill -9 came are not sent again."""
    server.bytes_a_second, server.chunk = 4e6, 20_000
    part = tmp_path / "data" / "big.parquet.part"
    for _ in range(2):
        have = part.stat().st_size if part.exists() else 0
        process = fetching(server, tmp_path)
        until(lambda have=have: part.exists() and part.stat().st_size > have + 400_000)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert names(part.parent) == ["big.parquet.lock", "big.parquet.part"]
    server.bytes_a_second = None
    have = part.stat().st_size
    assert 800_000 < have < SIZE
    assert part.read_bytes() == CONTENT[:have]
    server.requests.clear()
    out, err = fetching(server, tmp_path).communicate()
    assert Path(out.strip()).read_bytes() == CONTENT, err
    assert ranges(server) == [f"bytes={have}-"]
    assert server.sent("big.parquet") == SIZE - have


@pytest.mark.parametrize(
    "faults",
    [
        [Drop(at=1_000_000), Drop(at=0), Drop(at=500_000)],
        [Refuse(status=503), Refuse(status=500), Refuse(store=False, path="resolve", status=502)],
        [Drop(at=1_000_000), Short()],
        [Drop(at=2_000_000), Refuse(status=429, headers={"Retry-After": "0"})],
        [Stall(at=100_000)],  # for longer than its link is good
    ],
)
def test_what_arrived_before_a_fault_is_not_asked_for_again(server, file, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(download, "READ_TIMEOUT", 1.0)
    server.faults, server.chunk, server.link_seconds = faults, 10_000, 0.2
    before = time.monotonic()
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    assert time.monotonic() - before < 5
    assert server.sent("big.parquet") == SIZE
    assert not any(fault.times for fault in faults)


def test_patience_ends(server, file, tmp_path, monkeypatch):
    server.faults = [Refuse(status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(OSError, match=r"HTTP 429 and asks to wait 86400 seconds; gave up at try 1 after"):
        download_file(file, tmp_path)
    monkeypatch.setattr(download, "PATIENCE", 0.3)
    server.faults = [Drop(at=1000), Drop(at=0, times=10_000)]
    with pytest.raises(OSError, match="big.parquet: .*broke.*; gave up at try .* seconds: run the same command"):
        download_file(file, tmp_path)
    assert (tmp_path / "data" / "big.parquet.part").read_bytes() == CONTENT[:1000]


def test_wrong_content_and_a_server_without_ranges_start_over(server, file, tmp_path):
    server.faults = [Spoil()]
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    assert server.sent("big.parquet") == 2 * SIZE
    server.requests.clear()
    server.faults = [Drop(at=1_000_000), NoRanges()]
    assert download_file(file, tmp_path / "other").read_bytes() == CONTENT
    assert ranges(server) == ["bytes=0-", "bytes=1000000-", "bytes=0-"]


@pytest.mark.parametrize(
    ("faults", "size", "message"),
    [
        ([Spoil()], SIZE, f"SHA-256 is {hashlib.sha256(bytes(SIZE)).hexdigest()}, should be {SHA256}"),
        ([Drop(at=1_000_000), NoRanges()], SIZE, "the server cannot send the file from byte 1,000,000 on"),
        ([], SIZE - 1, "the file has 3,000,000 bytes, should have 2,999,999"),
        ([], SIZE + 1, "the file has 3,000,000 bytes, should have 3,000,001"),
    ],
)
def test_what_stays_wrong_is_given_up(server, file, tmp_path, faults, size, message):
    server.faults = [replace(fault) for fault in 3 * faults]
    with pytest.raises(OSError, match=f"parquet: {message}; given up after 3 downloads"):
        download_file(replace(file, size=size), tmp_path)
    assert names(tmp_path / "data") == ["big.parquet.lock"]
    assert len(server.asked("cdn")) == max(3, 3 * len(faults))


def test_a_part_of_another_file_is_never_spliced(server, file, tmp_path):
    """Not by a part that an earlier process left, nor where the file changes between two connections."""
    part = tmp_path / "data" / "big.parquet.part"
    part.parent.mkdir()
    for wrong in (OTHER[:1_000_000], OTHER + b"more", CONTENT + b"more", OTHER, b""):
        part.write_bytes(wrong)
        path = download_file(file, tmp_path)
        assert path.read_bytes() == CONTENT
        path.unlink()
        (part.parent / "big.parquet.json").unlink()

    small = WebFile(f"{server.url}/page", "small.txt", SIZE, None)
    (tmp_path / "small.txt.part").write_bytes(OTHER[:1000])  # without a hash nothing could tell
    server.pages["page"] = OTHER

    # Another file appears behind the same address while the first is on its way.
    server.faults = [Drop(store=False, path="page", at=100_000)]
    path = download_file(small, tmp_path, lambda done: server.pages.update(page=CONTENT))
    assert path.read_bytes() == CONTENT
    assert [request.range for request in server.asked("page")] == ["bytes=0-", "bytes=0-"]


@pytest.mark.parametrize(
    ("store", "status", "headers", "message"),
    [
        (False, 401, {}, "not allowed: log in by `hf auth login` or set HF_TOKEN, with an account"),
        (False, 403, {"X-Error-Code": "GatedRepo"}, "gated: ask for access on the dataset's page, then log in"),
        (True, 403, {}, r"not allowed: .*\(HTTP 403\)"),
        (False, 404, {}, r"no such file \(HTTP 404\)"),
        (True, 418, {}, r"refused \(HTTP 418\)"),
    ],
)
def test_refusals_are_final(server, file, tmp_path, store, status, headers, message):
    server.requests.clear()
    server.faults = [Refuse(store=store, status=status, headers=headers, times=100)]
    with pytest.raises(OSError, match=message) as error:
        download_file(file, tmp_path)
    assert str(error.value).startswith(file.url)
    assert "\n" not in str(error.value)
    assert "Signature" not in str(error.value)
    assert len(server.requests) <= 2


def test_the_token_goes_to_the_hub_alone(server, tmp_path, monkeypatch, caplog, capfd):
    """In a listing, in a download, and where a file is read by ranges."""
    caplog.set_level(0)
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "a.parquet")
    server.add("a/b", {"a.parquet": tmp_path / "a.parquet"})
    server.private.add("a/b")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (file,) = list_files(HubSource("a/b")).files
    server.faults = [Drop(at=100), Refuse(status=429, headers={"Retry-After": "0"})]
    download_file(file, tmp_path / "out")
    assert hub.row_groups(file)[0][0] == 1000
    sent = {(request.store, request.headers.get("authorization")) for request in server.requests}
    assert sent == {(False, "Bearer secret"), (True, None)}
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_a_full_disk(server, file, tmp_path):
    """A limit on the size of files stands in: the same error at the same place."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    _, err = fetching(server, tmp_path, limit).communicate()
    part = tmp_path / "data" / "big.parquet.part"
    assert err.startswith(f"OSError {part}: [Errno 27] File too large"), err
    assert part.read_bytes() == CONTENT[:1_000_000]
    assert download_file(file, tmp_path).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=0-", "bytes=1000000-"]


def test_several_processes_fetch_a_file_once(server, file, tmp_path):
    server.bytes_a_second = 6e6
    for process in [fetching(server, tmp_path) for _ in range(3)]:
        out, err = process.communicate()
        assert out.strip() == str(tmp_path / "data" / "big.parquet"), err
    assert server.sent("big.parquet") == SIZE
    assert (tmp_path / "data" / "big.parquet").read_bytes() == CONTENT


@pytest.fixture
def files(server, tmp_path):
    server.add("c/d", {f"{i}.parquet": bytes([i]) * 100_000 for i in range(5)})
    return [(file, tmp_path) for file in list_files(HubSource("c/d")).files]


def test_no_more_are_there_than_asked_for(server, files, tmp_path):
    with Downloader(files, ahead=2, delete=True) as downloader:
        assert downloader.bytes_total == 500_000
        for i, path in enumerate(downloader.files):
            until(lambda path=path: downloader.ready(path))
            until(lambda i=i: downloader.bytes_done == min(i + 2, 5) * 100_000)
            time.sleep(0.05)
            there = [name for name in names(tmp_path) if name.endswith((".parquet", ".part"))]
            assert there == [f"{j}.parquet" for j in range(i, min(i + 2, 5))]
            assert path.read_bytes() == bytes([i]) * 100_000
            downloader.release(path)
    assert names(tmp_path) == [f"{i}.parquet.lock" for i in range(5)]


def test_all_are_fetched_where_none_is_deleted(server, files, tmp_path):
    download_file(*files[0])
    with Downloader(files) as downloader:
        until(lambda: all(downloader.ready(path) for path in downloader.files))
        downloader.release(next(iter(downloader.files)))
        assert downloader.bytes_done == downloader.bytes_total
    assert len(server.asked("cdn")) == len(list(tmp_path.glob("*.parquet"))) == 5


def test_its_error_comes_to_the_caller(server, files):
    server.faults = [Refuse(store=False, path="2.parquet", status=404, times=10)]
    with Downloader(files) as downloader:
        paths = list(downloader.files)
        for path in paths[2], paths[4]:
            with pytest.raises(OSError, match="2.parquet: no such file"):
                until(lambda path=path: downloader.ready(path))
        assert downloader.ready(paths[0])


def test_closing_in_the_middle(server, file, tmp_path):
    """It returns soon: while bytes come, in a wait, while another has the lock, and while a server is silent."""
    part = tmp_path / "data" / "big.parquet.part"
    threads = []

    @contextlib.contextmanager
    def closed_soon():
        with Downloader([(file, tmp_path)]) as downloader:
            threads.append(downloader._thread)
            yield downloader
            before = time.monotonic()
        assert time.monotonic() - before < 2.5

    server.bytes_a_second, server.chunk = 2e6, 10_000
    with closed_soon() as downloader:
        until(lambda: downloader.bytes_done > 200_000)
        assert not downloader.ready(tmp_path / file.path)
    assert not threads[0].is_alive()
    have = part.stat().st_size
    assert have > 200_000
    assert part.read_bytes() == CONTENT[:have]

    server.faults = [Refuse(status=429, headers={"Retry-After": "1"})]
    with closed_soon():
        until(lambda: not server.faults[0].times)
        with closed_soon():
            time.sleep(0.1)
    until(lambda: not any(thread.is_alive() for thread in threads))

    have, server.faults, server.bytes_a_second = part.stat().st_size, [Stall(at=1000)], None
    with closed_soon() as downloader:
        until(lambda: downloader.bytes_done > have)
    server.stopping.set()
    until(lambda: not threads[-1].is_alive())
    assert download_file(file, tmp_path).read_bytes() == CONTENT


def test_fetch_from_an_address_and_from_the_hub(server, file, tmp_path, monkeypatch):
    """What other packages use: by default the file's own name, known again by its hash without the network."""
    server.pages["texts/page.txt"] = OTHER
    address, digest = f"{server.url}/texts/page.txt", hashlib.sha256(OTHER).hexdigest()
    assert gpt2_data.fetch(address, tmp_path, sha256=digest) == tmp_path / "page.txt"
    assert (tmp_path / "page.txt").read_bytes() == OTHER
    assert gpt2_data.fetch(address, tmp_path, name="again").read_bytes() == OTHER  # checked by its size alone
    for name, place in ((None, "a--b/data/big.parquet"), ("big", "big")):
        path = gpt2_data.fetch("hf:a/b", tmp_path, name=name, sha256=SHA256)
        assert path == tmp_path / place
        assert path.read_bytes() == CONTENT
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert gpt2_data.fetch(address, tmp_path, sha256=digest) == tmp_path / "page.txt"
    assert gpt2_data.fetch("hf:a/b", tmp_path, name="big", sha256=SHA256) == tmp_path / "big"
    for fetched in lambda: gpt2_data.fetch("hf:a/b", tmp_path), lambda: download_file(file, tmp_path / "empty"):
        with pytest.raises(OSError, match=r"offline mode is enabled.*unset the `HF_HUB_OFFLINE`"):
            fetched()
    assert server.requests == []


def test_fetch_says_what_is_wrong(server, tmp_path):
    server.pages["page.txt"] = OTHER
    server.add("two/files", {"a.parquet": b"a", "b.parquet": b"b"})
    for source, kind, message in (
        (f"{server.url}/page.txt", OSError, "page.txt: SHA-256 is .*; given up after 3 downloads"),
        (f"{server.url}/none.txt", OSError, r"none.txt: no such file \(HTTP 404\)"),
        ("hf:two/files", ValueError, "has 2 files on the hub, not one"),
        ("page.txt", ValueError, "write the address of a file"),
        (f"{server.url}/", ValueError, "write the address of a file"),
    ):
        with pytest.raises(kind, match=message):
            gpt2_data.fetch(source, tmp_path, sha256="0" * 64)


def test_tinyshakespeare_is_fetched_once_into_the_user_s_cache(server, tmp_path, monkeypatch):
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 100
    server.pages["input.txt"] = text
    monkeypatch.setattr(hub, "TINYSHAKESPEARE", f"{server.url}/input.txt")
    monkeypatch.setattr(hub, "TINYSHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "gpt2-data" / "tinyshakespeare.txt"
    status = tinyshakespeare().stat()
    path.write_bytes(bytes(len(text)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # its receipt would not tell
    assert tinyshakespeare().read_bytes() == text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tinyshakespeare() == path  # known by its hash
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / ".cache" / "gpt2-data" / "tinyshakespeare.txt"
    with pytest.raises(OSError, match=f"HF_HUB_OFFLINE.*; or put {server.url}/input.txt at {path}$"):
        tinyshakespeare()
