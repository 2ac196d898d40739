"""What the processes of the tests are asked to do: work well, hang, raise, crash and answer nonsense."""

import ctypes
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path


def echo(payload):
    return payload


def pid(payload):
    return os.getpid()


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def tell_and_nap(payload):
    Path(payload["place"]).touch()
    return sleep(payload["seconds"])


def tell_and_sleep(place):
    """Leave the number of this process and of one that it starts in a file, then do nothing for long."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(place).write_text(f"{os.getpid()} {child.pid}\n")
    time.sleep(60)


def tell_and_keep_lock(place):
    """The same in code that never lets the interpreter do anything else."""
    Path(place).write_text(f"{os.getpid()}\n")
    ctypes.PyDLL(None).sleep(60)


def leave_one_behind(payload):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


def leave(code):
    os._exit(code)


def crash(payload):
    os.kill(os.getpid(), signal.SIGSEGV)


def close_everything(payload):
    """Cut the line and go on."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    time.sleep(60)


def raise_odd(payload):
    raise ValueError("odd \udcff payload")


def leave_politely(payload):
    sys.exit("no more")


def give_object(payload):
    return threading.Lock()


def give_infinite(payload):
    return {"deep": [1.0, float("nan")]}


def shout(text):
    print(text, flush=True)
    return len(text)


def locked_metadata(place):
    """Read a database that somebody else keeps locked, as a library does that waits for its turn."""
    with sqlite3.connect(place, timeout=60) as library:
        return library.execute("select count(*) from blueprints").fetchone()[0]


def fails(fault):
    """Fail in the given way, or give a number where it is null."""
    if fault is None:
        return 7.5
    if fault in ("slow", "hang"):
        time.sleep(2 if fault == "slow" else 60)
    if fault == "raise":
        raise RuntimeError("not yet")
    return "a text"


def loaded(modules):
    return [name for name in modules if name in sys.modules]
