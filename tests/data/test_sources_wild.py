"""Text as people have it: folders, kinds of files, encodings, separators, and names of any bytes."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gpt2_data import BuildConfig, build, get_tokenizer, open_dataset, verify
from gpt2_data.building import plan
from gpt2_data.cli import main
from gpt2_data.sources import catalog, files, opening

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(map(str, arguments)))


def documents(*sources, **options):
    """The texts of sources, in their order."""
    units = plan.make_plan(BuildConfig(sources, Path("none"), **options)).units
    texts = []
    for batch in (batch for unit in units for batch in catalog.read(unit)):
        if batch.continues:
            texts[-1] += batch.texts[0].as_py()
        else:
            texts += batch.texts.to_pylist()
    return texts


def refused(run, *arguments, code=1):
    """The one line of a build that leaves nothing behind."""
    done = run("build", *arguments, "--out", "new/out", "--workers", 1)
    assert done.exit_code == code, done.output
    assert not Path("new").exists()
    return done.stderr.splitlines()[-1]


def write(name, data=b"text"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_a_folder_is_taken_whole_in_the_order_of_its_names(run):
    """A new user: a folder of texts is named, some files in it are of no known kind, and links make a loop."""
    for name in "b.txt", "sub/b.txt", "A.MD", "é.py", ".hidden.txt", ".git/x.txt", "x.docx":
        write(f"mine/{name}", name)
    for name in "dataset.json", "build.jsonl", "z.txt":  # a dataset in its own source, and its neighbour
        write(f"mine/data/out/{name}", "{}")
    Path("mine/sub/loop").symlink_to("..")
    Path("mine/sub/again.txt").symlink_to("../b.txt")
    Path("mine/nowhere.txt").symlink_to("nothing")
    os.mkfifo("mine/pipe.txt")
    Path("elsewhere").mkdir()
    write("elsewhere/linked.txt", "linked")
    Path("mine/link").symlink_to("../elsewhere")
    done = run("build", "mine/", "--order", "source", "--val-tokens", 0)
    assert done.exit_code == 0, done.output
    assert (
        "mine/: 5 files taken, 4 passed over: mine/data/out/ (a dataset), mine/nowhere.txt (a link to nothing), "
        "mine/pipe.txt (no regular file) and 1 more" in done.stderr
    )
    assert documents("mine") == ["A.MD", "b.txt", "linked", "sub/b.txt", "é.py"]
    names = [item["name"] for item in open_dataset("data/mine").manifest.source["inputs"]]
    assert names == ["A.MD", "b.txt", "linked.txt", "sub/b.txt", "é.py"]
    assert "already built" in run("build", "mine", "--order", "source", "--val-tokens", 0).stdout
    assert documents("elsewhere/**") == documents("elsewh*") == ["linked"]


def test_every_kind_is_read_and_compressed_too(run):
    """A new user: notes, code, tables and arrays are read, with upper-case endings and in each compression."""
    rows = [{"id": 1, "text": 'a, "b"\n\nc'}, {"id": 2, "text": "naïve \ud83d\ude00"}]
    texts = [row["text"].encode("utf-16", "surrogatepass").decode("utf-16") for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = f'id,text\r\n1,"a, ""b""\n\nc"\r\n\r\n2,{texts[1]}\r\n'
    plain = {
        "a.jsonl": lines, "a.ndjson": lines, "c4-train.00000-of-01024.json": "\n " + lines,
        "array.json": json.dumps(rows, indent=1), "strings.JSON": json.dumps(texts), "a.CSV": table,
        "b.csv": table.replace("d,", "d;").replace(",t", ";t").replace("1,", "1;").replace("2,", "2;"),
        "a.tsv": table.replace("d,", "d\t").replace("1,", "1\t").replace("2,", "2\t"),
    }  # fmt: skip
    for name, text in plain.items():
        data = text.encode()
        zstd = pa.compress(data, "zstd", asbytes=True)
        for ending, packed in ("", data), (".gz", gzip.compress(data)), (".xz", lzma.compress(data)):
            assert documents(write(f"1/{name}{ending}", packed)) == texts, name
        assert documents(write(f"1/{name}.bz2", bz2.compress(data))) == texts
        assert documents(write(f"1/{name}.ZST", zstd)) == texts
    for name in "a.text", "NOTES.md", "x y.rst.gz", "a.py":
        data = b"# notes"
        assert documents(write(f"2/{name}", gzip.compress(data) if name.endswith("gz") else data)) == ["# notes"]
    assert documents(write("empty.json", "[ ]")) == []
    joined = '["a"]\n[] \ufeff[{"text": "b]"},\n"c"][ ]\n'
    assert documents(write("joined.json", joined)) == ["a", "b]", "c"]
    open_quotes = 'text\tid\n"Hi" she said\t1\n"6 inch\t2\n'
    assert documents(write("open.tsv", open_quotes)) == ['"Hi" she said', '"6 inch']
    assert documents(write("strings.jsonl", '"one"\n{"text": "two"}\n')) == ["one", "two"]


def test_json_arrays_and_tables_are_read_piece_by_piece(run, monkeypatch):
    """A record across the border of two pieces is whole, and bytes that are not UTF-8 become U+FFFD in both."""
    monkeypatch.setattr(files, "_READ", 7)
    texts = ["é" * i + '"' + "x" * (i % 5) for i in range(60)]
    assert documents(write("a.json", json.dumps(texts))) == texts
    assert documents(write("joined.json", 9 * f"{json.dumps(texts)} []\n")) == 9 * texts
    assert documents(write("b.json", json.dumps([{"t": text} for text in texts], indent=2)), column="t") == texts
    assert documents(write("c.json", b'["caf\xe9 \xf0\x9f\x98\x80 \xe2\x82", null]')) == [
        "caf\ufffd 😀 \ufffd",
        "",
    ]
    assert documents(write("c.csv", b"text\ncaf\xe9\n")) == ["caf\ufffd"]


def test_string_views_and_large_strings_are_cast(run):
    """datasets #7718: string_view columns."""
    for kind in pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string()):
        pq.write_table(
            pa.table({"text": pa.array(["one", None, "z" * 40]).cast(pa.string()).cast(kind)}), "a.parquet"
        )
        assert documents("a.parquet") == ["one", "", "z" * 40]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.docx", "PK", "a.docx is of a kind that is not taken: taken are .parquet .jsonl"),
        ("a.parquet.gz", "x", "is of a kind that is not taken"),
        ("a.json", '{\n "a": 1\n}', "a.json is one JSON object, not an array"),
        ("a.json", "[1]", "a.json: element 0, counted from 0: an object or a string is wanted, this is int"),
        ("a.json", '["a" "b"]', "not JSON: a comma or the array's end is missing"),
        ("a.json", '[{"text": "a"}, {"body": 1}]', "element 1, counted from 0: no key 'text'; the keys are body"),
        ("a.json", '["a"', "not JSON"),
        ("a.json", '["a"]\n{"text": "b"}\n', "a.json: '{\"text\": \"b\"}\\n' after 1 elements is no JSON array"),
        ("a.jsonl", '[\n"a"]', "a.jsonl:1: not JSON: Expecting value: if this is a JSON array, rename it"),
        ("a.jsonl", '["a"]', "this is list: if this is a JSON array, rename it to .json"),
        ("a.csv", "1,hello\n2,x\n", "no column 'text'; the columns, which the first line names, are 1, hello"),
        ("a.csv", "id,text\n1,a,b\n", "a.csv:2: 3 fields, but the first line names 2 columns"),
        ("a.csv", 'id,text\n1,"a\n', "a.csv:2: unexpected end of data"),
        ("a.csv", "", "a.csv:1: no column 'text'"),
        ("a.txt.xz", "no", "a.txt.xz: cannot be read"),
        ("a.txt.xz", lzma.compress(b"x" * 99)[:-20], "a.txt.xz: cannot be read: Compressed file ended"),
        *[(f"a.{kind}", POINTER, f"a.{kind} is a git-lfs pointer, not the file: run git lfs pull")
          for kind in ("parquet", "jsonl", "json", "csv", "txt", "txt.gz", "jsonl.zst", "py")],
        ("a.txt", POINTER.replace("git-lfs", "hawser"), "a.txt is a git-lfs pointer, not the file"),
        ("a.parquet", "/annex/objects/SHA256E-s9--4d7a.parquet\n", "is a git-annex pointer, not the file: run"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_leaves_nothing(run, name, data, message):
    """transformers #27923: git-lfs pointers in a file's place; and C4's refused build that left a lock."""
    assert message in refused(run, write(name, data))
    write(f"folder/{name}", data)
    write("folder/fine.txt")
    if "not taken" not in message and "one JSON object" not in message:  # those are passed over
        assert message.partition(": ")[0].split()[0].split(":")[0] in refused(run, "folder")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "shift_jis"])
