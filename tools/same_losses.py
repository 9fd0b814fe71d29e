"""Compare training by a commit's code and by the working tree's, bit for bit: python tools/same_losses.py BASE"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from safetensors import deserialize

from benchmarks.harness import ROOT, checkout, packages_of
from gpt2_model.command import SETTINGS

GOLDEN = ROOT / "tests" / "train" / "golden_losses.json"
# 800,000 parameters, two micro-batches per step; warmup, decay, clipping and the second epoch lie within 50 steps.
RUN: dict[str, Any] = {
    "steps": 50, "batch_tokens": 128, "seq_len": 16, "micro_batch": "4", "lr": 3e-3, "min_lr": 3e-4, "warmup": 10,
    "seed": 1, "precision": "fp32", "compile": "off", "device": "cpu", "eval_every": 0, "checkpoint_every": 0,
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32},
}  # fmt: skip


@click.command(context_settings=SETTINGS)
@click.argument("base", required=False)
@click.option("--flags", default="", help='More gpt2-train flags for both, such as "--optimizer muon --steps 20".')
@click.option("--write-golden", is_flag=True,
              help=f"Write {GOLDEN.relative_to(ROOT)} from the working tree instead.")  # fmt: skip
def main(base: str | None, flags: str, write_golden: bool) -> None:
    """Train a tiny model with the code of the commit BASE and with that of the working tree, on the same data.

    Print a JSON document that compares each step's loss and gradient norm, and the last checkpoint's weights and
    optimizer state. Exit with 0 if all are equal, with 1 if not.
    """
    if write_golden == (base is not None) or (write_golden and flags):
        raise click.UsageError("give a commit to compare with, or --write-golden alone")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the work trees are removed
    try:
        with tempfile.TemporaryDirectory(prefix="same-losses-") as name:
            if base is None:
                return _write_golden(Path(name))
            result = compare(Path(name), base, shlex.split(flags))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(result, indent=2))
    sys.exit(0 if result["equal"] else 1)


def compare(work: Path, base: str, flags: list[str]) -> dict[str, Any]:
    """Train both and compare them; `work` is an empty folder.

    Raises:
        ValueError: there is no such commit, or its code cannot train here: with the end of its output.
    """
    write_text(work / "text.jsonl")
    runs = [work / "base", work / "head"]
    with checkout(base) as tree:
        _build(tree, work / "text.jsonl", work / "data")  # a later version reads an earlier one's datasets
        for code, out in zip((tree, ROOT), runs, strict=True):
            _train(code, work / "data", out, flags)
    rows, tensors = _rows_that_differ(*runs), _tensors_that_differ(*runs)
    equal = not rows["steps_that_differ"] and not any(entry["differ"] for entry in tensors.values())
    return {"equal": equal, "base": tree.name, **rows, "tensors": tensors}


def write_text(path: Path) -> None:
    """Write 200 documents of 5 to 60 random words: about 6,000 tokens, always the same."""
    draw = random.Random(1)
    words = ["the", "a", "of", "and", "in", "is", "it", "cat", "dog", "sun", "sea", "runs", "sleeps"]
    words += ["under", "old"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read_rows(run: Path) -> list[dict[str, float]]:
    """Return the step, loss and gradient norm of each step of a run, with all digits, from metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows if "loss" in row]


def _rows_that_differ(base: Path, head: Path) -> dict[str, Any]:
    a, b = ({row["step"]: row for row in read_rows(run)} for run in (base, head))
    # They are compared as text, since NaN is not equal to itself.
    steps = [step for step in sorted({**a, **b}) if json.dumps(a.get(step)) != json.dumps(b.get(step))]
    largest = max((abs(a[n]["loss"] / b[n]["loss"] - 1) for n in steps if n in a and n in b), default=0.0)
    return {
        "steps": len(a),
        "steps_that_differ": len(steps),
        "first_difference": {"base": a.get(steps[0]), "head": b.get(steps[0])} if steps else None,
        "largest_relative_difference_of_losses": largest,
    }


def _tensors_that_differ(base: Path, head: Path) -> dict[str, dict[str, Any]]:
    """Return for each kind of tensor how many there are, and the names of those whose bytes differ."""
    kinds = {}
    for name in ("model", "optimizer"):
        files = [max((run / "checkpoints").glob("step-*")) / f"{name}.safetensors" for run in (base, head)]
        a, b = (dict(deserialize(file.read_bytes())) for file in files)  # type: ignore[no-untyped-call]
        different = sorted(key for key in {**a, **b} if a.get(key) != b.get(key))
        kinds[name] = {"tensors": len(a), "differ": len(different), "names": different}
    return kinds


def _build(tree: Path, text: Path, out: Path) -> None:
    build = "from gpt2_data.cli import main; main()"
    options = ["--val-tokens", "500", "--order", "source", "--workers", "1"]
    _python(tree, ["-c", build, "build", str(text), "--out", str(out), *options])


def _train(tree: Path, data: Path, out: Path, flags: list[str]) -> None:
    settings = RUN | {"data": data, "out": out}
    model = settings.pop("model")
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [word for name, value in model.items() for word in ("--model", f"{name}={value}")]
    _python(tree, ["-m", "gpt2_train", *words, *flags])


def _python(tree: Path, arguments: list[str]) -> None:
    """Run Python with a tree's packages, on one thread: with more, the order of sums could vary with the load."""
    environment = os.environ | {"PYTHONPATH": packages_of(tree), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{tree}: {' '.join(arguments[:2])} failed:\n{result.stderr[-2000:]}")


def _write_golden(work: Path) -> None:
    write_text(work / "text.jsonl")
    _build(ROOT, work / "text.jsonl", work / "data")
    _train(ROOT, work / "data", work / "run", [])
    rows = ",\n".join(f"    {json.dumps(row)}" for row in read_rows(work / "run"))
    torch = json.dumps(version("torch"))
    GOLDEN.write_text(f'{{\n  "torch": {torch},\n  "settings": {json.dumps(RUN)},\n  "rows": [\n{rows}\n  ]\n}}\n')
    click.echo(GOLDEN)


if __name__ == "__main__":
    main()
