"""Hugging Face: config.json to GPTConfig and back, and models on the hub."""

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2_model.checkpoints.files import checked_config, read_json, shard_names, short
from gpt2_model.checkpoints.tokenizer_files import TOKENIZER_FILES
from gpt2_model.config import GPTConfig

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WEIGHTS_FILES = tuple(name + suffix for name in _WEIGHTS for suffix in ("", ".index.json"))

# The names of GPTConfig's fields in config.json; the first is the one that we write.
_NAMES: dict[str, tuple[str, ...]] = {field.name: (field.name,) for field in fields(GPTConfig)} | {
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
}
# Fields that may ask for what GPT cannot compute, each with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "position_embedding_type": ("absolute", None),
    "quantization_config": (None,),
    "auto_map": ({}, None),  # code from elsewhere: we cannot know what it computes
    # transformers' mask and cache read these for any family, GPT-2 too: without is_causal, tokens see later ones.
    "is_causal": (True,),
    "per_layer_config": ({}, None),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "layer_types", "kv_sharing_modes"), (None,)),
    **dict.fromkeys(("text_config", "decoder", "generator", "transformers_weights"), (None,)),
    # These are all a plain GPT-2; heads beside the language model's are left out.
    "architectures": (["GPT2LMHeadModel"], ["GPT2Model"], ["GPT2DoubleHeadsModel"], [], None),
}
# Fields that change nothing in the logits of a model that is not being trained: dropouts, token ids, other heads,
# output formats, defaults of generate(), and what old versions of transformers wrote.
_HARMLESS = """
attn_pdrop embd_pdrop resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj initializer_range gradient_checkpointing use_cache is_decoder chunk_size_feed_forward n_ctx
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _from_model_config
_name_or_path _num_labels attn_implementation dtype torch_dtype torchscript transformers_version use_bfloat16
tf_legacy_loss onnx tokenizer_class model_max_length transformers.js_config scale_attn_by_layer_idx
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
decoder_start_token_id forced_bos_token_id forced_eos_token_id n_special predict_special_tokens
finetuning_task id2label label2id num_labels problem_type prefix task_specific_params
output_attentions output_hidden_states output_past output_scores return_dict return_dict_in_generate
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
temperature top_k top_p typical_p cross_attention_hidden_size tie_encoder_decoder
""".split()  # noqa: SIM905 - a line for each would be a page
# - n_ctx was the size of the causal mask. Models of the Hugging Face course have n_ctx 128 but 1,024 positions,
#   and use all of them: only n_positions counts, as in transformers.
# - scale_attn_by_layer_idx, in codeparrot's config.json, was meant to be scale_attn_by_inverse_layer_idx, but
#   nothing ever read it: codeparrot was trained without this scaling.


def read_config(path: Path) -> GPTConfig:
    """Return the GPTConfig in a config.json; a field that asks for what GPT cannot compute raises a ValueError.

    transformers' GPT-2 reads no other field, such as those of other families: a warning names them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a model folder: it has no config.json")
    raw = read_json(path)
    for name in sorted(raw.keys() & _NEUTRAL):
        if raw[name] not in _NEUTRAL[name]:
            needed = " or ".join(map(repr, _NEUTRAL[name])).removesuffix(" or None")
            raise ValueError(f"{path}: {name} = {short(raw[name])} is not supported (needs {needed})")
    if ignored := sorted(raw.keys() - set(chain(*_NAMES.values(), _NEUTRAL, _HARMLESS))):
        names = ", ".join(short(name)[1:-1] for name in ignored[:20]) + (", ..." if ignored[20:] else "")
        _warn_once(f"{path}: ignored, as transformers does for GPT-2: {names}")
    values = {}
    for field, aliases in _NAMES.items():
        present = [name for name in aliases if name in raw]
        if any(raw[name] != raw[present[0]] for name in present[1:]):
            given = " but ".join(f"{name} = {short(raw[name])}" for name in present)
            raise ValueError(f"{path} contradicts itself: {given}")
        if present:
            values[field] = raw[present[0]]
    return checked_config(path, **values)


@cache
def _warn_once(text: str) -> None:
    """Write a warning to stderr; of several processes (torchrun) only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def hf_config(config: GPTConfig, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json. transformers reads n_positions, llama.cpp n_ctx, vLLM architectures."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{names[0]: getattr(config, field) for field, names in _NAMES.items()},
        "n_ctx": config.block_size,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # as in our training: none
        "initializer_range": 0.02,
        **{"bos_token_id": None, "eos_token_id": None, **special_ids},
        "use_cache": True,
        "dtype": "float32",
    }


