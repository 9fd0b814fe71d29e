"""gpt2-eval hellaswag | task | loss | compare | lm-eval."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from click_option_group import optgroup

from gpt2_eval.progress import speaking
from gpt2_model import command
from gpt2_model.command import PATH, SETTINGS, Size, print_json

CORPUS_NAMES = ("wikitext2", "wikitext103", "ptb")
TASK_NAMES = (
    "lambada", "piqa", "arc-easy", "arc-challenge", "winogrande", "openbookqa", "copa", "boolq", *CORPUS_NAMES,
)  # fmt: skip
user_errors = command.user_errors("use a smaller --batch-size, or --dtype bf16")


@dataclass(frozen=True)
class Run:
    """The options that all commands which evaluate have in common."""

    batch_size: int | None
    device: str
    dtype: str
    compile: bool
    as_json: bool
    model: str | None
    hf: str | None = None
    data: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        """Check the model's options, and that --out can be written, before minutes of scoring."""
        if (self.model is None) == (self.hf is None):
            raise click.UsageError("give either --model (a GPT-2) or --hf (any model that transformers loads)")
        if self.hf is not None and self.compile:
            raise ValueError("--compile works with --model alone, not with --hf")
        if self.out is None:
            return
        path = Path(self.out)
        if path.exists() and not path.is_file():
            raise ValueError(f"--out {path} is a {'folder' if path.is_dir() else 'device'}: name a plain file")
        if self.data is not None and path.resolve() == Path(self.data).resolve():
            raise ValueError(f"--out {path} is the file of --data: name another file")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"--out {path}: the folder {path.parent} does not exist or cannot be written to")


def _group(title: str, *options: Any) -> Any:
    """Return a decorator that gives a command these options under a title of its help."""

    def decorate(command: Any) -> Any:
        for add in reversed((optgroup(title), *options)):
            command = add(command)
        return command

    return decorate


MODEL = _group(
    "Model",
    optgroup.option("-m", "--model", type=PATH, metavar="MODEL",
                 help="Hub name, model folder, run's folder or checkpoint file of a GPT-2."),
    optgroup.option("--hf", type=PATH, metavar="NAME",
                 help="Instead of --model: any causal model that transformers loads."),
)  # fmt: skip
HARDWARE = _group(
    "Speed and precision",
    optgroup.option("-d", "--device", default="auto", help="cuda, mps, cpu, or auto."),
    optgroup.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
                 help="auto means fp32; bf16 (autocast) is faster on a GPU and changes scores slightly."),
    optgroup.option("--batch-size", type=click.IntRange(min=1), metavar="N",
                 help="Sequences in a forward pass; changes only the speed.  [default: automatic]"),
    optgroup.option("--compile", is_flag=True, help="Use torch.compile; worth it for long evaluations on a GPU."),
)  # fmt: skip
LIMIT = optgroup.option("--limit", type=click.IntRange(min=1), metavar="N",
                     help="Score only the first N items; the result is not comparable.")  # fmt: skip
AS_JSON = optgroup.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
ONLY_JSON = _group("Output", AS_JSON)
OUTPUT = _group(
    "Output",
    optgroup.option("--out", type=PATH, metavar="ITEMS.jsonl",
                 help="Also write the scores of each item; a killed command resumes from them."),
    AS_JSON,
)  # fmt: skip


