"""`bench.py decode`: who is timed when, what follows from the samples, and how it is shown."""

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench_contenders as contenders
from bench_report import bar, in_short, say, spread

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
PEERS = {"transformers": "ours/transf.", "ctranslate2": "ours/CT2"}  # and the heads of the ratios to them
CUDA_BATCHES = (1, 8, 32, 128, 256)
PROMPT = "Hello"
DEFINITIONS = {
    "seconds_to_first_token": "a call for one new token, prompt included: the median of three calls a round",
    "tokens_per_second": "of the whole batch, after the first token: "
    "(new tokens - 1) * rows / (time of a call for all of them - time to the first token)",
    "ms_per_token": "rows / tokens_per_second: what one step of the whole batch takes",
    "memory": "512 MiB that were written before, read by as many threads: the fastest of 8 passes before and 8 "
    "after the contenders of a precision, a batch size and a round",
    "ceiling": "memory bandwidth over the bytes of all weights but the positions: tokens/s at batch 1",
    "ratios": "of figures of the same round; medians are of the rounds' ratios",
    "start": "`gpt2-model generate` from its start as a process to the first new text, files in the page cache",
}

Sample = dict[str, float]  # tokens_per_second and seconds_to_first_token; of the memory gb_per_second


@dataclass(frozen=True)
class Settings:
    """What is asked for. No precisions or batches: those that the device is measured with."""

    device: str
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    rounds: int
    new_tokens: int
    threads: int
    model: dict[str, int]

    def cases(self) -> list[tuple[str, int]]:
        """(precision, batch) in the order of the table."""
        on_cpu = self.device == "cpu"
        precisions = self.precisions or (tuple(BYTES) if on_cpu else ("bf16",))
        batches = self.batches or ((1, 8) if on_cpu else CUDA_BATCHES)
        return [(precision, batch) for precision in dict.fromkeys(precisions) for batch in dict.fromkeys(batches)]

    def names(self) -> list[str]:
        """Of the contenders, in the order of their turns."""
        return ["ours", *PEERS] if self.device == "cpu" else ["ours", "ours, compiled", "transformers"]


def measure(settings: Settings, work: Path) -> dict[str, Any]:
    """Run all of it in a folder.

    Returns:
        The document of `--json`, but for where it comes from.

    Raises:
        ValueError, OSError: what the user can mend.
    """
    longest, context = contenders.PROMPT_TOKENS + settings.new_tokens, settings.model.get("block_size", 1024)
    if longest > context:
        raise ValueError(f"{longest} tokens a row do not fit the model's context of {context}: --new-tokens")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # before any library reads it, in each process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ExitStack() as stack:
        with process() as call:
            say("a model with random weights")
            sizes = call(contenders.make_model, work, settings.model, settings.device)
        absent: dict[str, str] = {}
        calls = {name: stack.enter_context(process()) for name in settings.names()}
        present = _load(calls, settings, work, absent)
        samples: dict[tuple[str, int], dict[str, list[Sample]]] = {}
        reader = None
        if settings.device == "cpu":
            calls["memory"] = stack.enter_context(process())
            reader = calls["memory"](contenders.open_memory, work, settings.threads)
        starts: dict[str, list[float]] = {"seconds_to_first_token": [], "seconds_import_torch": []}
        say("starting the command once, unmeasured: it compiles where nothing is compiled yet")
        start_to_first_token(work / "model", settings.device)
        for turn in range(settings.rounds):
            for case in settings.cases():
                taken = _turn(calls, present[case], case, settings, turn)
                for name, sample in taken.items():
                    samples.setdefault(case, {}).setdefault(name, []).append(sample)
                shown = ", ".join(f"{name} {next(iter(sample.values())):.1f}" for name, sample in taken.items())
                say(f"round {turn + 1} of {settings.rounds}, {case[0]} batch {case[1]}: {shown}")
            starts["seconds_to_first_token"].append(start_to_first_token(work / "model", settings.device))
            starts["seconds_import_torch"].append(_seconds([sys.executable, "-c", "import torch"]))
    document: dict[str, Any] = {
        "definitions": DEFINITIONS,
        "settings": {**asdict(settings), "prompt_tokens": contenders.PROMPT_TOKENS, "top_k": contenders.TOP_K},
        "model": sizes,
        "memory_reader": reader,
        "absent": absent,
        "decode": [result(case, taken, sizes["parameters_read"]) for case, taken in samples.items()],
        "start": {name: spread(values) for name, values in starts.items()},
    }
    return {**document, "bars": bars(document) if settings.device == "cpu" else []}