def test_a_byte_order_mark_or_an_option_tells_the_encoding(run, encoding, monkeypatch):
    """A new user: UTF-16 text became U+FFFD and NULs; Latin-1 lost each accent."""
    monkeypatch.setattr(opening, "_BUFFER", 5)  # characters stand across the borders of what is read at once
    monkeypatch.setattr(opening, "_SAMPLE", 99)
    text = "日本\n" * 99 if encoding == "shift_jis" else "Un été, ça va.\n" * 99
    named = {} if encoding in ("utf-8-sig", "utf-16", "utf-32") else {"encoding": encoding}
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    table = 'text\n"' + text + '"\n'
    for name, content in {
        "a.txt": text,
        "a.jsonl": line,
        "b.json": f"[{line}]",
        "c.json": line,
        "a.csv": table,
    }.items():
        assert documents(write(name, content.encode(encoding)), **named) == [text], name
    monkeypatch.setattr(plan, "UNIT_BYTES", 300)
    assert documents(write("a.jsonl", (line * 3).encode(encoding)), **named) == [text] * 3


def test_text_that_is_repaired_is_named_and_what_is_mostly_unreadable_refused(run):
    """A new user: of 17 files, which were not UTF-8 was told nowhere."""
    for i in range(6):
        write(
            f"f/{i}.txt", ("Un été à la plage et plus, sans accents. " * 9).encode("latin-1" if i % 3 else "utf-8")
        )
    done = run("build", "f", "--val-tokens", 0, "--workers", 1)
    assert (
        "warning: 4 documents not UTF-8: the invalid bytes became U+FFFD: f/1.txt, f/2.txt, f/4.txt and 1 more;"
        in done.stderr
    )
    assert "--encoding NAME, with another --out" in done.stderr
    assert (
        run("build", "f", "--val-tokens", 0, "--out", "o2", "--encoding", "latin-1").stderr.count("warning") == 0
    )
    options = open_dataset("o2").manifest.options
    assert options["encoding"] == "latin-1"
    assert "encoding" not in open_dataset("data/f").manifest.options
    assert "its encoding is latin-1, none is wanted" in run("build", "f", "--val-tokens", 0, "--out", "o2").stderr
    for name, data, advice in [
        ("u.txt", "hello".encode("utf-16-le"), "--encoding utf-16,"),
        ("u.jsonl", '{"text": "hi"}\n'.encode("utf-16-be"), "--encoding utf-16-be,"),
        ("c.csv", ("text\n" + "Привет\n" * 9).encode("cp1251"), "--encoding latin-1, cp1252"),
        ("d.txt", "Привет, мир".encode("cp1251"), "--encoding latin-1, cp1252"),
        ("e.txt", "Привет".encode("utf-16-le"), "--encoding utf-16,"),
        ("f.txt", "Привет мир\n".encode("utf-16-be"), "--encoding utf-16-be,"),
        ("g.txt", "中文中文中文\n".encode("utf-16-le"), "--encoding utf-16,"),
        ("h.txt", "नमस्ते दुनिया\n".encode("utf-16-le"), "--encoding utf-16,"),
    ]:
        error = refused(run, write(name, data))
        assert f"{name}: most of it cannot be read as UTF-8: name its encoding, as in {advice}" in error
        assert refused(run, name, "--dry-run") == error
    write("half.jsonl", '{"text": "a \\ud800 b"}\n{"text": "c"}\n')
    error = run("build", "half.jsonl", "--out", "half", "--val-tokens", 0).stderr
    assert error == "warning: 1 document with half of a surrogate pair, which became U+FFFD\n"
    write("mixed/a.json", '["é"]')
    write("mixed/b.txt", "zwei".encode("utf-16-le"))
    write("mixed/c.txt", "three " * 20)
    assert documents("mixed", encoding="utf16") == ["é", "zwei", "three " * 20]
    assert "'rot13' is no encoding" in refused(run, "f", "--encoding", "rot13", code=2)
    assert "'nonsense' is no encoding" in refused(run, "f", "--encoding", "nonsense", code=2)


