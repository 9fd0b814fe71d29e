"""torchrun traced_steps.py FILE: the runs that FILE lists, of two steps each.

Rank r leaves gradients-r.pt of the first step in the run's folder, and trace-r.json of the second. It is like any
other: in the first, DDP tells all ranks in what order gradients come.
"""

import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gpt2_train import TrainConfig, distributed, loop, train

update, backward, compile_model = loop._update, loop._backward, torch.compile


def traced_update(run: loop.Run) -> None:
    if run.step == 0:
        update(run)
        return
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as tracing:
        update(run)
    tracing.export_chrome_trace(str(run.folder / f"trace-{run.world.rank}.json"))


def kept_backward(run: loop.Run):
    result = backward(run)
    if run.step == 0:
        gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
        torch.save(gradients, run.folder / f"gradients-{run.world.rank}.pt")
    return result


def tried_model(model: torch.nn.Module, **options):
    """Compiled at once, and outside of DDP, as it is where micro-batches are tried on a GPU.

    aot_eager: whatever the backend, it gets graphs that are cut for DDP already; this one is done in seconds.
    """
    compiled = compile_model(model, backend="aot_eager", **options)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    compiled(tokens, tokens.clone(), return_logits=False)[1].backward()
    model.zero_grad(set_to_none=True)
    return compiled


if __name__ == "__main__":
    world, stop = distributed.start("cpu"), distributed.stop
    # torch's processes meet once: meeting again at once, under the same torchrun, hangs now and then.
    distributed.start, distributed.stop = lambda *_, **__: world, lambda _: None
    loop._update, loop._backward, torch.compile = traced_update, kept_backward, tried_model
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        assert train(TrainConfig(**settings)) == 0
    stop(world)