@contextmanager
def process() -> Iterator[Callable[..., Any]]:
    """A process of its own, since threads of one library that wait by spinning would slow the next one down.

    Yields:
        call(function, *arguments) -> what it returns there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _load(
    calls: dict[str, Callable[..., Any]], settings: Settings, work: Path, absent: dict[str, str]
) -> dict[tuple[str, int], list[str]]:
    """Load everything and warm it up: who takes part in each case; the others go into `absent`."""
    present: dict[tuple[str, int], list[str]] = {case: [] for case in settings.cases()}
    for precision in dict.fromkeys(precision for precision, _ in present):
        for name, call in calls.items():
            batches = [batch for kind, batch in present if kind == precision]
            if name == "ours, compiled":  # half a minute a batch size
                batches = [batch for batch in batches if batch == 1]
            if not batches:
                continue
            say(f"loading {name} in {precision}")
            why_not = call(contenders.load, name, work, precision, settings.threads, settings.device)
            if why_not:
                absent[f"{name} {precision}"] = why_not
                say(f"absent: {name} {precision}: {why_not}")
                continue
            for batch in batches:  # what compiles for CUDA compiles for one length
                new_tokens = 4 if settings.device == "cpu" else settings.new_tokens
                call(contenders.warm_up, precision, batch, new_tokens)
                present[precision, batch].append(name)
    return present


def _turn(
    calls: dict[str, Callable[..., Any]],
    names: Sequence[str],
    case: tuple[str, int],
    settings: Settings,
    turn: int,
) -> dict[str, Sample]:
    """One sample of each, one after another."""
    read = calls.get("memory")
    before = read(contenders.read_memory) if read else 0.0
    taken: dict[str, Sample] = {
        name: calls[name](contenders.time_generation, *case, settings.new_tokens, turn) for name in names
    }
    if read:
        taken["memory"] = {"gb_per_second": max(before, read(contenders.read_memory))}
    return taken


def start_to_first_token(model: Path, device: str) -> float:
    """Seconds from starting `gpt2-model generate` to the first byte after the prompt, which it prints first."""
    program = str(Path(sysconfig.get_path("scripts")) / "gpt2-model")  # of this environment, activated or not
    command = [program, "generate", "-m", str(model), "-d", device, "--max-new-tokens", "1", PROMPT]
    started, seen = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        while seen <= len(PROMPT) and (piece := os.read(running.stdout.fileno(), 4096)):
            seen += len(piece)
        seconds = time.perf_counter() - started
        _, errors = running.communicate()
    if running.returncode or seen <= len(PROMPT):
        raise ValueError(f"gpt2-model generate printed no token: {errors.decode(errors='replace')[-300:]}")
    return seconds


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def ratio(of: Sequence[Sample], to: Sequence[Sample], field: str) -> dict[str, Any]:
    """Round by round."""
    return spread([ours[field] / theirs[field] for ours, theirs in zip(of, to, strict=True)])


def result(case: tuple[str, int], taken: dict[str, list[Sample]], parameters_read: int) -> dict[str, Any]:
    """What the samples of one precision and batch size come to."""
    precision, batch = case
    read = parameters_read * BYTES[precision]
    row: dict[str, Any] = {"precision": precision, "batch": batch, "bytes_read_per_token": read}
    for name, samples in taken.items():
        row[name] = {field: spread([sample[field] for sample in samples]) for field in samples[0]}
        if name != "memory":
            row[name]["ms_per_token"] = spread([1e3 * batch / sample["tokens_per_second"] for sample in samples])
    peers = [name for name in taken if name in PEERS]
    row["ratios"] = {peer: ratio(taken["ours"], taken[peer], "tokens_per_second") for peer in peers}
    row["first_token_ratios"] = {
        peer: ratio(taken["ours"], taken[peer], "seconds_to_first_token") for peer in peers
    }
    if "memory" in taken and batch == 1:
        ceilings = [{"tokens_per_second": sample["gb_per_second"] * 1e9 / read} for sample in taken["memory"]]
        row["ceiling_tokens_per_second"] = spread([ceiling["tokens_per_second"] for ceiling in ceilings])
        row["share_of_ceiling"] = ratio(taken["ours"], ceilings, "tokens_per_second")
    return row


def bars(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What `--check` holds ours to, where the peer was there to be measured."""
    found = []
    for row in document["decode"]:
        case, batch = f"{row['precision']} batch {row['batch']}", row["batch"]
        for peer, ratios in row["ratios"].items():
            least = 2.5 if (peer, row["precision"], batch) == ("transformers", "bf16", 1) else 1.0
            found.append(bar(f"{case}, tokens/s over those of {peer}, at least {least}", ratios["median"], least))
        if first := row["first_token_ratios"].get("transformers"):
            text = f"{case}, time to first token over that of transformers, at most 1.1"
            found.append(bar(text, first["median"], most=1.1))
    start = document["start"]["seconds_to_first_token"]["median"]
    return [*found, bar("seconds from start to first token, at most 3", start, most=3.0)]


