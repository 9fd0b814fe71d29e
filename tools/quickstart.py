"""The whole pipeline on a small model, offline: text -> shards -> training -> evaluation -> new text.

Each step is a command that is printed before it runs, so that it can be repeated, and changed, by hand.
"""

import json
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from gpt2_data import get_tokenizer, open_dataset
from gpt2_model.command import SETTINGS

# A 7M-parameter GPT-2 with the real vocabulary: most of it is the embedding. Batches are small, so that there are
# enough updates in two minutes: 1,024 tokens per step did as well after 180,000 tokens as 2,048 did after
# 400,000.
STEPS = 220
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}
TRAINING = {
    "steps": STEPS, "batch-tokens": 1024, "seq-len": 256, "lr": 2e-3, "min-lr": 2e-4, "warmup": 20,
    "eval-every": STEPS // 2, "eval-tokens": 16384, "num-samples": 2, "sample-prompt": "The function returns",
    "checkpoint-every": STEPS // 2, "keep": 1,
}  # fmt: skip
HELLASWAG_ITEMS = 200
heading = partial(click.secho, bold=True)


@click.command(context_settings=SETTINGS)
@click.option("--out", default="quickstart", show_default=True, type=click.Path(path_type=Path), help="Folder.")
def main(out: Path) -> None:
    """Build a dataset from Python's own documentation, train a small GPT-2, evaluate it, and generate text."""
    started = time.monotonic()
    data, run, items = out / "data", out / "run", out / "hellaswag.jsonl"
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    click.echo("Every command below can be typed by hand, after: source .venv/bin/activate")

    heading("\n1. Text to tokens: the documentation and the source code that come with Python")
    command("gpt2-data", "build", "pydocs", "--out", data, "--order", "shuffled", "--val-tokens", "200k")

    heading("\n2. A test in HellaSwag's format, from the documents that are held out for validation")
    if not items.exists():
        write_items(data, items)

    heading("\n3. Training: about two minutes on two cores")
    model = [part for name, value in MODEL.items() for part in ("--model", f"{name}={value}")]
    settings = [part for name, value in TRAINING.items() for part in (f"--{name}", value)]
    command("gpt2-train", "--data", data, "--out", run, *model, *settings, "--hellaswag", items)

    heading("\n4. Evaluation: loss on held-out text, and which of four endings belongs to a text")
    command("gpt2-eval", "loss", "-m", checkpoint, "--data", data, "--tokens", TRAINING["eval-tokens"])
    command("gpt2-eval", "hellaswag", "-m", checkpoint, "--data", items, "--protocol", "karpathy")

    heading("\n5. Generated text (two minutes teach indentation and common words), and the loss curve")
    words = ("--max-new-tokens", 48, "--temperature", 0.8, "The function returns")
    command("gpt2-model", "generate", "-m", checkpoint, *words)
    command("python", "tools/plot.py", run, "--out", out / "loss.png")
    summary(out, checkpoint, time.monotonic() - started)


def command(program: str, *arguments: Any) -> None:
    """Print a command, run it in this environment, and stop here if it fails."""
    words = [str(argument) for argument in arguments]
    click.secho("$ " + shlex.join([program, *words]), fg="cyan")
    path = sys.executable if program == "python" else Path(sysconfig.get_path("scripts")) / program
    if code := subprocess.run([path, *words], check=False).returncode:
        sys.exit(code)  # the command has said why


def write_items(data: Path, path: Path) -> None:
    """Write HELLASWAG_ITEMS questions: 300 characters of a document, and four endings, one of which is its own.

    The wrong endings come from three other documents, and their words are about as frequent as the right one's:
    otherwise the choice would depend on which ending has the more common words, whatever the context.
    """
    dataset, tokenizer, chosen = open_dataset(data), get_tokenizer(), random.Random(0)
    counts = np.bincount(dataset.read("train", 0, dataset.tokens("train")), minlength=tokenizer.n_vocab)
    log_frequency = np.log((counts + 1) / counts.sum())

    def mean_frequency(ending: str) -> float:
        return float(log_frequency[tokenizer.encode_ordinary(f" {ending}")].mean())

    texts = [tokenizer.decode(tokens[1:].tolist()) for tokens in dataset.documents("val")]
    pieces = [[(context, ending, mean_frequency(ending)) for context, ending in cut(text)] for text in texts]
    pieces = list(filter(None, pieces))
    lines = []
    for number in range(HELLASWAG_ITEMS):
        own = number % len(pieces)
        context, right, frequency = chosen.choice(pieces[own])
        closest = sorted(
            min((abs(other - frequency), ending) for _, ending, other in of_document)
            for document, of_document in enumerate(pieces)
            if document != own
        )
        endings, label = [ending for _, ending in closest[:3]], chosen.randrange(4)
        endings.insert(label, right)
        item = {
            "ind": number, "activity_label": "Python", "ctx_a": context, "ctx_b": "", "ctx": context,
            "endings": endings, "label": label, "split": "val", "source_id": f"document~{own}",
        }  # fmt: skip
        lines.append(json.dumps(item) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    click.echo(f"{len(lines)} items from {len(pieces)} documents in {path}")


def cut(text: str) -> Iterator[tuple[str, str]]:
    """Yield neighbouring (context, ending) pairs of a document, about 300 and 100 characters; endings are prose.

    It cuts before a word, since HellaSwag's protocol puts one space between the two.
    """
    word, end, place = re.compile(r"(?<=\S) (?=[A-Za-z])"), re.compile(r"(?<=\S)(?=\s)"), 0
    while (start := word.search(text, place + 300)) and (stop := end.search(text, start.end() + 100)):
        ending = text[start.end() : stop.start()]
        if len(ending) < 150 and sum(char.isalpha() or char == " " for char in ending) >= 0.9 * len(ending):
            yield text[max(place, start.start() - 300) : start.start()], ending
        place = stop.start()


def summary(out: Path, checkpoint: Path, seconds: float) -> None:
    """Print the results, and where they are."""
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [(row["val_loss"], row["hellaswag_acc_norm"]) for row in rows if "val_loss" in row]
    (loss_before, right_before), (loss, right) = evaluations[0], evaluations[-1]
    error = (right * (1 - right) / HELLASWAG_ITEMS) ** 0.5
    heading(f"\nDone in {seconds:.0f} s")
    click.echo(f"""
  as training measured it     untrained   trained
  validation loss             {loss_before:9.2f} {loss:9.2f}   nats per token
  right ending of four        {right_before:9.1%} {right:9.1%}   +- {error:.1%}; an untrained
                                                    model has its own leanings: 15 to 28 %

  {out / "loss.png"}        the loss curve
  {out / "data"}            the dataset: gpt2-data info {out / "data"}
  {checkpoint}
                            the model, in Hugging Face's format

README.md has the same commands for OpenAI's weights, your own text, and 8 GPUs.""")
    if loss_before - loss < 3:  # 10.8 -> 5.3
        raise click.ClickException("the trained model is hardly better than the untrained one: please report this")


if __name__ == "__main__":
    main()
