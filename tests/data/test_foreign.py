"""Datasets of others, laid out here by hand as their makers' programs do, and what may be wrong with them."""

import itertools
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from gpt2_data import TokenLoader, open_dataset, verify
from gpt2_data.formats import foreign

DOCUMENTS = [[50256, 1, 2], [50256], [50256, 3, 4, 5, 6], [50256, 7]]
STREAM = list(itertools.chain(*DOCUMENTS))


def u16(tokens):
    return struct.pack(f"<{len(tokens)}H", *tokens)


def npy(tokens, header=None, version=1):
    text = header or f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({len(tokens)},), }}"
    size = 2 if version == 1 else 4
    text = text.encode().ljust(128 - 9 - size) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(size, "little") + text + u16(tokens)


def llmc(tokens, count=None, magic=20240520, version=1):
    count = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, count, *[0] * 253) + u16(tokens)


def idx(lengths, positions=None, documents=None, kind=8, version=1, counts=None, tail=b""):
    if positions is None:
        positions = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    documents = list(range(len(lengths) + 1)) if documents is None else documents
    sequences, d = counts or (len(lengths), len(documents))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, kind, sequences, d)
    layout = f"<{len(lengths)}i{len(positions) + len(documents)}q"
    return header + struct.pack(layout, *lengths, *positions, *documents) + tail


LAYOUTS = {
    "npy": {
        "edufineweb_val_000000.npy": npy(STREAM[:4]),
        "edufineweb_train_000001.npy": npy(STREAM[:5]),
        "edufineweb_train_000002.npy": npy(STREAM[5:]),
    },
    "llmc": {
        "fineweb_val_000000.bin": llmc(STREAM[:4]),
        "fineweb_train_000001.bin": llmc(STREAM[:5]),
        "fineweb_train_000002.bin": llmc(STREAM[5:]),
    },
    "nanogpt": {"train.bin": u16(STREAM), "val.bin": u16(STREAM[:4]), "meta.pkl": b"not to be loaded"},
    "megatron": {
        "gpt2_train_text_document.bin": u16(STREAM),
        "gpt2_train_text_document.idx": idx([len(document) for document in DOCUMENTS]),
        "gpt2_valid_text_document.bin": u16(STREAM[:4]),
        "gpt2_valid_text_document.idx": idx([3, 1]),
        "gpt2_test_text_document.bin": u16([9]),
        "gpt2_test_text_document.idx": idx([1]),
    },
}


@pytest.mark.parametrize("chunk", [3, 1_000_000])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_is_read(folder, kind, chunk, monkeypatch):
    monkeypatch.setattr(foreign, "_CHUNK", chunk)  # documents are found across the pieces that are scanned
    dataset = open_dataset(folder(LAYOUTS[kind]))
    assert dataset.manifest.format == kind
    assert dataset.tokens("train") == len(STREAM)
    assert dataset.read("train", 0, len(STREAM)).tolist() == STREAM
    assert dataset.read("train", 4, 7).tolist() == STREAM[4:7]
    assert dataset.read("val", 0, 4).tolist() == STREAM[:4]
    assert [document.tolist() for document in dataset.documents("train")] == DOCUMENTS
    assert dataset.document("train", 2).tolist() == DOCUMENTS[2]
    assert (dataset.num_documents("train"), dataset.num_documents("val")) == (4, 2)
    with pytest.raises(ValueError, match="no split 'test'"):
        dataset.tokens("test")


def test_what_numpy_itself_writes(folder):
    where = folder({})
    np.save(where / "train_1.npy", np.array(STREAM, np.uint16))
    assert (where / "train_1.npy").read_bytes() == npy(STREAM)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_hash_tells_a_changed_dataset(folder, kind):
    where = folder(LAYOUTS[kind])
    loader = TokenLoader(where, batch_size=1, seq_len=3)
    next(loader)
    state = loader.state()
    TokenLoader(where, batch_size=1, seq_len=3).restore(state)
    name = next(name for name in LAYOUTS[kind] if "train" in name and not name.endswith("idx"))
    data = LAYOUTS[kind][name]
    (where / name).write_bytes(data[:-2] + b"\x09\x00")
    with pytest.raises(ValueError, match="the loader's state has dataset"):
        TokenLoader(where, batch_size=1, seq_len=3).restore(state)
    (where / name).write_bytes(data)
    assert open_dataset(where).manifest.hash == state["dataset"]