@click.group(
    cls=command.ProgramGroup, context_settings=SETTINGS | {"auto_envvar_prefix": "GPT2_EVAL", "show_default": True}
)
@click.version_option(package_name="gpt2-eval", prog_name="gpt2-eval")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Evaluate a GPT-2; each number names its protocol.

    MODEL is a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any GPT-2's), a Hugging Face model folder (such
    as a training checkpoint), a run's folder (its newest checkpoint is used), or any other file that gpt2-model
    reads: see gpt2-model --help. With --hf, the same code scores any causal language model.

    On several GPUs: torchrun --nproc_per_node=8 -m gpt2_eval hellaswag ...
    """
    command.require_posix("gpt2-eval")


@main.command()
@MODEL
@optgroup("Data")
@optgroup.option("--data", type=PATH, metavar="FILE",
                 help="Path of hellaswag_val.jsonl.  [default: downloaded and checked]")  # fmt: skip
@optgroup.option("--protocol", type=click.Choice(["karpathy", "lm-eval", "both"]), default="both",
                 help="karpathy is build-nanogpt's and llm.c's, lm-eval is lm-evaluation-harness'.")  # fmt: skip
@LIMIT
@OUTPUT
@HARDWARE
@user_errors
def hellaswag(protocol: str, limit: int | None, **options: Any) -> None:
    """Score HellaSwag, zero-shot, by both protocols with published numbers.

    \b
    gpt2-eval hellaswag -m gpt2 -d cuda
    gpt2-eval hellaswag -m runs/a --data hellaswag_val.jsonl --protocol karpathy
    """
    run = Run(**options)
    from gpt2_eval.hellaswag import evaluate_hellaswag, load_hellaswag

    with speaking("reading and tokenizing HellaSwag"):  # before the model: bad data shows in a second
        items = load_hellaswag(run.data, limit=limit)
    with _loaded(run) as (model, _, scoring):
        _report(run, model, evaluate_hellaswag(model, items, protocol=protocol, **scoring))


@main.command(short_help="Score LAMBADA, PIQA, ARC, WikiText or another task.")
@click.argument("name", type=click.Choice(TASK_NAMES), metavar="NAME")
@MODEL
@optgroup("Data")
@optgroup.option("--data", type=PATH, metavar="FILE", help="The task's file.  [default: downloaded]")
@optgroup.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens between the starts of windows.  [default: the model's context]",
)
@optgroup.option(
    "--protocol",
    type=click.Choice(["raw", "hf-page"]),
    help="WikiText's text: the raw file, also by lm-eval's pages; or its lines joined by blank lines, as "
    "transformers' page on perplexity does.  [default: raw]",
)
@LIMIT
@OUTPUT
@HARDWARE
@user_errors
def task(name: str, stride: int | None, protocol: str | None, limit: int | None, **options: Any) -> None:
    """Score another zero-shot task, and show the GPT-2 paper's figure if there is one.

    \b
    lambada                      the last word of a passage
    piqa arc-easy arc-challenge winogrande openbookqa copa boolq
                                 multiple choice, by lm-evaluation-harness' prompts and metrics
    wikitext2 wikitext103 ptb    perplexity of a text per token, word and byte

    \b
    gpt2-eval task lambada -m gpt2
    gpt2-eval task wikitext2 -m gpt2 --stride 512
    """
    if name == "ptb" and protocol == "hf-page":
        raise click.UsageError("--protocol hf-page is of WikiText alone")
    if name in CORPUS_NAMES and (options["out"] or limit):
        raise click.UsageError(f"--out and --limit do not apply to {name}, which is one text")
    if name not in CORPUS_NAMES and (stride or protocol):
        raise click.UsageError(f"{'--stride' if stride else '--protocol'} does not apply to {name}")
    run = Run(**options)
    from gpt2_eval.corpora import evaluate_corpus, load_corpus
    from gpt2_eval.tasks import evaluate_task, load_task

    if name in CORPUS_NAMES:
        with speaking(f"reading {name}"):
            text = load_corpus(name, run.data)
        with _loaded(run) as (model, _, scoring):
            result = evaluate_corpus(model, text, stride=stride, protocol=protocol or "raw", **scoring)
            _report(run, model, result)
        return
    with speaking(f"reading {name}"):
        questions = load_task(name, run.data, limit=limit)
    with _loaded(run) as (model, _, scoring):
        _report(run, model, evaluate_task(model, questions, **scoring))


@main.command(short_help="Measure loss, perplexity and bits per byte on a dataset.")
@MODEL
@optgroup("Data")
@optgroup.option("--data", type=PATH, required=True, metavar="DIR", help="Dataset folder that gpt2-data built.")
@optgroup.option("--split", default="val", help="Split of the dataset.")
@optgroup.option("--tokens", type=Size(1), default="10Mi", metavar="N",
                 help="Score the split's first N tokens (10M, 64k), or all of a smaller split.")  # fmt: skip
@optgroup.option("--seq-len", type=click.IntRange(min=1), metavar="N",
                 help="Tokens in a window.  [default: the model's context]")  # fmt: skip
@OUTPUT
@HARDWARE
@user_errors
def loss(data: str, split: str, tokens: int, seq_len: int | None, **options: Any) -> None:
    """Measure loss in nats per token, perplexity and bits per byte, on the same tokens every time.

    \b
    gpt2-eval loss -m gpt2 --data data/fineweb-edu
    gpt2-eval loss -m runs/a/checkpoints/step-00005000 --data data/pydocs --tokens 64k
    """
    run = Run(data=data, **options)
    from gpt2_data import open_dataset
    from gpt2_eval.loss import count_targets, evaluate_loss, tokenizer_of

    with speaking(f"opening {data}"):
        dataset = open_dataset(data)
    count_targets(dataset, split, tokens)  # before the model: an empty split shows in a second
    with _loaded(run) as (model, encoder, scoring):
        if encoder is None:
            no = f"warning: {run.model} has no tokenizer: whether {data} holds its ids cannot be checked"
            click.echo(no, err=True)
        elif not encoder.same_ids(tokenizer_of(dataset)):
            raise ValueError(
                f"{data} holds the ids of a tokenizer, but {run.model or run.hf} has another tokenizer: build a "
                "dataset with the model's, as in gpt2-data build SOURCE --tokenizer MODEL_FOLDER --out DIR"
            )
        _report(run, model, evaluate_loss(model, dataset, split=split, tokens=tokens, seq_len=seq_len, **scoring))


@main.command(short_help="Compare two models on the same items.")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@ONLY_JSON
@user_errors
def compare(a: str, b: str, as_json: bool) -> None:
    """Compare two models on the same items, with a test of significance. A and B are files that --out wrote.

    \b
    gpt2-eval hellaswag -m gpt2 --out a.jsonl
    gpt2-eval hellaswag -m gpt2-medium --out b.jsonl
    gpt2-eval compare a.jsonl b.jsonl
    """
    from gpt2_eval import tables
    from gpt2_eval.compare import compare_files, verdict
    from gpt2_eval.report import finite

    items, metrics = compare_files(a, b)
    if as_json:
        figures = {name: asdict(one) for name, one in metrics.items()}
        print_json(finite({"items": items, "verdict": verdict(metrics)} | figures))
    else:
        tables.show_comparison(items, metrics, a, b)


@main.command("lm-eval", short_help="Score any task of lm-evaluation-harness.")
@optgroup("Model")
@optgroup.option("-m", "--model", type=PATH, metavar="MODEL", required=True,
                 help="Hub name, model folder, run's folder or checkpoint file of a GPT-2.")  # fmt: skip
@optgroup("Data")
@optgroup.option("--tasks", required=True, metavar="NAME,NAME", help="Tasks of lm-evaluation-harness.")
@optgroup.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question.")
@LIMIT
@ONLY_JSON
@HARDWARE
@user_errors
def lm_eval(tasks: str, num_fewshot: int | None, limit: int | None, **options: Any) -> None:
    """Score any task of lm-evaluation-harness; needs pip install 'gpt2-eval[lm-eval]'.

    \b
    gpt2-eval lm-eval -m gpt2 --tasks sciq,blimp --num-fewshot 0
    """
    try:
        with speaking("loading lm-evaluation-harness"):
            import lm_eval as harness
            from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("this needs lm-evaluation-harness: pip install 'gpt2-eval[lm-eval]'") from None
    from gpt2_eval.lm_eval_bridge import GPT2LM
    from gpt2_eval.ranks import rank_and_world_size

    run, names = Run(**options), [os.path.expanduser(name) for name in tasks.split(",")]
    with speaking("listing the harness' tasks"):
        manager = TaskManager()
        unknown = [name for name in names if not Path(name).exists() and not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    with _loaded(run) as (model, _, scoring):
        results = harness.simple_evaluate(
            GPT2LM(model, **scoring), tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit
        )
        if rank_and_world_size()[0] != 0:
            return
        if run.as_json:
            print_json({"model": run.model, "results": results["results"]})
        else:
            print(harness.utils.make_table(results))


@contextmanager
def _loaded(run: Run) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Yield the model, its tokenizer and the options of `score_items`, in torchrun's process group."""
    with speaking("loading torch"):
        import torch

        from gpt2_eval.models import load_model
        from gpt2_eval.ranks import process_group
        from gpt2_eval.resume import sole_writer

    command.keep_buffers()  # of 3.6 s for 2,000 positions of 124M on a CPU, 0.35 went into mapping memory
    with process_group() as rank, sole_writer(Path(run.out)) if run.out and not rank else nullcontext():
        with speaking(f"loading {run.model or run.hf}"):
            if run.compile:
                command.check_compiler(command.find_device(run.device), "no --compile")
            model, encoder = load_model(run.model, run.hf, run.device)
        scoring = {
            "batch_size": run.batch_size,
            "autocast_dtype": torch.bfloat16 if run.dtype == "bf16" else None,
            "compile": run.compile,
            "resume": None if run.out is None else Path(run.out),
            "progress": rank == 0,
        }
        try:
            yield model, encoder, scoring
        except KeyboardInterrupt:
            if run.out:
                click.echo(f"\nstopped: the same command resumes, from the scores beside {run.out}", err=True)
            raise


