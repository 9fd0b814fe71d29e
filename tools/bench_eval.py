"""What `bench.py eval` measures: HellaSwag by ours, by build-nanogpt's method, and by lm-evaluation-harness.

All have the same weights and items. Each is a process of its own that scores all items in one call, as a user
would, and is stopped before a batch when its turn is over: in each round all do one twentieth of their batches, so
that a machine that drifts drifts for all. Their scores must be the same.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_report import bar

ROUNDS = 20
WARM_UP = 12  # items
OURS_RAW, PLAIN, OURS_CLEAN, HARNESS = "ours, karpathy", "build-nanogpt's method", "ours, lm-eval", "lm-eval"
BARS = {PLAIN: (OURS_RAW, 3.0), HARNESS: (OURS_CLEAN, 2.0)}
TOLERANCE = 0.02  # nats of an ending's sum, some 100 of them


@dataclass(frozen=True)
class Settings:
    """What to measure, and how."""

    data: str | None
    items: int
    threads: int
    device: str
    dtype: str
    harness_batch: int
    model: dict[str, Any]


class Turn:
    """A contender's end of the line: it asks before each of its batches, and waits where its turn is over."""

    def __init__(self, line: Connection) -> None:
        self.line, self.batches, self.done, self.until = line, 1, 0, 0.0

    def take(self, batches: int) -> None:
        """Ready: there are so many batches."""
        self.batches = batches
        self._wait(0.0)

    def ask(self) -> bool:
        """Before a batch. False, as score_items' `stop` wants it."""
        if self.done >= self.until * self.batches:
            self._wait(time.perf_counter() - self.began)
        self.done += 1
        return False

    def end(self, scores: Sequence[Sequence[float]]) -> None:
        """All is scored."""
        self.line.send(("done", time.perf_counter() - self.began, scores))

    def _wait(self, seconds: float) -> None:
        self.line.send(("waits", seconds, None))
        self.until = self.line.recv()
        self.began = time.perf_counter()


Contender = Callable[[Settings, Path, Sequence[Any], Turn], None]


def measure(settings: Settings, work: Path) -> dict[str, Any]:
    """The document, without its provenance."""
    from gpt2_eval import load_hellaswag

    data = load_hellaswag(settings.data, limit=settings.items)
    num_items = len(data.items)
    parameters = _save_model(settings, work / "model")
    seconds, scores, absent = _take_turns(settings, work / "model")
    ratios = {peer: sum(seconds[peer]) / sum(seconds[ours]) for peer, (ours, _) in BARS.items() if peer in seconds}
    document: dict[str, Any] = {
        "settings": asdict(settings),
        "model": {"parameters": parameters},
        "data_sha256": data.sha256,
        "items": num_items,
        "absent": absent,
        "seconds": seconds,
        "items_per_second": {name: num_items / sum(rounds) for name, rounds in seconds.items()},
        "ratios": ratios,
        "largest_difference": {
            f"{ours} and {peer}": _largest_difference(scores[ours], scores[peer])
            for peer, (ours, _) in BARS.items()
            if peer in scores
        },
    }
    return {**document, "bars": _bars(document)}


def _save_model(settings: Settings, folder: Path) -> int:
    import torch

    from gpt2_model import GPT, GPTConfig

    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**settings.model))
    with torch.no_grad():  # as drawn, all tokens are about as likely: spread them, and rounding has a scale
        gpt.wte.weight.mul_(4)
    gpt.save_pretrained(folder)
    return gpt.config.num_parameters


def _take_turns(
    settings: Settings, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]], dict[str, str]]:
    """Seconds of each round, scores, and why a contender is absent."""
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    for name in CONTENDERS:
        lines[name], theirs = context.Pipe()
        process = context.Process(target=_contend, args=(name, settings, folder, theirs), daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
    absent: dict[str, str] = {}
    for name, line in list(lines.items()):  # all are ready before one begins
        state, _, why = line.recv()
        if state == "absent":
            absent[name] = why
            del lines[name]
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    scores: dict[str, list[list[float]]] = {}
    for turn in count(1):
        print(f"\rround {turn} of {ROUNDS}", end="", file=sys.stderr)
        for name in [name for name in lines if name not in scores]:
            lines[name].send(turn / ROUNDS)
            state, spent, found = lines[name].recv()
            seconds[name].append(spent)
            if state == "done":
                scores[name] = found
        if scores.keys() == lines.keys():
            break
    print(file=sys.stderr)
    for process in processes:
        process.join()
    return seconds, scores, absent


def _contend(name: str, settings: Settings, folder: Path, line: Connection) -> None:
    """A contender's process: a few items to warm up, then all of them in turns."""
    if name in (OURS_RAW, OURS_CLEAN):
        from gpt2_model.command import keep_buffers

        keep_buffers()  # as the command does
    import torch

    from gpt2_eval import load_hellaswag

    torch.set_num_threads(settings.threads)
    items = load_hellaswag(settings.data, limit=settings.items).items
    turn = Turn(line)
    try:
        CONTENDERS[name](settings, folder, items, turn)
    except ImportError as error:
        line.send(("absent", 0.0, str(error)))


def _largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    pairs = zip(a, b, strict=True)
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))


