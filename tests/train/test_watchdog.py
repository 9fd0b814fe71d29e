"""A hang ends the process, with stacks, and ordinary work does not."""

import subprocess
import sys
import time

import pytest

HANGS = {
    "a sleep": "time.sleep(60)",
    "an exchange that nobody answers": "threading.Event().wait(60)",
    "the interpreter locked": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS.keys())
def test_a_hang_ends_the_process_with_stacks(hang) -> None:
    program = f"""
import ctypes, threading, time
from gpt2_train.faults import Watchdog
def where_it_hangs():
    {hang}
dog = Watchdog(1, 0.5)
with dog.watching("update", 6): pass
with dog.watching("update", 7): where_it_hangs()
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert "where_it_hangs" in done.stderr
    if "PyDLL" not in hang:
        assert "rank 1: no progress for 0.5 s in step 7 (update)" in done.stderr


def test_what_takes_its_usual_time_does_not() -> None:
    program = """
import time
from gpt2_train.faults import Watchdog
dog = Watchdog(0, 0.3)
for step in range(3):
    with dog.watching("evaluation", step, first_seconds=float("inf")): time.sleep(0.6)
with dog.watching("update", 1): time.sleep(0.5)  # the first time may take half an hour
time.sleep(0.6)  # nothing is watched
dog.close()
off = Watchdog(0, 0)
with off.watching("update", 1): time.sleep(0.2)
print("well")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")