def _report(run: Run, model: Any, result: Any) -> None:
    """Write --out and print the result, on rank 0."""
    from gpt2_eval import tables
    from gpt2_eval.ranks import rank_and_world_size
    from gpt2_eval.report import finite, write_records
    from gpt2_eval.resume import remove_scores
    from gpt2_model import PRESETS

    if rank_and_world_size()[0] != 0:
        return
    if run.out is not None:
        path = Path(run.out)
        if path.exists():
            click.echo(f"--out {click.format_filename(path)}: replacing the existing file", err=True)
        write_records(path, result.records)
        remove_scores(path)
    device, dtype = str(next(model.parameters()).device), "bf16" if run.dtype == "bf16" else "fp32"
    # A name that is not UTF-8 is written with U+FFFD: neither a terminal nor JSON can hold it.
    data, name = (
        None if path is None else click.format_filename(path) for path in (run.data, run.model or run.hf)
    )
    where = {"model": name, "data": data, "device": device, "dtype": dtype}
    if run.as_json:
        return print_json(finite(result.as_dict() | where))
    size = next((name for name, shape in PRESETS.items() if shape == model.config), None)
    tables.show_result(result, size, f"{device}, {dtype}")
    if doubt := getattr(result, "doubt", ""):  # a LossResult has none: its dataset is the user's own
        click.secho(f"{doubt}: compare with numbers on this same file only", fg="yellow")
    click.echo(f"model {name}, data {data or 'as published'}")