def _bars(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    bars = [
        bar(f"{ours} at least {least:g} times {peer}", ratio, least)
        for peer, (ours, least) in BARS.items()
        if (ratio := document["ratios"].get(peer)) is not None
    ]
    limit = TOLERANCE if document["settings"]["dtype"] == "fp32" else 20.0
    for name, value in document["largest_difference"].items():
        bars.append(bar(f"the same scores: {name}", value, most=limit))
    return bars


def _ours(protocol: str) -> Contender:
    def score(settings: Settings, folder: Path, items: Sequence[Any], turn: Turn) -> None:
        import torch

        from gpt2_eval import score_items
        from gpt2_eval.scoring import plan_batches
        from gpt2_model import GPT

        model = GPT.from_pretrained(folder).to(settings.device)
        options: Any = {"autocast_dtype": torch.bfloat16 if settings.dtype == "bf16" else None}
        chosen = [item.rows[protocol] for item in items]
        score_items(model, chosen[:WARM_UP], **options)
        turn.take(len(plan_batches(model, chosen)))
        found = score_items(model, chosen, stop=turn.ask, **options)
        turn.end([[row.logprob for row in rows] for rows in found])

    return score


def _plain(settings: Settings, folder: Path, items: Sequence[Any], turn: Turn) -> None:
    """One item at a time: its four rows, padded to the longest, through the whole model; then the mask."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).to(settings.device).eval()

    @torch.no_grad()
    def score(item: Any) -> list[float]:
        rows = item.rows["karpathy"]
        longest = max(len(row.context) + len(row.continuation) for row in rows)
        tokens, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids = [*row.context, *row.continuation]
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, len(row.context) : len(ids)] = 1
        tokens, mask = tokens.to(settings.device), mask.to(settings.device)
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16"):
            logits = model(tokens).logits
        flat = logits[:, :-1].contiguous().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        return (-(losses * mask[:, 1:]).sum(1)).tolist()

    for item in items[:WARM_UP]:
        score(item)
    turn.take(len(items))
    turn.end([score(item) for item in items if not turn.ask()])


def _harness(settings: Settings, folder: Path, items: Sequence[Any], turn: Turn) -> None:
    """lm-evaluation-harness' own model class, given the very rows: it sorts, batches and scores them."""
    from lm_eval.models.huggingface import HFLM

    class Timed(HFLM):  # type: ignore[misc]
        asks = False

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            _ = self.asks and turn.ask()
            return super()._model_call(*args, **kwargs)

    dtype = "bfloat16" if settings.dtype == "bf16" else "float32"
    model = Timed(pretrained=str(folder), device=settings.device, dtype=dtype, batch_size=settings.harness_batch)
    rows = [row for item in items for row in item.rows["lm-eval"]]
    requests = [((str(i), ""), row.context, row.continuation) for i, row in enumerate(rows)]
    model._loglikelihood_tokens(requests[: 4 * WARM_UP], disable_tqdm=True)
    turn.take(-(-len(rows) // settings.harness_batch))
    model.asks = True
    found = [logprob for logprob, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
    turn.end([found[i : i + 4] for i in range(0, len(found), 4)])


CONTENDERS: dict[str, Contender] = {
    OURS_RAW: _ours("karpathy"),
    PLAIN: _plain,
    OURS_CLEAN: _ours("lm-eval"),
    HARNESS: _harness,
}


def table(document: dict[str, Any]) -> str:
    """The document for a person."""
    settings, machine = document["settings"], document["machine"]
    lines = [
        f"{document['items']} items of HellaSwag, GPT-2 of {document['model']['parameters']:,} random weights, "
        f"{settings['dtype']} on {settings['device']}",
        f"{machine['cpu']}, {settings['threads']} threads of {machine['cores']} cores",
        f"each a process of its own, in {ROUNDS} turns; lm-eval's batch: {settings['harness_batch']} rows",
        "",
        *(f"{name:24}{speed:8.2f} items/s" for name, speed in document["items_per_second"].items()),
        "",
    ]
    for peer, ratio in document["ratios"].items():
        lines.append(f"{BARS[peer][0]} to {peer}: {ratio:.2f} times")
    for name, value in document["largest_difference"].items():
        lines.append(f"largest difference of an ending's sum, {name}: {value:.1e} nats")
    lines += [f"absent: {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join(lines)