def test_line_ends_of_windows_editors_are_read_as_line_feeds(run, monkeypatch):
    """continue #11876: CR and BOM. A file of mixed line ends keeps them, as do the records of JSON and CSV."""
    monkeypatch.setattr(opening, "_BUFFER", 3)
    monkeypatch.setattr(opening, "_SAMPLE", 10)
    assert documents(write("a.txt", b"\xef\xbb\xbfa\r\nb\r\n\r\nc\r\n")) == ["a\nb\n\nc\n"]
    assert documents(write("b.md", "ab\r\ncd\r\n".encode("utf-16"))) == ["ab\ncd\n"]
    monkeypatch.setattr(opening, "_SAMPLE", 1 << 16)
    for text in "a\r\nb\nc\r\n", "a\rb\r\n", "a\r\nb\r", "a\rb\rc":
        assert documents(write("a.txt", text)) == [text]
    assert documents(write("a.jsonl", b'{"text": "a\\r\\nb\\r\\n"}\r\n')) == ["a\r\nb\r\n"]
    assert documents(write("a.csv", b'text\r\n"a\r\nb"\r\n')) == ["a\r\nb"]


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "\n--- next one ---\n", "é"])
@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
def test_a_separator_is_found_wherever_it_stands(run, monkeypatch, separator, block):
    """openai/gpt-2 #222: documents in one .txt. Also across the borders of what is read at once."""
    monkeypatch.setattr(files, "BLOCK", block)
    texts = ["one two three", " four\nfive -- six" * 9, "x", "a <|end of text|> - next one"]
    write("a.txt", separator.join([*texts[:2], "", *texts[2:], " "]) + separator)
    assert documents("a.txt", split_on=separator) == texts
    write("b.md", "last")
    for limit in 1, 2, 5:
        assert documents("a.txt", "b.md", split_on=separator, limit_docs=limit) == [*texts, "last"][:limit]


