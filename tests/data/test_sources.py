"""What is read from files, and what is said about files that cannot be."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_data import BuildConfig, encode_documents, tokenizer
from gpt2_data.building import plan
from gpt2_data.sources import catalog as sources
from gpt2_data.sources import files as readers
from gpt2_data.sources import pydocs


def read(source, tmp_path, **options):
    """(units, documents as (text, replaced)) of sources."""
    names = [source] if not isinstance(source, list) else source
    planned = plan.make_plan(BuildConfig(names, tmp_path / "out", **options))
    documents = []
    for unit in planned.units:
        for batch in sources.read(unit):
            rows = [(text, i in batch.replaced) for i, text in enumerate(batch.texts.to_pylist())]
            assert batch.texts.null_count == 0
            assert batch.empty == (0 if batch.continues else sum(text == "" for text, _ in rows))
            assert batch.text_bytes == sum(len(text.encode()) for text, _ in rows)
            if batch.continues:
                ((text, replaced),) = rows
                documents[-1] = (documents[-1][0] + text, documents[-1][1] or replaced)
            else:
                documents += rows
    return planned.units, documents


def write_parquet(path, texts, rows=1000, **columns):
    pq.write_table(pa.table({"text": texts} | columns), path, row_group_size=rows)
    return path


def test_parquet_in_row_groups_of_a_thousand(tmp_path, monkeypatch):
    texts = [f"text {i}" if i % 7 else ("" if i % 2 else None) for i in range(3500)]
    path = write_parquet(tmp_path / "a.parquet", texts, id=[str(i) for i in range(3500)])
    monkeypatch.setattr(plan, "UNIT_BYTES", 15_000)
    units, documents = read(path, tmp_path)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 2), (2, 4)]
    assert [text for text, _ in documents] == [text or "" for text in texts]
    assert sources.document_name(units[1], 3) == f"{path}: row 2,003, counted from 0"


def test_limits_cut_every_kind_at_the_same_place(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(50)]
    monkeypatch.setattr(plan, "UNIT_BYTES", 100)
    write_parquet(tmp_path / "a.parquet", texts, rows=10)
    lines = "\ufeff\n" + "".join(json.dumps({"text": text}) + "\n\n" for text in texts)  # blank: no document
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i:02d}.txt").write_text(text)
    for name in "a.parquet", "a.jsonl", "a.jsonl.gz", "txt/*.txt":
        for limit in 1, 10, 23, 50, 99:
            _, documents = read(tmp_path / name, tmp_path, limit_docs=limit)
            assert [text for text, _ in documents] == texts[:limit], name
    planned = plan.make_plan(BuildConfig([tmp_path / "a.parquet", tmp_path / "a.jsonl"], tmp_path, limit_docs=50))
    assert [item.name for item in planned.inputs] == ["a.parquet"]


def test_jsonl_in_byte_ranges(tmp_path, monkeypatch):
    texts = [f"line {i} " + "é" * (i % 40) for i in range(500)]
    data = "\ufeff" + "".join(
        json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\r\n" for i, text in enumerate(texts)
    )
    path = tmp_path / "a.jsonl"
    path.write_bytes(data.rstrip().encode())  # no newline at the end
    whole = read(path, tmp_path)
    assert len(whole[0]) == 1
    assert [text for text, _ in whole[1]] == texts
    for size in 1, 100, 3000, 48_000:
        monkeypatch.setattr(plan, "UNIT_BYTES", size)
        units, documents = read(path, tmp_path)
        assert len(units) > 1
        assert documents == whole[1]


def test_a_long_text_file_comes_in_parts_with_the_same_tokens(tmp_path, monkeypatch):
    text = "\n\n".join(f"paragraph {i}, naïve 日本\n  indented \n" for i in range(200))
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = encode_documents([text])[0].tolist()
    for block in 7, 64, 1000, 10**6:
        monkeypatch.setattr(readers, "BLOCK", block)
        planned = plan.make_plan(BuildConfig([path], tmp_path / "out"))
        parts = list(sources.read(planned.units[0]))
        assert "".join(batch.texts[0].as_py() for batch in parts) == text
        assert [batch.continues for batch in parts] == [False] + [True] * (len(parts) - 1)
        tokens = [t for part in parts for t in encode_documents(part.texts.to_pylist())[0].tolist()[1:]]
        assert tokens == whole[1:]
    assert len(parts) == 1


def test_bytes_that_are_not_utf8_are_replaced_and_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ok")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    column = pa.array([b"caf\xe9", b"fine", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes("\ufeffcafé ok".encode("utf-16-le") + b"A")  # cut within a character
    assert read(tmp_path / "a.txt", tmp_path)[1] == [("caf\ufffd ok", True)]
    assert read(tmp_path / "d.txt", tmp_path)[1] == [("café ok\ufffd", True)]
    assert read(tmp_path / "b.jsonl", tmp_path)[1] == [("caf\ufffd", True), ("fine", False)]
    assert read(tmp_path / "c.parquet", tmp_path)[1] == [("caf\ufffd", True), ("fine", False), ("", False)]


def test_another_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["no"], body=["yes"])
    (tmp_path / "b.jsonl").write_text('{"body": "too"}\n')
    _, documents = read([tmp_path / "a.parquet", tmp_path / "b.jsonl"], tmp_path, column="body")
    assert [text for text, _ in documents] == ["yes", "too"]
    with pytest.raises(ValueError, match="no key 'text'; the keys are body: name the key of the text with --c"):
        read(tmp_path / "b.jsonl", tmp_path)


def test_text_files_share_units_and_keep_their_order(tmp_path, monkeypatch):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 10 + str(i))
    monkeypatch.setattr(plan, "UNIT_BYTES", 30)
    units, documents = read([tmp_path / "7.txt", tmp_path / "[0-3].txt"], tmp_path)
    assert [len(unit.files) for unit in units] == [3, 2]
    assert [text[-1] for text, _ in documents] == ["7", "0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"a\.jsonl:1003: not JSON"),
        ("[1]", r"a\.jsonl:1003: an object or a string is wanted, this is list"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:1003: no key 'text'; the keys are body, id"),
        ('{"text": 5}', r"a\.jsonl:1003: 'text' holds int"),
        ("[" * 100_000, r"a\.jsonl:1003: "),
    ],
)
def test_a_faulty_line_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(plan, "UNIT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' * 501 + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl", tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    lines = b'{"text": "fine"}\n' * 50_000
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-50])
    (tmp_path / "bad.txt.gz").write_bytes(b"this is not gzip")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    data = bytearray(write_parquet(tmp_path / "flip.parquet", ["some text " * 50] * 100).read_bytes())
    data[20:60] = b"\xff" * 40
    (tmp_path / "flip.parquet").write_bytes(data)
    for name, message in {
        "cut.jsonl.gz": "Truncated",
        "bad.txt.gz": "cannot be read",
        "bad.parquet": "not a readable Parquet file",
        "other.parquet": "no column 'text'; the columns are body, url",
        "numbers.parquet": "column 'text' holds int64, not strings",
        "flip.parquet": "row group 0 cannot be read",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path / name, tmp_path)
        assert name in str(error.value)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "wikipedia": "unknown source 'wikipedia': choose from fineweb-edu, fineweb, hf:REPO",
        "hf:": "hf:",
        str(
            tmp_path / "empty"
        ): "is a folder with no file that is taken: taken are .parquet .jsonl .ndjson .json ",
        str(tmp_path / "*.jsonl"): "no file matches",
        str(tmp_path / "b.txt"): "no file matches",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(source, tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        read([tmp_path / "a.txt", tmp_path / "*.txt"], tmp_path)


def test_tinyshakespeare_in_documents_as_llm_c_has_them(tmp_path):
    (tmp_path / "input.txt").write_text("First Citizen:\nBefore.\n\nAll:\nSpeak.\n\nThe end.")
    (batch,) = sources.read(sources.Unit(0, "tinyshakespeare", (str(tmp_path / "input.txt"),)))
    assert batch.texts.to_pylist() == ["First Citizen:\nBefore.\n\n", "All:\nSpeak.\n\n", "The end."]


def test_python_s_own_text():
    documents = pydocs.documents()
    ids = [name for name, _ in documents]
    assert len(set(ids)) == len(ids)
    assert {"topic:assignment", "source:json/decoder.py"} <= set(ids)
    assert sum(len(text) for _, text in documents) > 5_000_000
    # Topics stand once: not again in the source of the module that holds them.
    assert not any(name.startswith("source:pydoc_data") or "/tests/" in name for name in ids)
    pydocs.documents.cache_clear()
    assert pydocs.documents() == documents


def test_text_that_swells_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    monkeypatch.setattr(tokenizer, "MAX_UNCUT", 1000)
    monkeypatch.setattr(readers, "BLOCK", 300)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' + b" " * 10**6))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 10**6))
    for name, message in (
        ("a.jsonl.gz", "a line of 1,000 characters"),
        ("a.txt.gz", "no white space in 1,000 characters"),
    ):
        with pytest.raises(ValueError, match=f"{name}: cannot be read: {message}"):
            read(tmp_path / name, tmp_path)