def table(document: dict[str, Any]) -> str:
    """The document for a person, 100 columns at most."""
    settings, machine, rows = document["settings"], document["machine"], document["decode"]
    names = [name for name in ("ours", "ours, compiled", *PEERS) if any(name in row for row in rows)]
    peers = [name for name in names if name in PEERS]
    lines = [
        f"GPT-2 of {document['model']['parameters']:,} random weights, {settings['device']}: "
        f"prompt {settings['prompt_tokens']}, {settings['new_tokens']} new tokens, top-k {settings['top_k']}",
        f"{machine['cpu']}, {settings['threads']} threads of {machine['cores']} cores",
        ", ".join(f"{name} {document['versions'].get(name, '?')}" for name in ("torch", *peers)),
        f"median (least..most) of {settings['rounds']} rounds",
        "",
        *_speeds(rows, names, peers),
        "",
    ]
    if settings["device"] != "cpu":
        lines += [*_block(rows, names, "ms a token", "ms_per_token"), ""]
    lines += [*_block(rows, names, "ms to first", "seconds_to_first_token", 1e3), ""]
    start = {name: in_short(values) for name, values in document["start"].items()}
    lines += [
        f"gpt2-model generate, start to first token: {start['seconds_to_first_token']} s",
        f"python -c 'import torch', for scale: {start['seconds_import_torch']} s",
    ]
    if document["memory_reader"]:
        reads = [value for row in rows for value in row["memory"]["gb_per_second"]["rounds"]]
        lines.append(f"memory read: {in_short(spread(reads))} GB/s ({document['memory_reader']})")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)


def _speeds(rows: list[dict[str, Any]], names: Sequence[str], peers: Sequence[str]) -> list[str]:
    """Tokens per second of the batch, their ratios, and how much of what the memory allows ours reaches."""
    lines = _block(rows, names, "tokens/s", "tokens_per_second")
    lines[0] += "".join(f" {PEERS[peer]}" for peer in peers) + "  ceiling"
    for number, row in enumerate(rows, 1):
        for peer in peers:
            shown = f"{row['ratios'][peer]['median']:.2f}x" if peer in row["ratios"] else "-"
            lines[number] += shown.rjust(1 + len(PEERS[peer]))
        share = row.get("share_of_ceiling")
        lines[number] += f"{share['median']:9.0%}" if share else f"{'-':>9}"
    return lines


def _block(
    rows: list[dict[str, Any]], names: Sequence[str], title: str, field: str, scale: float = 1.0
) -> list[str]:
    """A line of names, and one a row."""
    lines = [f"{title:15}" + "".join(f"{name:>18}" for name in names)]
    for row in rows:
        cells = (in_short(row[name][field], scale) if name in row else "-" for name in names)
        case = f"{row['precision']} batch {row['batch']}"
        lines.append(f"{case:15}" + "".join(f"{cell:>18}" for cell in cells))
    return lines
