"""gpt2-eval hellaswag | task | loss | compare | lm-eval."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from gpt2_eval import __version__
from gpt2_model.command import PATH, out_of_memory

if TYPE_CHECKING:  # torch takes two seconds to import: no module that needs it is, before work starts
    from gpt2_eval.scoring import LanguageModel

P = ParamSpec("P")
R = TypeVar("R")

CORPUS_NAMES = ("wikitext2", "wikitext103", "ptb")
TASK_NAMES = (
    "lambada", "piqa", "arc-easy", "arc-challenge", "winogrande", "openbookqa", "copa", "boolq", *CORPUS_NAMES,
)  # fmt: skip


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what the user can mend (ValueError, OSError) into one line and exit 1; `--debug` shows all of it."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # click ends quietly
        except KeyboardInterrupt:
            if kwargs.get("out"):
                text = f"\nstopped: the same command goes on, from what is kept beside {kwargs['out']}"
                click.echo(text, err=True)
            raise SystemExit(130) from None
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            full, text = out_of_memory(error), "out of memory: use a smaller --batch-size, or --dtype bf16"
            ours = full or isinstance(error, ValueError | OSError)
            if not ours or click.get_current_context().find_root().params["debug"]:
                raise
            raise click.ClickException(text if full else " ".join(str(error).split())) from None

    return wrapped


def parse_size(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """A count, as in 10485760, 64k, 10M, 1.5B: text -> a positive int; usage error for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text, re.IGNORECASE)
    count = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0
    if count < 1 or count != int(count):
        raise click.BadParameter(f"{text!r} is not a size like 10485760, 64k or 1.5B")
    return int(count)