def test_the_hash_goes_through_a_large_file(folder):
    tokens = np.arange(1_000_000, dtype=np.uint16) % 50000
    where = folder({"train.bin": tokens.tobytes()})
    before = open_dataset(where).manifest.hash
    for at in 0, 500_000, 999_999:
        changed = tokens.copy()
        changed[at : at + 70_000] += 1
        (where / "train.bin").write_bytes(changed.tobytes())
        assert open_dataset(where).manifest.hash != before
    (where / "train.bin").write_bytes(tokens[::-1].tobytes())
    assert open_dataset(where).manifest.hash != before


PAIR = {"a.bin": u16(STREAM), "a.idx": idx([1, 2, 0, 6, 2], documents=[0, 2, 4, 5, 5])}


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        # nanoGPT's documents end with their EOT.
        ({"val.bin": u16([1, 2, 50256, 50256, 3, 50256])}, [], [[1, 2, 50256], [50256], [3, 50256]]),
        ({"train.bin": u16([5, 6])}, [[5, 6]], []),
        # build-nanogpt's validation shard ends within a document; what training begins with is none.
        ({"a_val_0.npy": npy([50256, 1]), "a_train_1.npy": npy([2, 50256, 3])}, [[50256, 3]], [[50256, 1]]),
        # llm.c's small datasets have no numbers.
        ({"tiny_train.bin": llmc(STREAM), "tiny_val.bin": llmc([50256, 8])}, DOCUMENTS, [[50256, 8]]),
        # Several of Megatron's pairs are one stream, and a document may have several sequences.
        (PAIR | {"b.bin": u16([2, 3]), "b.idx": idx([1, 1])}, [STREAM[:3], STREAM[3:9], STREAM[9:], [2], [3]], []),
    ],
)
def test_where_documents_begin(folder, files, train, val):
    dataset = open_dataset(folder(files))
    for split, wanted in ("train", train), ("val", val):
        assert [document.tolist() for document in dataset.documents(split)] == wanted
        assert dataset.num_documents(split) == len(wanted)


def test_megatron_by_the_beginning_of_its_names(folder):
    where = folder({"my_text.bin": u16(STREAM), "my_text.idx": idx([3, 1, 5, 2])})
    for path in where, where / "my_text", where / "my_text.bin", where / "my_text.idx":
        dataset = open_dataset(path)
        assert (dataset.tokens("train"), dataset.tokens("val"), dataset.num_documents("train")) == (11, 0, 4)
    with pytest.raises(ValueError, match="is not a dataset"):
        open_dataset(where / "my")


def test_there_is_nothing_to_verify_against(folder):
    with pytest.raises(ValueError, match="is nanoGPT's, with nothing to verify .*: gpt2-data convert .* can be"):
        verify(folder({"train.bin": u16(STREAM)}))


# --- folders that are not what they seem