def download(name: str) -> Path:
    """Download "owner/model" or "owner/model@revision" into Hugging Face's cache; return the folder there.

    Short names ("gpt2") are not expanded: the hub redirects them, and the cache stores models under these names.
    Errors of the hub become one line: a FileNotFoundError, or an OSError if the connection failed.
    """
    from huggingface_hub import errors  # half a second, and only needed here
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call] # the errors below say it in one line
    login = "run `hf auth login` or set HF_TOKEN"
    absent = "is neither a local model folder nor a model on the hub (such as gpt2, gpt2-xl or distilgpt2)"
    unreachable = "is not a local model folder, is not in Hugging Face's cache, and the hub cannot be reached"
    messages = {  # the first that matches counts
        errors.LocalEntryNotFoundError: unreachable,
        errors.EntryNotFoundError: "on the hub lacks config.json or weights",
        errors.RevisionNotFoundError: "is not a revision of this model on the hub",
        errors.GatedRepoError: f"is gated: ask for access on its page on the hub, then {login}",
        errors.RepositoryNotFoundError: f"{absent}; if it is private, {login}",
        errors.HFValidationError: absent,
    }
    kinds: tuple[type[Exception], ...] = (*messages, errors.HfHubHTTPError)
    try:
        repository, _, revision = name.partition("@")
        return _download(repository, revision)
    except kinds as error:
        reason = f"could not be downloaded from the hub: {str(error).strip().splitlines()[0]}"
        text = next((text for kind, text in messages.items() if isinstance(error, kind)), reason)
        raise FileNotFoundError(f"{name} {text}") from None
    except (OSError, ValueError):  # a full disk, no permission to write, or an invalid index
        raise
    except Exception as error:  # the HTTP library's own, which huggingface_hub lets through
        raise OSError(f"the download of {name} failed again and again ({error}): try later") from None


def _download(repository: str, revision: str) -> Path:
    """Download config.json and the best weights that the model has; files in the cache need no network."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
    commit = config.parent.name  # for the other files too, even if the model changes meanwhile
    _download_tokenizer(repository, commit)
    cached = [f for f in WEIGHTS_FILES if isinstance(try_to_load_from_cache(repository, f, revision=commit), str)]
    for file in cached or WEIGHTS_FILES:
        try:
            weights = hf_hub_download(repository, file, revision=commit)
            break
        except errors.EntryNotFoundError as error:
            # If the hub cannot be reached, stop: each further file would take 23 s to fail.
            if file == WEIGHTS_FILES[-1] or isinstance(error, errors.LocalEntryNotFoundError):
                raise
    if weights.endswith(".json"):
        for shard in sorted(set(shard_names(Path(weights)).values())):
            hf_hub_download(repository, shard, revision=commit)
    return config.parent


def _download_tokenizer(repository: str, commit: str) -> None:
    """Download the tokenizer's files and generation_config.json, each of which may be absent."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    for file in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
        if try_to_load_from_cache(repository, file, revision=commit) is not None:
            continue  # it is there, or the hub has said that it is absent
        try:
            hf_hub_download(repository, file, revision=commit)
        except errors.LocalEntryNotFoundError:  # each further file would take 23 s to fail
            unknown = "is not in the cache, and the hub cannot be reached: the model may lack its own tokenizer"
            print(f"warning: {file} of {repository} {unknown}", file=sys.stderr)
            return
        except errors.EntryNotFoundError:
            pass
