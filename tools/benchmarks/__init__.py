"""What `tools/bench.py` measures: `cases`, `data` and `peers` take turns in the `harness`; `report` shows it."""