def options(*chosen: Callable[[Any], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Several options at once, in the order of the help."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


MODEL = options(
    click.option("-m", "--model", type=PATH, metavar="MODEL",
                 help="Hub name, model folder or checkpoint file of a GPT-2."),
    click.option("--hf", metavar="NAME", help="Instead: any causal language model that transformers loads."),
)  # fmt: skip
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="The first N items only: not comparable.")
OUT = click.option("--out", type=PATH, metavar="ITEMS.jsonl",
                   help="Also write what each item scored; resumes if killed.")  # fmt: skip
RUN = options(
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N",
                 help="Sequences in a forward pass: changes speed only.  [default: by tokens]"),
    click.option("-d", "--device", default="auto", show_default=True, help="cuda, mps, cpu, or auto."),
    click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
                 help="auto: fp32. bf16 (autocast) is faster on a GPU, and moves scores a little."),
    click.option("--compile", is_flag=True, help="torch.compile: pays on a GPU with much to score."),
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPT2_EVAL"})
@click.version_option(__version__, prog_name="gpt2-eval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """What a GPT-2 scores, with the name of the protocol beside each number.

    MODEL is a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2's), a Hugging Face model folder
    (a training checkpoint is one), or any other checkpoint that gpt2-model reads: see gpt2-model --help. With --hf
    any causal language model is scored by the same code.

    On several GPUs: torchrun --nproc_per_node=8 -m gpt2_eval hellaswag ...
    """


@main.command()
@MODEL
@click.option("--data", type=PATH, metavar="FILE",
              help="hellaswag_val.jsonl; without it, it is downloaded and checked.")  # fmt: skip
@click.option("--protocol", type=click.Choice(["karpathy", "lm-eval", "both"]), default="both", show_default=True,
              help="karpathy: build-nanogpt's and llm.c's; lm-eval: lm-evaluation-harness'.")  # fmt: skip
@LIMIT
@OUT
@RUN
@JSON
@user_errors
def hellaswag(
    model: str | None, hf: str | None, data: str | None, protocol: str, limit: int | None, out: str | None,
    as_json: bool, **run: Any,
) -> None:  # fmt: skip
    """HellaSwag, zero-shot, by both protocols that publish numbers.

    \b
    gpt2-eval hellaswag -m gpt2 -d cuda
    gpt2-eval hellaswag -m runs/a/checkpoints/step-00005000 --data hellaswag_val.jsonl --protocol karpathy
    """
    _check_model(model, hf)
    out_path = _writable(out, data)
    from gpt2_eval import tables
    from gpt2_eval.hellaswag import evaluate_hellaswag, load_hellaswag

    with _ranks() as rank:
        items = load_hellaswag(data, limit=limit)  # before the model: bad data shows in a second
        loaded, encoder, device = _load(model, hf, run)
        if not encoder.is_gpt2:
            items = load_hellaswag(data, limit=limit, encoder=encoder)
        result = evaluate_hellaswag(loaded, items, protocol=protocol, **_scoring(run, out_path, rank))
        if rank == 0:
            _write(out_path, result.records)
            show = partial(tables.show_hellaswag, result, items.total)
            _tell(result.as_dict(), show, as_json, model or hf, data, device, run)


@main.command(short_help="LAMBADA, PIQA, ARC, WikiText and more, one at a time.")
@click.argument("name", type=click.Choice(TASK_NAMES), metavar="NAME")
@MODEL
@click.option("--data", type=PATH, metavar="FILE", help="The task's file; without it, it is downloaded.")
@click.option("--stride", type=click.IntRange(min=1), metavar="N",
              help="Of the windows over a text.  [default: the model's context]")  # fmt: skip
@LIMIT
@OUT
@RUN
@JSON
@user_errors
def task(
    name: str, model: str | None, hf: str | None, data: str | None, stride: int | None, limit: int | None,
    out: str | None, as_json: bool, **run: Any,
) -> None:  # fmt: skip
    """Another zero-shot task, with the GPT-2 paper's figure beside it where there is one.

    \b
    lambada                      the last word of a passage
    piqa arc-easy arc-challenge winogrande openbookqa copa boolq
                                 choices, by lm-evaluation-harness' prompts and metrics
    wikitext2 wikitext103 ptb    perplexity of a text per token, word and byte

    \b
    gpt2-eval task lambada -m gpt2
    gpt2-eval task wikitext2 -m gpt2 --stride 512
    """
    _check_model(model, hf)
    if name in CORPUS_NAMES and (out or limit):
        raise click.UsageError(f"{name} is one text: it has no items for --out or --limit")
    if name not in CORPUS_NAMES and stride:
        raise click.UsageError(f"{name} has no windows for --stride")
    out_path = _writable(out, data)
    from gpt2_eval import tables
    from gpt2_eval.corpora import evaluate_corpus, load_corpus
    from gpt2_eval.tasks import evaluate_task, load_task

    with _ranks() as rank:
        if name in CORPUS_NAMES:
            text = load_corpus(name, data)
            loaded, encoder, device = _load(model, hf, run)
            found = evaluate_corpus(loaded, text, stride=stride, encoder=encoder, **_scoring(run, None, rank))
            if rank == 0:
                show = partial(tables.show_corpus, found, _size(loaded))
                _tell(found.as_dict(), show, as_json, model or hf, data, device, run)
            return
        questions = load_task(name, data, limit=limit)
        loaded, encoder, device = _load(model, hf, run)
        result = evaluate_task(loaded, questions, encoder=encoder, **_scoring(run, out_path, rank))
        if rank == 0:
            _write(out_path, result.records)
            show = partial(tables.show_task, result, questions.total, _size(loaded))
            _tell(result.as_dict(), show, as_json, model or hf, data, device, run)


@main.command(short_help="Loss, perplexity and bits per byte on a dataset.")
@MODEL
@click.option("--data", type=PATH, required=True, metavar="DIR", help="Dataset folder, as gpt2-data builds it.")
@click.option("--split", default="val", show_default=True, help="Split of the dataset.")
@click.option("--tokens", callback=parse_size, default="10485760", show_default=True, metavar="N",
              help="Score the split's first N tokens (10M, 64k); all of a smaller split.")  # fmt: skip
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens a window.  [default: the model's context]")
@OUT
@RUN
@JSON
@user_errors
def loss(
    model: str | None, hf: str | None, data: str, split: str, tokens: int, seq_len: int | None, out: str | None,
    as_json: bool, **run: Any,
) -> None:  # fmt: skip
    """Loss in nats per token, perplexity and bits per byte on the same tokens every time.

    \b
    gpt2-eval loss -m gpt2 --data data/fineweb-edu
    gpt2-eval loss -m runs/a/checkpoints/step-00005000 --data data/pydocs --tokens 64k
    """
    _check_model(model, hf)
    out_path = _writable(out, data)
    from gpt2_data import open_dataset
    from gpt2_eval import tables
    from gpt2_eval.loss import count_targets, evaluate_loss

    dataset = open_dataset(data)
    count_targets(dataset, split, tokens)  # before the model: an empty split shows in a second
    with _ranks() as rank:
        loaded, encoder, device = _load(model, hf, run)
        if not encoder.is_gpt2:
            raise ValueError(f"{data} holds GPT-2's tokens, and {hf} has another tokenizer: give one with GPT-2's")
        result = evaluate_loss(
            loaded, dataset, split=split, tokens=tokens, seq_len=seq_len, **_scoring(run, out_path, rank)
        )
        if rank == 0:
            _write(out_path, result.records)
            found = {"task": "loss", "split": split, "dataset": dataset.manifest.hash, **result.as_dict()}
            _tell(found, partial(tables.show_loss, result, split), as_json, model or hf, data, device, run)


@main.command(short_help="Two models on the same items: which is better?")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@JSON
@user_errors
def compare(a: str, b: str, as_json: bool) -> None:
    """Two models on the same items, from the files that --out wrote: which is better, and may it be chance?

    \b
    gpt2-eval hellaswag -m gpt2 --out a.jsonl
    gpt2-eval hellaswag -m gpt2-medium --out b.jsonl
    gpt2-eval compare a.jsonl b.jsonl
    """
    from dataclasses import asdict

    from gpt2_eval import tables
    from gpt2_eval.compare import compare as compare_files
    from gpt2_eval.report import json_text

    items, found = compare_files(a, b)
    if as_json:
        click.echo(json_text({"items": items} | {name: asdict(one) for name, one in found.items()}, indent=2))
    else:
        tables.show_comparison(items, found, a, b)


@main.command("lm-eval", short_help="Any task of lm-evaluation-harness.")
@click.option("-m", "--model", type=PATH, metavar="MODEL", required=True,
              help="Hub name, folder or file of a GPT-2.")  # fmt: skip
@click.option("--tasks", required=True, metavar="NAME,NAME", help="Tasks of lm-evaluation-harness.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question.")
@LIMIT
@RUN
@JSON
@user_errors
def lm_eval(model: str, tasks: str, num_fewshot: int | None, limit: int | None, as_json: bool, **run: Any) -> None:
    """Any task of lm-evaluation-harness, scored here: pip install 'gpt2-eval[lm-eval]'.

    \b
    gpt2-eval lm-eval -m gpt2 --tasks sciq,blimp --num-fewshot 0
    """
    try:
        import lm_eval as harness
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("this needs lm-evaluation-harness: pip install 'gpt2-eval[lm-eval]'") from None
    from gpt2_eval.lm_eval_bridge import GPT2LM

    manager, names = TaskManager(), tasks.split(",")
    unknown = [name for name in names if not Path(name).exists() and not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    with _ranks() as rank:
        gpt, _, _ = _load(model, None, run)
        found = harness.simple_evaluate(
            model=GPT2LM(gpt, **_scoring(run, None, rank)),
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
        )
        if rank == 0 and as_json:
            click.echo(json.dumps({"model": model, "results": found["results"]}, indent=2))
        elif rank == 0:
            click.echo(harness.utils.make_table(found))


def _check_model(model: str | None, hf: str | None) -> None:
    if (model is None) == (hf is None):
        raise click.UsageError("give one of --model, for a GPT-2, and --hf, for any model that transformers loads")


def _load(model: str | None, hf: str | None, run: Mapping[str, Any]) -> "tuple[Any, Any, str]":
    """(model, its encoder, its device)."""
    from gpt2_eval.models import load_model
    from gpt2_model.command import keep_buffers

    keep_buffers()  # of 3.6 s for 2,000 positions of 124M on a CPU, 0.35 went into mapping memory
    loaded, encoder = load_model(model, hf, run["device"])
    return loaded, encoder, str(next(loaded.parameters()).device)


def _size(model: "LanguageModel") -> str | None:
    """Of GPT-2's four sizes the one that this model has."""
    from gpt2_model import PRESETS

    return next((name for name, shape in PRESETS.items() if shape == model.config), None)


def _scoring(run: Mapping[str, Any], out: Path | None, rank: int) -> dict[str, Any]:
    import torch

    return {
        "batch_size": run["batch_size"],
        "autocast_dtype": torch.bfloat16 if run["dtype"] == "bf16" else None,
        "compile": run["compile"],
        "resume": out,
        "progress": rank == 0 and sys.stderr.isatty(),
    }


def _tell(
    result: dict[str, Any], show: Callable[[str], None], as_json: bool, model: str | None, data: str | None,
    device: str, run: Mapping[str, Any],
) -> None:  # fmt: skip
    """As JSON, or by `show`, which is told where and how it was computed; no `data` is the published file."""
    dtype = "bf16" if run["dtype"] == "bf16" else "fp32"
    if not as_json:
        show(f"{device}, {dtype}")
        return click.echo(f"model {model}, data {data or 'as published'}")
    from gpt2_eval.report import json_text

    click.echo(json_text(result | {"model": model, "data": data, "device": device, "dtype": dtype}, indent=2))


def _writable(name: str | None, data: str | None) -> Path | None:
    """`name` as a path that a file can be written to, found out before minutes of scoring."""
    if name is None:
        return None
    path = Path(name)
    if path.exists() and not path.is_file():
        raise ValueError(f"--out {name} is a {'folder' if path.is_dir() else 'device'}: name a plain file")
    if data is not None and path.resolve() == Path(data).resolve():
        raise ValueError(f"--out {name} is the file of --data: name another")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {name}: the folder {path.parent} does not exist or cannot be written to")
    return path


def _write(path: Path | None, records: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        from gpt2_eval.report import write_records
        from gpt2_eval.unfinished import remove_unfinished

        if path.exists():
            click.echo(f"--out {path}: what was in it is replaced", err=True)
        try:
            write_records(path, records)
        except OSError as error:
            raise OSError(f"--out {path}: {error}; the scores are kept, the same command writes them") from error
        remove_unfinished(path)


@contextmanager
def _ranks() -> Iterator[int]:
    """This process's rank, in torchrun's process group while the block runs; 0 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # only records of a few bytes travel, and they are on the CPU
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
