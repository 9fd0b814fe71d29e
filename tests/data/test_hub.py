"""What is on the hub, and reading Parquet there without downloading it, against a hub on this machine."""

import hashlib
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import FIRST, SECOND, Drop, NoRanges, Refuse, Short
from huggingface_hub import constants

from gpt2_data.sources import download, hub
from gpt2_data.sources.hub import HubSource, Listing, hub_file, list_files

EDU = {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "CC-MAIN-2024-10": "data/CC-MAIN-2024-10/*"}


def paths(listing):
    return [file.path for file in listing.files]


def test_names():
    edu, fineweb = "HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb"
    for text, source in {
        "fineweb-edu": HubSource(edu, None, "sample-10BT"),
        "fineweb-edu:sample-100BT": HubSource(edu, None, "sample-100BT"),
        "fineweb:CC-MAIN-2024-10": HubSource(fineweb, None, "CC-MAIN-2024-10"),
        "hf:squad": HubSource("squad"),
        "hf:a/b@refs/convert/parquet": HubSource("a/b", "refs/convert/parquet"),
        "hf:a/b@v1.0:en": HubSource("a/b", "v1.0", "en"),
        "hf:a/b:en:validation": HubSource("a/b", None, "en", "validation"),
        "hf:a/b::test": HubSource("a/b", None, None, "test"),
    }.items():
        assert hub.parse(text) == source, text
    for text in "pydocs", "texts/*.parquet", "fineweb-edu2", "C:/texts/a.txt":
        assert hub.parse(text) is None
    malformed = "hf: hf:a/b/c hf:../b hf:a/b@ hf:a/b:c:d:e hf:a/b:c: fineweb-edu: fineweb:a:b"
    for text in malformed.split():
        with pytest.raises(ValueError, match="write hf:REPO"):
            hub.parse(text)


def test_fineweb_edu_in_one_request(server):
    files = {f"sample/10BT/{i:03d}_00000.parquet": bytes(100 + i) for i in (2, 0, 1)}
    other = "data/CC-MAIN-2024-10/000_00000.parquet"
    others = {other: b"x", ".gitattributes": b"", "sample/100BT/0.parquet": b"y"}
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": EDU[name]}]} for name in EDU]
    server.add("HuggingFaceFW/fineweb-edu", files | others, configs=configs)
    listing = list_files(hub.parse("fineweb-edu"))
    assert len(server.requests) == 1
    assert (listing.commit, listing.config, listing.split) == (FIRST, "sample-10BT", "train")
    assert listing.parquet
    assert paths(listing) == sorted(files)
    assert [file.size for file in listing.files] == [100, 101, 102]
    assert listing.files[1].sha256 == hashlib.sha256(bytes(101)).hexdigest()
    url = f"{server.url}/datasets/HuggingFaceFW/fineweb-edu/resolve/{FIRST}/sample/10BT/001_00000.parquet"
    assert listing.files[1].url == url
    for config, path in ("CC-MAIN-2024-10", other), (None, other), ("sample/100BT", "sample/100BT/0.parquet"):
        assert paths(list_files(HubSource("HuggingFaceFW/fineweb-edu", config=config))) == [path]


def test_a_listing_is_kept_and_not_trusted_and_stays_though_main_moves(server):
    server.add("a/b", {"data/train-00000-of-00001.parquet": b"old"})
    listing = list_files(HubSource("a/b"))
    server.add("a/b", {"data/train-00000-of-00001.parquet": b"newer"}, SECOND)
    assert list_files(HubSource("a/b")).commit == SECOND
    assert list_files(HubSource("a/b", FIRST)).files == listing.files
    good = listing.to_json()
    assert Listing.from_json(json.loads(json.dumps(good))) == listing
    assert download.read_range(listing.files[0].url, 0, 3) == b"old"

    row = good["files"][0]
    bad_rows = [{"path": p} for p in ("../x", "/etc/passwd", "a//b", "a/./b", "a\\b", "a\nb", "", 5)]
    bad_rows += [{"size": s} for s in (-1, 2.5, "3", True, None)] + [{"sha256": "0"}, {"sha256": "Z" * 64}]
    bad = [good | {"files": [row | change]} for change in bad_rows]
    bad += [good | {"commit": "main"}, good | {"repo": "a/../b"}, {}, [], None, good | {"files": None}]
    for value in bad:
        with pytest.raises((ValueError, KeyError, TypeError)):
            Listing.from_json(value)


