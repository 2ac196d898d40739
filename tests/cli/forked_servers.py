"""Imports what `meristem serve` needs once, then is a server, in a fresh process, for every line of its input.

stdout has one JSON value a line: the process that a server is, what the server says of itself, and how it ended.
"""

import json
import os
import sys

import uvicorn  # noqa: F401 - what a server imports is there when it begins

import meristem.runs.open
import meristem.serve.http  # noqa: F401
from meristem.cli import run


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


for _ in sys.stdin:
    if not (child := os.fork()):
        say({"pid": os.getpid()})
        os._exit(run(sys.argv[1:]))
    say({"status": os.waitpid(child, 0)[1]})
