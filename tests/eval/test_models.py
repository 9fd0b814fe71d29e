"""Any causal language model that transformers loads, scored as its own forward pass says."""

import json
import random
import shutil

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from gpt2_eval import score_items
from gpt2_eval.cli import main
from gpt2_eval.models import HFModel, joint, load_model
from gpt2_eval.packing import Row

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS, max_position_embeddings=64),
    "neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64),
    "gemma2": Gemma2Config(**SMALL, **HEADS, max_position_embeddings=64, final_logit_softcapping=2.0),
    "mamba": MambaConfig(**SMALL, state_size=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_model_s_own(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    draw = random.Random(1)
    items = [
        [Row(draw.choices(range(3, 97), k=9), draw.choices(range(3, 97), k=n)) for n in (1, 5, 3)] for _ in "abcd"
    ]
    ours = HFModel(model)
    assert (ours.head_weight is None) == (name == "gemma2")  # its logits are capped after the projection
    scored = score_items(ours, items, batch_size=5)
    for item, scores in zip(items, scored, strict=True):
        for row, score in zip(item, scores, strict=True):
            ids = torch.tensor([[*row.context, *row.continuation]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            taken = log_probs.gather(1, ids[0, 1:, None])[-len(row.continuation) :]
            assert score.logprob == pytest.approx(taken.sum().item(), abs=1e-3)


def test_what_is_no_causal_model_is_refused_in_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a causal language model: its predictions depend on later"):
        load_model(None, str(tmp_path), "cpu")
    T5Config().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="cannot load .* as a causal language model") as error:
            load_model(None, str(path), "cpu")
        assert len(str(error.value)) < 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with a tokenizer of its own, which begins each text with <s>."""
    folder = tmp_path_factory.mktemp("llama")
    words = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:'[]?!"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(folder)
    return folder


def test_its_tokenizer_is_used(folder):
    model, encoder = load_model(None, str(folder), "cpu")
    assert not encoder.is_gpt2
    row = joint(encoder, "ab", " cd")
    assert row.context[0] == 0  # <s>
    assert len(row.context) == 3
    assert 0 not in row.continuation
    assert joint(encoder, "", "cd").context == [0]
    assert model.config.block_size == 64


def test_by_the_command(folder, tmp_path, dataset_folder):
    file = tmp_path / "lambada.jsonl"
    file.write_text(json.dumps({"text": "a cat sat on a mat"}) + "\n")
    done = CliRunner().invoke(main, ["task", "lambada", "--hf", str(folder), "--data", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == str(folder)
    loss = CliRunner().invoke(main, ["loss", "--hf", str(folder), "--data", str(dataset_folder)])
    assert loss.exit_code == 1
    assert "has another tokenizer" in loss.stderr