T_FILES, REST = ["**/t*.parquet", "b/x.parquet"], "a/[u-z].parquet"
CONFIGS = [
    {"config_name": "one", "data_files": "a/*.parquet"},
    {"config_name": "many", "data_files": ["a/**", "b/x.parquet"]},
    {"config_name": "split", "data_files": [{"split": "train", "path": T_FILES}, {"split": "test", "path": REST}]},
    {"config_name": "folder", "data_dir": "named"},
    {"config_name": "elsewhere", "data_files": "https://example.com/a.parquet"},
    {"config_name": "nothing", "data_files": "c/*"},
]


def test_configs_of_the_card(server):
    names = ["a/t1.parquet", "a/v.parquet", "a/deep/t2.parquet", "b/x.parquet"]
    names += ["named/train-x.parquet", "named/dev.parquet"]
    marked = [config | {"default": True} if config["config_name"] == "split" else config for config in CONFIGS]
    server.add("a/b", {name: name.encode() for name in names}, configs=marked)
    for config, split, expected in [
        ("one", "train", "a/t1.parquet a/v.parquet"),
        ("many", "train", "a/deep/t2.parquet a/t1.parquet a/v.parquet b/x.parquet"),
        (None, "train", "a/deep/t2.parquet a/t1.parquet b/x.parquet named/train-x.parquet"),
        ("split", "test", "a/v.parquet"),
        ("folder", "train", "named/train-x.parquet"),
        ("folder", "validation", "named/dev.parquet"),
    ]:
        assert paths(list_files(HubSource("a/b", config=config, split=split))) == expected.split()
    for config, split, message in [
        ("missing", "train", "no config 'missing'; there are: one, many, split, folder, elsewhere, nothing$"),
        ("split", "dev", "no file of split 'dev'; the splits are: test, train$"),
        ("elsewhere", "train", "its card names a file of another place: 'https://example.com/a.parquet'$"),
        ("nothing", "train", "no file of split 'train'"),
    ]:
        with pytest.raises(ValueError, match=message):
            list_files(HubSource("a/b", config=config, split=split))
    server.add("c/d", {}, configs=CONFIGS)
    with pytest.raises(ValueError, match="name a config, as in hf:c/d:one; there are: one, many"):
        list_files(HubSource("c/d"))


@pytest.mark.parametrize(
    ("names", "train", "others"),
    [
        ("data/train-00000-of-00002.a data/train-00001-of-00002-b.a data/dev-00000-of-00001.a x", 2, "dev, train"),
        ("train-00000-of-00001.parquet validation-00000-of-00001.parquet", 1, "train, validation"),
        ("train/0.parquet train/deep/1.parquet test/2.parquet LICENSE", 2, "test, train"),
        ("my_train_file.jsonl dev.jsonl extra.jsonl", 1, "train, validation"),
        ("0.parquet deep/1.parquet README.md .hidden/x.parquet __pycache__/y LICENSE", 2, "train"),
        ("latest.parquet pretraining.parquet", 2, "train"),
    ],
)
def test_files_without_a_card_by_their_names(server, names, train, others):
    server.add("a/b", {name: name.encode() for name in names.split()})
    assert paths(list_files(HubSource("a/b"))) == names.split()[:train]
    with pytest.raises(ValueError, match=f"no file of split 'none'; the splits are: {others}$"):
        list_files(HubSource("a/b", split="none"))


