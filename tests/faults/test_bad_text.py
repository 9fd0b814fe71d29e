"""Text that is hard on a tokenizer, and files that mean harm: the right tokens, or one line on what is wrong."""

import gzip
import json
import os
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gpt2_data import BuildConfig, build, get_tokenizer, open_dataset
from gpt2_data.cli import main

EOT = 50256
OPTIONS = {"val_tokens": 0, "workers": 1, "order": "source"}


def tokens_of(folder):
    """The documents of a dataset's training split, token by token."""
    data = open_dataset(folder)
    return [data.document("train", i).tolist() for i in range(data.num_documents("train"))]


def expected(texts):
    encode = get_tokenizer().encode_ordinary
    return [[EOT, *encode(text)] for text in texts]


def write_all(folder, documents):
    """The documents (bytes, or None) as Parquet, JSON lines of each kind, and text files; returns the sources."""
    lines = [b'{"text": ' + (b"null" if text is None else quoted(text)) + b"}\n" for text in documents]
    data = b"".join(lines)
    (folder / "a.jsonl").write_bytes(data)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data))
    with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
        file.write(data)
    column = pa.array(documents, pa.binary()).view(pa.string())  # Arrow does not look whether it is UTF-8
    pq.write_table(pa.table({"text": column}), folder / "a.parquet")
    for i, text in enumerate(documents):
        (folder / f"{i:02d}.txt").write_bytes(text or b"")
    return [*(folder / f"a.{kind}" for kind in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst")), folder / "*.txt"]


def quoted(text):
    """A JSON string with the bytes left as they are."""
    for byte, escape in (b"\\", b"\\\\"), (b'"', b'\\"'), *((bytes([i]), b"\\u%04x" % i) for i in range(32)):
        text = text.replace(byte, escape)
    return b'"' + text + b'"'


def test_awkward_documents_from_every_kind_of_file(tmp_path, library):
    """Empty, null, NUL, CRLF, BOM, special tokens, bytes that are no UTF-8: gigatoken must never see those."""
    documents = [
        b"first",
        b"",
        None,
        b"nul \0 in \0\0 it",
        b"line\r\nline\r\n\r\n  line\r",
        b"<|endoftext|> is text <|endoftext|><|endoftext|>",
        b"caf\xe9 \xff\xfe \xed\xa0\x80 \xc0\xaf \xf5\x80\x80\x80 \xe2\x82",
        "in the middle a \ufeff mark".encode(),
        "e\u0301 \u200d \U0001f468\u200d\U0001f469 \u0f3c \U000e0041 \ufffe".encode(),
        b"   \n\n\t  ",
        b"last",
    ]
    texts = [(text or b"").decode("utf-8", "replace") for text in documents]
    for i, source in enumerate(write_all(tmp_path, documents)):
        out = tmp_path / f"out{i}"
        result = build(BuildConfig([source], out, tokenizer=library, **OPTIONS))
        assert tokens_of(out) == expected(texts), source
        assert (result.documents, result.documents_empty, result.documents_replaced) == (11, 2, 1), source
        assert sum(document.count(EOT) for document in tokens_of(out)) == 11


def test_surrogates_and_keys_that_stand_twice(tmp_path, library):
    lines = r"""{"text": "a \ud800 b"}
{"text": "\udc00\ud83d\ude00\ud83d"}
{"text": "no", "text": "the last counts"}"""
    (tmp_path / "a.jsonl").write_text(lines)
    result = build(BuildConfig([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=library, **OPTIONS))
    assert tokens_of(tmp_path / "out") == expected(["a \ufffd b", "\ufffd\U0001f600\ufffd", "the last counts"])
    assert result.documents_replaced == 2


def test_a_document_longer_than_a_shard(tmp_path, library):
    long = " ".join(random.Random(3).choices(["shard", "border", "naïve", "\n\n", "7"], k=20_000))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("x", long, "y")))
    out = tmp_path / "out"
    result = build(BuildConfig([tmp_path / "a.jsonl"], out, tokenizer=library, shard_size=1000, **OPTIONS))
    assert result.shards > 20
    assert tokens_of(out) == expected(["x", long, "y"])


@pytest.mark.parametrize(
    "pieces",
    [
        ["a", " " * 2**20, " b"],  # tiktoken itself gives up on these two: cut as the pattern says
        ["a", "\u2003" * 1_200_000, "\u2003b\n" + " " * 1_100_000],
        ["^" * 10**6],
        pytest.param(["a" * 10**7], marks=pytest.mark.slow),
    ],
    ids=["spaces", "wide-spaces", "carets", "letters"],
)
def test_long_runs_take_seconds(tmp_path, library, pieces):
    text = "".join(pieces)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    started = time.monotonic()
    build(BuildConfig([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=library, **OPTIONS))
    assert time.monotonic() - started < 60  # quadratic time would be hours
    (document,) = tokens_of(tmp_path / "out")
    encode = get_tokenizer().encode_ordinary
    if len(text) == 10**7:  # which takes tiktoken as long again
        assert document == [EOT] + encode("a" * 4) * 2_500_000
    else:
        assert document == [EOT, *(token for piece in pieces for token in encode(piece))]


# --- through the command


def refused(out, *sources):
    """The one line about sources that cannot be built; nothing but the work folder is there afterwards."""
    arguments = ["build", *map(str, sources), "--out", str(out), "--val-tokens", "0", "--workers", "1"]
    done = CliRunner().invoke(main, arguments)
    error = done.stderr
    assert done.exit_code == 1, error
    assert error.startswith("Error: "), error
    assert (error.count("\n"), error.isascii(), len(error) < 1000) == (1, True, True), error
    if out.exists():
        assert [path.name for path in out.iterdir()] == [".build"]
        names = [path.name for path in (out / ".build").iterdir()]
        assert not [name for name in names if ".tmp-" in name or name.endswith((".u16", ".u64"))]
    return error


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "nowhere.txt").symlink_to("nothing")
    for name, message in {
        "pipe.jsonl": "is not a regular file",
        "pipe.parquet": "is not a regular file",
        "folder*.parquet": "is not a regular file",
        "folder.parquet": "is a folder",
        "endless.txt": "is not a regular file",
        "circle.txt": "Too many levels of symbolic links",
        "nowhere.txt": "No such file or directory",
    }.items():
        assert message in refused(tmp_path / "out", tmp_path / name)


def test_names_and_keys_do_not_break_the_line(tmp_path):
    name = tmp_path / "a\n\x1b[31m\"'\r\u202e.jsonl"
    name.write_text("nonsense")
    error = refused(tmp_path / "out", name)
    assert "\\x1b[31m\"' \\u202e.jsonl:1: not JSON" in error
    keys = ", ".join(f'"key {i}\\u001b": {i}' for i in range(300_000))
    (tmp_path / "b.jsonl").write_text(f"{{{keys}}}\n")
    error = refused(tmp_path / "out", tmp_path / "b.jsonl")
    assert error.endswith("...: name the key of the text with --column\n")


def test_json_that_means_harm(tmp_path):
    for i, (line, message) in enumerate(
        {
            b"[" * 10**6: "nested too deeply",
            b'{"text": "x", "n": ' + b"9" * 10**6 + b"}": "not JSON: Exceeds the limit",
            b'{"text": "x", "list": [' + b"[]," * 6_000_000 + b"1]}": "of JSON that are not in strings",
            b'{"text": "' + b"x" * 2**24 + b'"}': "16,777,216 bytes or more without white space",
            b'{"text": "half': "not JSON: Unterminated string",
        }.items()
    ):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(line)
        assert message in refused(tmp_path / f"out{i}", path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_gigabyte_on_a_line_of_a_small_file(tmp_path, name):
    with (tmp_path / name).open("wb") as file:  # one compressed stream after the other is as good as one
        for data, times in (b'{"text": "', 1), (b"a" * 1_000_000, 1000):
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd" if name.endswith("zst") else "gzip") as stream:
                stream.write(data)
            file.write(sink.getvalue().to_pybytes() * times)
    assert (tmp_path / name).stat().st_size < 2_000_000
    error = refused(tmp_path / "out", tmp_path / name)
    assert f"{name}: cannot be read: " in error


# --- Parquet


@pytest.fixture(scope="module")
def parquet():
    """Bytes of a file of several row groups and both kinds of pages."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(["one", "two", "naïve", "four" * 9], k=30)) for _ in range(600)]
    sink = pa.BufferOutputStream()
    table = pa.table({"text": texts, "token_count": [9] * 600})
    pq.write_table(table, sink, row_group_size=200, dictionary_pagesize_limit=3000, write_batch_size=50)
    return sink.getvalue().to_pybytes()


def test_parquet_cut_short_anywhere(tmp_path, parquet):
    path = tmp_path / "cut.parquet"
    for size in sorted({0, 3, 4, 7, 8, 12, *range(100, len(parquet), len(parquet) // 40), len(parquet) - 1}):
        path.write_bytes(parquet[:size])
        assert "cut.parquet: not a readable Parquet file" in refused(tmp_path / "out", path)


def test_parquet_with_any_byte_changed(tmp_path, parquet):
    """Whatever Arrow makes of it: a dataset or one line, no crash and no other exception."""
    rng = random.Random(11)
    path = tmp_path / "flip.parquet"
    footer = len(parquet) - 8 - int.from_bytes(parquet[-8:-4], "little")
    built = 0
    for i in range(120):
        data = bytearray(parquet)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(data)) if i % 2 else rng.randrange(footer, len(data))
            data[at] = rng.choice([0, 0xFF, 0x7F, 0x80, data[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(data)
        try:
            build(BuildConfig([path], tmp_path / f"out{i}", tokenizer="tiktoken", **OPTIONS))
            built += 1
        except (ValueError, OSError) as error:
            text = str(error)
            assert "\n" not in text.strip() or len(text) < 2000
            assert any(word in text for word in (path.name, "no text", "GB", "tokens")), text
    assert 10 < built < 110


def varint(number):
    """A Thrift integer that is not negative."""
    number *= 2
    low = [number >> shift & 127 for shift in range(0, number.bit_length(), 7)]
    return bytes([byte | 128 for byte in low[:-1]] + low[-1:])


def test_parquet_whose_footer_claims_what_cannot_be(tmp_path, parquet):
    """Rows, sizes and places far beyond the file."""
    metadata = pq.ParquetFile(pa.BufferReader(parquet)).metadata
    size = int.from_bytes(parquet[-8:-4], "little")
    footer = parquet[-8 - size : -8]
    chunk = metadata.row_group(1).column(0)
    path = tmp_path / "claims.parquet"
    for old, new, message in [
        (200, 2**40, "row group 0 is damaged: 1,099,511,627,776 rows of .* are impossible"),
        (chunk.total_compressed_size, 2**40, "row group 1 cannot be read"),
        (chunk.dictionary_page_offset, 2**40, "row group 1"),
        (chunk.dictionary_page_offset, chunk.dictionary_page_offset - 9, "row group . cannot be read"),
    ]:
        assert varint(old) in footer
        changed = footer.replace(varint(old), varint(new))
        path.write_bytes(parquet[: -8 - size] + changed + len(changed).to_bytes(4, "little") + b"PAR1")
        with pytest.raises((ValueError, OSError), match=message) as error:
            build(BuildConfig([path], tmp_path / "out", tokenizer="tiktoken", **OPTIONS))
        assert "claims.parquet" in str(error.value)
        assert not list((tmp_path / "out" / ".build").glob("*.u16"))
    path.write_bytes(parquet[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
    assert "claims.parquet: not a readable Parquet file" in refused(tmp_path / "out2", path)


def test_every_encoding_of_parquet(tmp_path, library):
    rng = np.random.default_rng(5)
    texts = [None if i % 97 == 0 else f"text {i % 50} " * int(rng.integers(0, 40)) for i in range(2000)]
    want = expected([text or "" for text in texts])
    plain = pa.array(texts, pa.string())
    for i, (column, options) in enumerate(
        [
            (plain, {}),
            (plain, {"use_dictionary": False, "data_page_version": "2.0"}),
            (plain, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
            (plain, {"write_page_checksum": True, "row_group_size": 300, "data_page_size": 500}),
            (plain.cast(pa.large_string()), {"dictionary_pagesize_limit": 1000, "write_batch_size": 10}),
            (plain.dictionary_encode(), {}),
        ]
    ):
        path = tmp_path / f"{i}.parquet"
        nested = pa.array([{"text": "not this"}] * 2000)
        pq.write_table(pa.table({"a": nested, "text": column}), path, **options)
        build(BuildConfig([path], tmp_path / f"out{i}", tokenizer=library, **OPTIONS))
        assert tokens_of(tmp_path / f"out{i}") == want, options
