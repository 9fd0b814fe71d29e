"""Folders we save, as others read them: transformers, and what vLLM and llama.cpp's converter ask for.

llama.cpp's convert_hf_to_gguf.py itself was run by hand on folders of two layers and of 124M: both convert, with
pre-tokenizer "gpt-2" and <|endoftext|> as the one control token. The tests below hold what it reads.
"""

import json
from hashlib import sha256

import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from gpt2_model import GPT, GPTConfig, get_tokenizer

VARIANTS = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "n_inner": {"n_inner": 96, "activation_function": "relu"},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "mistral": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
}
# The text by whose tokens the converter knows a tokenizer (convert_hf_to_gguf_update.py), and GPT-2's hash.
CHKTXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
CHKHSH = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_from_transformers_and_back_bit_equal(tmp_path, fields) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 32, "vocab_size": 211}
    config = transformers.GPT2Config(**sizes, **fields, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"  # the only one that honours reorder_and_upcast_attn
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    assert again.config.architectures == ["GPT2LMHeadModel"]
    for (name, before), after in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    tokens = torch.randint(0, 211, (2, 32))
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, theirs(tokens).logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("export")
    GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=128)).save_pretrained(path)
    return path


def test_what_llama_cpp_reads(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    read = ("n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon", "vocab_size", "architectures")
    assert [config[name] for name in read] == [2, 128, 64, 4, 1e-5, 50257, ["GPT2LMHeadModel"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert sha256(str(tokenizer.encode(CHKTXT)).encode()).hexdigest() == CHKHSH
    assert max(tokenizer.vocab.values()) == config["vocab_size"] - 1
    # A token that is added and special becomes a control token, and is not printed.
    assert tokenizer.added_tokens_decoder[50256].special
    assert tokenizer.get_added_vocab() == {"<|endoftext|>": 50256}
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert len(merges) == 50_000
    text = "Hello, world!  Naïve café\n\n 12345 it's 日本語 🙂\t<tab>"
    assert tokenizer.encode(text) == get_tokenizer().encode_ordinary(text)
    assert tokenizer.encode("<|endoftext|>") == [50256]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert config["bos_token_id"] == config["eos_token_id"] == 50256


def test_what_vllm_reads(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["dtype"] == "float32"
    assert not config["scale_attn_by_inverse_layer_idx"]  # it refuses these two
    assert not config["reorder_and_upcast_attn"]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert file.get_slice("transformer.h.0.mlp.c_fc.weight").get_shape() == [64, 256]  # (in, out)
    assert len(names) == 2 * 12 + 4
    assert all(name.startswith("transformer.") for name in names)  # no masks; a tied head once
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (50256, 50256)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "written"), [(50256, False), (50257, True), (50304, True), (50305, False)])
def test_tokenizer_files_go_with_gpt2s_vocabulary_padded_or_not(tmp_path, vocab_size, written) -> None:
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=vocab_size)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() == written
    if written:
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 50257


def test_a_model_in_bf16_is_saved_exactly(tmp_path) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=100)).bfloat16()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    again = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