def test_what_is_wrong_is_said_in_one_line(server, monkeypatch):
    for repo in "a/b", "a/gated", "a/private":
        server.add(repo, {"a.parquet": b""})
    server.add("a/empty", {"README.md": b""})
    server.gated.add("a/gated")
    server.private.add("a/private")
    for source, kind, message in [
        (HubSource("no/such"), OSError, "^hub dataset no/such: no such dataset; if it is private, log in by `hf"),
        (HubSource("a/private"), OSError, "no such dataset; if it is private, log in"),
        (HubSource("a/gated"), OSError, "a/gated: gated: ask for access on the dataset's page, then log in by"),
        (HubSource("a/b", "v9"), OSError, "hub dataset a/b, revision v9: no such revision"),
        (HubSource("a/b", config="en"), ValueError, "hf:a/b: no config 'en'; it has none"),
        (HubSource("a/empty"), ValueError, "no file of split 'train'; the splits are: none"),
    ]:
        with pytest.raises(kind, match=message) as error:
            list_files(source)
        assert "\n" not in str(error.value)
    assert len(server.requests) == 6  # none was tried again

    monkeypatch.setenv("HF_TOKEN", "secret")
    assert paths(list_files(HubSource("a/private"))) == paths(list_files(HubSource("a/gated"))) == ["a.parquet"]

    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    server.faults = [Refuse(store=False, status=401, headers=message)]
    with pytest.raises(OSError, match="a/b: not allowed: log in by"):
        list_files(HubSource("a/b"))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    host = "127.0.0.1:9"  # nothing listens on the port of "discard"
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "UNREACHABLE", 0.5)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.1)
    with pytest.raises(OSError, match=f"hub dataset a/b: {host}: cannot be reached: .*gave up at try [234]"):
        list_files(HubSource("a/b"))


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"ratelimit": '"api";r=0;t=0'}])
def test_the_hub_s_wait_is_waited_but_not_without_end(server, headers):
    server.add("a/b", {"a.parquet": b""})
    server.faults = [Refuse(store=False, status=429, headers=headers), Refuse(store=False, status=503)]
    before = time.monotonic()
    assert paths(list_files(HubSource("a/b"))) == ["a.parquet"]
    assert 0.9 < time.monotonic() - before < 4
    assert len(server.requests) == 3
    server.faults = [Refuse(store=False, status=429, headers={"Retry-After": "4000"}, times=100)]
    with pytest.raises(OSError, match=r"HTTP 429 and asks to wait 4000 seconds; gave up at try 1 .*: run"):
        list_files(HubSource("a/b"))


# --- Parquet, by its footer alone


def test_a_footer_takes_two_requests(server, tmp_path):
    """A footer beyond what is asked for at first, as FineWeb-Edu's 3 MB; whatever happens on the way."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 20 for i in range(4000)]}), path, row_group_size=2)
    metadata = pq.read_metadata(path)
    footer = metadata.serialized_size
    assert footer > 200_000
    server.add("a/b", {"a.parquet": path})
    (file,) = list_files(HubSource("a/b")).files
    groups = hub.row_groups(file)
    assert groups == [(2, metadata.row_group(i).column(0).total_uncompressed_size) for i in range(2000)]
    assert len(server.asked("a.parquet", store=True)) == 2
    assert server.sent("a.parquet") <= footer + 8 + 65536

    server.faults = [Refuse(), Drop(at=10_000), Drop(at=0), Short(), Refuse(store=False, status=500)]
    assert hub.row_groups(file) == groups
    assert not any(fault.times for fault in server.faults)
    server.faults = [NoRanges(times=5)]
    with pytest.raises(OSError, match="the server cannot send the file from byte"):
        hub.row_groups(file)


def test_parquet_that_cannot_be_used(server, tmp_path):
    """What is in a footer is judged as in a local file: see test_sources.py."""
    pq.write_table(pa.table({"n": [{"a": 1, "b": 2}], "body": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).dictionary_encode()}), tmp_path / "words.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"this is no Parquet file")
    (tmp_path / "empty.parquet").touch()
    server.add("a/b", {path.name: path for path in tmp_path.iterdir()})
    files = {file.path: file for file in list_files(HubSource("a/b")).files}
    for name, message in {
        "other.parquet": "other.parquet: no column 'text'; the columns are n, body",
        "broken.parquet": "broken.parquet: not a readable Parquet file",
        "empty.parquet": "empty.parquet: not a readable Parquet file",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            hub.row_groups(files[name])
        assert "\n" not in str(error.value)
    assert hub.row_groups(files["other.parquet"], "body")[0][0] == 1
    assert hub.row_groups(files["words.parquet"])[0][0] == 2  # a dictionary of strings, as in a local file
    with pytest.raises(OSError, match=r"gone.parquet: no such file \(HTTP 404\)"):
        hub.row_groups(hub_file("a/b", FIRST, "gone.parquet", 100, None))
