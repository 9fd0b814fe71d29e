"""torchrun several_runs.py FILE: the runs that FILE lists, one after another; torch is imported once for all."""

import json
import sys
from pathlib import Path

from gpt2_train import TrainConfig, distributed, train

if __name__ == "__main__":
    world, stop = distributed.start("cpu"), distributed.stop
    # torch's processes meet once: meeting again at once, under the same torchrun, hangs now and then.
    distributed.start, distributed.stop = lambda *_, **__: world, lambda _: None
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        assert train(TrainConfig(**settings)) == 0
    stop(world)
