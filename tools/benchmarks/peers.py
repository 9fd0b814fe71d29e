"""Cases of other projects: training steps, generation, HellaSwag. One that is not installed is absent."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from benchmarks.cases import KINDS, keep_buffers, random_model, stepping, writing
from benchmarks.data import model_folder
from benchmarks.harness import Bench, Ready
from benchmarks.suite import Work
from gpt2_eval import load_hellaswag, score_items
from gpt2_model import EOT, GPTConfig

Scores = list[list[float]]


def library(name: str) -> Any:
    """Import a package. Raises ValueError if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name.partition('.')[0]} is not installed") from None


def transformers_training(bench: Bench, work: Mapping[str, Any], compiled: bool = False) -> Ready:
    """Time transformers' GPT2LMHeadModel, whose loss shifts the labels by one."""
    step, transformers = Work(**work), library("transformers")
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {**step.shape, "n_positions": step.shape["block_size"]}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops)).to(bench.device).train()
    stepped = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return stepping(bench, step, model, optimizer, lambda x, y: stepped(x, labels=x, use_cache=False).loss)


def karpathy(bench: Bench, work: Mapping[str, Any], clone: str, folder: str) -> Ready:
    """Time nanoGPT's or build-nanogpt's model and optimizer, from a clone, compiled on a GPU."""
    step = Work(**work)
    if clone == "nanoGPT":
        sys.path.insert(0, folder)
        module = library("model")
        config = module.GPTConfig(**step.shape, vocab_size=50304, dropout=0.0, bias=True)
    else:  # the model alone: importing the file would download and train
        text = (Path(folder) / "train_gpt2.py").read_text(encoding="utf-8").partition("\nimport tiktoken")[0]
        module = sys.modules[clone] = ModuleType(clone)  # dataclasses look it up there
        module.__dict__["master_process"] = False  # the master process would print
        exec(text.replace("from hellaswag import", "# "), module.__dict__)
        config = module.GPTConfig(**step.shape, vocab_size=50304)
    model = module.GPT(config).to(bench.device)
    betas = [(0.9, 0.95)] if clone == "nanoGPT" else []
    optimizer = model.configure_optimizers(0.1, 1e-4, *betas, bench.device)
    stepped: Any = torch.compile(model) if bench.device == "cuda" else model
    torch.set_float32_matmul_precision("high")  # both do
    return stepping(bench, step, model, optimizer, lambda x, y: stepped(x, y)[1])


def transformers_generating(bench: Bench, precision: str, rows: int, new_tokens: int, fields: Any) -> Ready:
    """Time transformers' `generate`."""
    if precision == "int8":
        raise ValueError("no int8 for CPUs")
    folder, transformers = model_folder(bench, fields), library("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=KINDS[precision]).to(bench.device)
    model.generation_config.eos_token_id = None  # rows do not end, and no end is masked at each token

    def write(prompts: list[list[int]]) -> Sequence[Sequence[int]]:
        ids = torch.tensor(prompts, device=bench.device)
        options = {"do_sample": True, "top_k": 50, "max_new_tokens": new_tokens, "pad_token_id": EOT}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return cast(list[list[int]], tokens[:, ids.shape[1] :].tolist())

    return writing(GPTConfig(**fields), precision, rows, new_tokens, write)


def ctranslate2(bench: Bench, precision: str, rows: int, new_tokens: int, fields: Any) -> Ready:
    """Time CTranslate2 with the same weights."""
    ct2, folder = library("ctranslate2"), Path(bench.folder, "ctranslate2")
    kind = str(KINDS[precision]).removeprefix("torch.")
    if kind not in ct2.get_supported_compute_types(bench.device):
        raise ValueError(f"no {kind} on this machine")
    if not folder.exists():
        library("transformers").utils.logging.disable_progress_bar()
        converter = library("ctranslate2.converters").TransformersConverter(str(model_folder(bench, fields)))
        converter.convert(str(folder))
    model = ct2.Generator(str(folder), device=bench.device, compute_type=kind, intra_threads=bench.threads)
    words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    lengths = {"max_length": new_tokens, "min_length": new_tokens, "include_prompt_in_result": False}

    def write(prompts: list[list[int]]) -> Sequence[Sequence[int]]:
        texts = [[words[token] for token in prompt] for prompt in prompts]
        return [one.sequences_ids[0] for one in model.generate_batch(texts, sampling_topk=50, **lengths)]

    return writing(GPTConfig(**fields), precision, rows, new_tokens, write)


def hellaswag(bench: Bench, data: str, count: int, method: str, fields: Mapping[str, int]) -> Ready:
    """Time items of HellaSwag with our code, build-nanogpt's method or lm-evaluation-harness.

    Ours scores all items in one call, as a user would. The others, whose speed does not depend on the number of
    items, score a part of them in each round.
    """
    items = load_hellaswag(data or None, limit=count).items
    contenders = {"build-nanogpt": _plain, "harness": _harness}
    score = contenders.get(method, _ours)(bench, fields, method)
    size = max(1, len(items) // bench.rounds) if method in contenders else len(items)
    starts = cycle(range(0, len(items) - size + 1, size))
    score(items[:12])  # to warm up

    def call() -> dict[str, Any]:
        start = next(starts)
        scores = score(items[start : start + size])
        return {"answer": {f"score of item {start + i}": row for i, row in enumerate(scores)}}

    return Ready(call, size, warm_up=0)


def _ours(bench: Bench, fields: Mapping[str, int], protocol: str) -> Callable[[Sequence[Any]], Scores]:
    keep_buffers()
    model, kind = random_model(bench, fields), torch.bfloat16 if bench.device == "cuda" else None

    def score(items: Sequence[Any]) -> Scores:
        scored = score_items(model, [item.rows[protocol] for item in items], autocast_dtype=kind)
        return [[row.logprob for row in rows] for rows in scored]

    return score


def _plain(bench: Bench, fields: Mapping[str, int], _: str) -> Callable[[Sequence[Any]], Scores]:
    """Score one item at a time: run its four rows, padded to the longest, through the model; then mask."""
    transformers, device = library("transformers"), bench.device
    model = transformers.GPT2LMHeadModel.from_pretrained(model_folder(bench, fields)).to(device).eval()

    @torch.no_grad()
    def score(item: Any) -> list[float]:
        rows = item.rows["karpathy"]
        longest = max(len(row.context) + len(row.continuation) for row in rows)
        tokens, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids = [*row.context, *row.continuation]
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, len(row.context) : len(ids)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens).logits
        flat = logits[:, :-1].contiguous().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        return (-(losses * mask[:, 1:]).sum(1)).tolist()

    return lambda items: [score(item) for item in items]


def _harness(bench: Bench, fields: Mapping[str, int], _: str) -> Callable[[Sequence[Any]], Scores]:
    """Score the same rows with lm-evaluation-harness' model class, which sorts them and batches them by 16."""
    kind, folder = "bfloat16" if bench.device == "cuda" else "float32", str(model_folder(bench, fields))
    model = library("lm_eval.models.huggingface").HFLM(
        pretrained=folder, device=bench.device, dtype=kind, batch_size=16
    )

    def score(items: Sequence[Any]) -> Scores:
        rows = [row for item in items for row in item.rows["lm-eval"]]
        requests = [((str(i), ""), row.context, row.continuation) for i, row in enumerate(rows)]
        flat = [logprob for logprob, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
        return [flat[i : i + 4] for i in range(0, len(flat), 4)]

    return score
