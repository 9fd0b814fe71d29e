"""torchrun several_runs.py FILE: the runs whose settings FILE lists, one after another: torch is imported once."""

import json
import os
import sys
from pathlib import Path

from gpt2_train import TrainConfig, train

if __name__ == "__main__":
    for number, settings in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # meet anew, as after a restart by torchrun
        assert train(TrainConfig(**settings)) == 0