def test_the_mark_in_a_text_file_is_told_and_split_at(run):
    """openai/gpt-2 #222: 300 stories in one file were one document, without a word."""
    write("stories.txt", "".join(f"Story {i}.\n<|endoftext|>\n" for i in range(300)))
    done = run("build", "stories.txt", "--out", "one")
    assert "<|endoftext|> stands 300 times in the text files" in done.stderr
    assert "--split-on '<|endoftext|>', with another --out, splits them" in done.stderr
    done = run("build", "stories.txt", "--out", "all", "--split-on", "<|endoftext|>\\n")
    assert "of 300 documents in 2 shards" in done.stdout
    assert not done.stderr
    assert open_dataset("all").manifest.options["split_on"] == "<|endoftext|>\n"
    assert "split_on" not in open_dataset("one").manifest.options
    done = run("build", "stories.txt", "--out", "all")
    assert (
        "its split_on is <|endoftext|>\\n, none is wanted): add --split-on '<|endoftext|>\\n' to keep it"
        in done.stderr
    )
    assert "already built" in run("build", "stories.txt", "--out", "all", "--split-on", "<|endoftext|>\\n").stdout
    assert verify(Path("all"), "full").ok
    assert "split_on is for text files" in refused(run, write("a.jsonl"), "--split-on", "x")
    assert "split_on is empty" in refused(run, "stories.txt", "--split-on", "")
    assert "split_on is '\\udcff', which is not UTF-8" in refused(run, "stories.txt", "--split-on", "\udcff")
    error = run("build", "stories.txt", "--out", "none", "--split-on", r"\r\n").stderr
    assert r"warning: --split-on '\r\n' stands in none of the text files" in error
    assert r"where all lines end with \r\n, they are read with \n" in error
    assert "Invalid value for '--split-on'" in refused(run, "stories.txt", "--split-on", "\\", code=2)


def test_one_text_file_alone_is_led_to_a_split(run):
    """A new user: the messages ran in a circle, and the dry run spoke of two shards."""
    write("novel.txt", "\n\n".join(f"Paragraph {i} of the novel." for i in range(300)))
    assert "shards     about 1 of" in run("build", "novel.txt", "--out", "x", "--dry-run").stdout
    done = run("build", "novel.txt", "--out", "one")
    assert "in 1 shard (0 tokens for validation)" in done.stdout
    assert r"warning: nothing is left for validation" in done.stderr
    assert r"--split-on '\n\n', with another --out" in done.stderr
    assert not run("build", "novel.txt", "--out", "zero", "--val-tokens", 0).stderr
    advice = r"add --split-on '\n\n'"
    assert advice in refused(run, "novel.txt", "--val-tokens", 30)
    assert advice in refused(run, "novel.txt", "--val-tokens", 30, "--dry-run")
    assert (
        "shards     about 2 of"
        in run("build", "novel.txt", "--out", "x", "--split-on", r"\n\n", "--dry-run").stdout
    )
    done = run("build", "novel.txt", "--out", "two", "--split-on", r"\n\n", "--val-tokens", 30)
    assert "of 300 documents in 2 shards" in done.stdout
    write("short.txt", "\n\n".join(f"Paragraph {i} of a short story." for i in range(60)))
    for seed, shards in (0, "1 shard "), (5, "2 shards"):  # the novel comes first, or second
        options = "novel.txt", "short.txt", "--seed", seed, "--out", f"seed{seed}"
        assert f"shards     about {shards[0]} of" in run("build", *options, "--dry-run").stdout
        assert f"in {shards}" in run("build", *options).stdout


