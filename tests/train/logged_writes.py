"""gpt2-train that notes in $LOG_OF_WRITES what each rank opens for writing and renames, by audit events."""

import json
import os
import sys

from gpt2_train.cli import main

LOG = os.open(os.environ["LOG_OF_WRITES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def note(event: str, arguments: tuple) -> None:
    if event == "os.rename" or (event == "open" and arguments[2] & WRITING):
        path = arguments[1] if event == "os.rename" else arguments[0]
        os.write(LOG, (json.dumps([os.environ["RANK"], event, str(path)]) + "\n").encode())


if __name__ == "__main__":
    os.write(LOG, (json.dumps([os.environ["RANK"], "start", ""]) + "\n").encode())
    sys.addaudithook(note)
    main()
