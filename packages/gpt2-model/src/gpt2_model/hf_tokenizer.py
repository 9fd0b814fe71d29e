"""GPT-2's tokenizer as the files by which transformers, vLLM and llama.cpp know it."""

import json
from typing import Any

from gpt2_model.config import GPTConfig
from gpt2_model.tokenizer import EOT, vocabulary_file


def tokenizer_files(config: GPTConfig) -> dict[str, Any]:
    """File name -> its bytes or its JSON: OpenAI's two, and the same as one tokenizer.json, whose
    `<|endoftext|>` is a special token (else llama.cpp takes it for text)."""
    merges = vocabulary_file("vocab.bpe").decode("utf-8")
    vocab = json.loads(vocabulary_file("encoder.json"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {
        "vocab.json": vocabulary_file("encoder.json"),
        "merges.txt": merges.encode("utf-8"),
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": EOT, **end, "special": True}],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "vocab": vocab,
                "merges": [line for line in merges.splitlines()[1:] if line],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": config.block_size,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        },
        "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    }