def test_more_documents_are_advised_where_no_text_can_be_split(run):
    """A tester: --split-on was advised for JSON lines, and then refused."""
    write("a.jsonl", '{"text": "one document"}\n')
    error = run("build", "a.jsonl", "--out", "one").stderr
    assert "(1 in all): more documents are needed, or --val-tokens 0" in error
    error = run("build", "a.jsonl", "--out", "two", "--val-tokens", 30).stderr
    assert "nothing is left for training" in error
    assert "--split-on" not in error


def test_a_dry_run_refuses_what_the_run_refuses_at_once(run):
    """A tester: the plan of a build that could not begin looked fine."""
    write("a.csv", "title\nx\n")
    write("b.jsonl", '{"body": "x"}\n')
    write("c.txt", "")
    for name in "a.csv", "b.jsonl", "c.txt":
        assert refused(run, name, "--dry-run") == refused(run, name)
    assert run("build", "b.jsonl", "--column", "body", "--out", "x", "--dry-run").exit_code == 0


def test_a_folder_of_nothing_that_is_taken_says_why(run):
    """A tester: the refusal of a folder with one .json said that .json is taken."""
    write("f/a.json", '{\n "a": 1}')
    Path("f/b.txt").symlink_to("nothing")
    error = refused(run, "f")
    assert (
        "f is a folder with no file that is taken: passed over: f/a.json (one JSON object, not an array" in error
    )
    assert "f/b.txt (a link to nothing)" in error
    assert "taken are" not in error
    write("f/c.docx")
    assert "f/c.docx (of no known kind); taken are .parquet" in refused(run, "f")
    assert "no file matches '*.nothing'" in refused(run, "*.nothing")


def test_the_number_of_shards_is_bounded_before_work(run):
    """A new user: --shard-size 100, with the M forgotten, made half a million files."""
    write("a.txt", "some text " * 10**6)
    for dry in [], ["--dry-run"]:
        error = refused(run, "a.txt", "--shard-size", 100, *dry)
        assert "shard_size 100 would make about " in error
        assert "(was 100M meant?); the limit is 10,000 shards" in error


def test_names_of_any_bytes(tmp_path):
    """llama_index #10369, medusa #8364: "surrogates not allowed"; a real process, its output, and a resume."""
    name = os.fsdecode(b"caf\xe9 one")
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text('{"text": "one"}\n')
    (folder / "caf\\xe9 one.txt").write_text("two")
    (folder / f"{name}.txt").write_text("three")
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(folder / f"{name}.parquet")
    for format in "uint16", "arrow":
        out = tmp_path / os.fsdecode(b"out\xff" + format.encode())
        words = f"--out,{out},--format,{format},--val-tokens,0,--workers,1".split(",")
        process = [sys.executable, "-m", "gpt2_data", "build", str(folder), *words]
        done = subprocess.run(process, capture_output=True, text=True, check=False)
        assert (done.returncode, "tokens of 4 documents" in done.stdout) == (0, True), done.stderr
        assert "already built" in CliRunner().invoke(main, process[3:]).stdout
        names = [
            item["name"] for item in json.loads((out / "dataset.json").read_text("utf-8"))["source"]["inputs"]
        ]
        assert sorted(names) == sorted([
            *(rf"caf\xe9 one.{kind}" for kind in ("jsonl", "parquet", "txt")), r"caf\\xe9 one.txt",
        ])  # fmt: skip
        assert verify(out, "full").ok
        ids = [open_dataset(out).document("train", i).tolist()[1:] for i in range(4)]
        assert sorted(map(get_tokenizer().decode, ids)) == ["four", "one", "three", "two"]


def test_a_part_that_is_refused_leaves_nothing(run):
    """A refused build left OUT/.build/lock, and `info` then spoke of an unfinished build."""
    write("bad.jsonl", '{"text": "fine"}\n{]\n')
    assert "bad.jsonl:2: not JSON" in refused(run, "bad.jsonl", "--part", "2/2")
    Path("there").mkdir()
    assert run("build", "bad.jsonl", "--out", "there").exit_code == 1
    assert list(Path("there").iterdir()) == []


def test_an_interrupted_build_of_split_text_resumes(run, monkeypatch):
    """The receipts of a unit are those of its separator and its encoding."""
    write("a.txt", "\n".join(f"line {i} é" for i in range(400)))
    config = BuildConfig(["a.txt"], Path("out"), split_on="\n", encoding="latin-1", workers=1)

    def stop(what, *_):
        if what == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, stop)
    assert build(config).text_mb_per_second == 0  # nothing was tokenized again
    other = plan.make_plan(BuildConfig(["a.txt"], Path("out"), split_on="\n"))
    assert other.name != plan.make_plan(config).name