U2 = "{'descr': '<u2', 'fortran_order': False, 'shape': "
FOLDERS = [
    ({}, r"is not a dataset: there is no dataset\.json in it, nor shards of build-nanogpt, llm\.c"),
    ({"shard.00000.mds": b"x", "index.json": b"{}"}, "is not a dataset"),
    ({"train_0.bin": llmc([1]), "train_0.docs": b""}, r"is not a dataset: there is no dataset\.json"),
    ({"a_train_1.npy": npy([1]), "train.bin": u16([1])}, "more than one dataset: train.bin is nanoGPT's"),
    ({"a_train_1.bin": llmc([1]), "x.bin": u16([1]), "x.idx": idx([1])}, "may be more than one dataset"),
    ({"a_train_1.bin": llmc([1]), "b_train_2.bin": llmc([1])}, "b_train_2.bin does not follow a_train_1.bin"),
    ({"a_train_1.npy": npy([1]), "a_train_3.npy": npy([1])}, "a_train_3.npy does not follow a_train_1.npy"),
    ({"a_train_1.npy": npy([1]), "a_train_01.npy": npy([1])}, "does not follow"),
    ({"a_train_1.bin": u16([1])}, "without its header"),
    ({"a_train_1.bin": llmc([1, 0], magic=20240801, version=7)}, "without its header"),
    ({"x_test.bin": u16([1]), "x_test.idx": idx([1])}, "holds test data only: x_test.bin"),
    ({"train.bin": b""}, "0 bytes are not a file of uint16 tokens"),
    ({"train.bin": b"abc"}, "3 bytes are not a file of uint16 tokens"),
    ({"train_1.bin": llmc([1], count=2**31 - 1)}, "cut short: header says 2,147,483,647 tokens"),
    ({"train_1.bin": llmc([1], count=-5)}, "header says -5 tokens"),
]
NPY = [
    (b"", "not a NumPy file"),
    (u16(STREAM * 9), "not a NumPy file"),
    (npy([1], version=2), "not a NumPy file of version 1"),
    (npy([1])[:100], "header cannot be read"),
    (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), "not a NumPy file of version 1"),
    (npy([1, 2])[:-1], "cut short: header says 2 tokens = 132 bytes, file has 131"),
    (npy([1, 2]) + b"x", "bytes after its end"),
    (npy([1], U2 + "(1099511627776,), }"), "cut short: header says 1,099,511,627,776 tokens"),
    (npy([1], U2 + "(-1,), }"), r"of shape \(-1,\), not one row"),
    (npy([1], U2 + "(1, 1), }"), "not one row"),
    (npy([1], "{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }"), "'<i4' .*, not one row of uint16"),
    (npy([1], "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), r"holds '\|O'"),
    (npy([1], "{'descr': '<u2', 'fortran_order': True, 'shape': (1,), }"), "columns first"),
    (npy([1], "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (1,), }"), "not one row of uint16"),
    (npy([1], "__import__('os').abort()"), "header cannot be read"),
    (npy([1], "(" * 117), "header cannot be read"),
    (pickle.dumps([1] * 100), "not a NumPy file"),
]
IDX = [
    (b"", "not a Megatron index"),
    (idx([11])[:33], "not a Megatron index"),
    (b"MMIDIDX\0\1" + idx([11])[9:], "not a Megatron index"),
    (idx([11], version=2), "version 2"),
    (idx([11], kind=4), r"tokens of kind 4: this program reads version 1 and GPT-2's uint16 \(8\)"),
    (idx([11])[:-1], "cut short: header says 1 sequences and 2 documents"),
    (idx([11], tail=b"\0"), "bytes after its end"),
    (idx([11], counts=(2**40, 2)), "cut short: header says 1,099,511,627,776 sequences"),
    (idx([11], counts=(1, 2**61)), "cut short"),
    (idx([11], counts=(2**64 - 1, 2**64 - 1)), "cut short"),
    (idx([-1]), "do not lie one after the other"),
    (idx([2**31 - 1]), r"a\.bin: cut short: header says 2,147,483,647 tokens"),
    (idx([5, 6], positions=[0, 8]), "do not lie one after the other"),
    (idx([5, 6], positions=[0, 2**62]), "do not lie one after the other"),
    (idx([5]), r"a\.bin: bytes after its end: header says 5 tokens = 10 bytes, file has 22"),
    (idx([5, 6], documents=[0, 2, 1]), "documents are out of order"),
    (idx([5, 6], documents=[-1, 1, 2]), "documents are out of order"),
    (idx([5, 6], documents=[0, 1, 3]), "documents are out of order or outside the 2 sequences"),
]


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        *((files, "", message) for files, message in FOLDERS),
        *(({"a_train_1.npy": data}, "a_train_1.npy", message) for data, message in NPY),
        *(({"a.bin": u16(STREAM), "a.idx": data}, "a.", message) for data, message in IDX),
    ],
)
def test_what_is_faulty_or_several_is_refused_by_name(folder, files, named, message):
    """The error is one line, and what a header claims costs no memory."""
    where = folder(files)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            open_dataset(where)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert str(where / named) in str(error.value)
