"""Ways to see what became of a process."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest


def is_there(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it ends while it is read
        if Path("/proc/self").is_dir():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def eventually():
    """Waits until something is so; fails when it is not after ``limit_s``."""

    def wait(is_so, limit_s: float = 20.0) -> None:
        until = time.monotonic() + limit_s
        while not is_so():
            assert time.monotonic() < until, "it never came to be so"
            time.sleep(0.005)

    return wait


@pytest.fixture
def n_open():
    """Counts open descriptors, where the system tells, and threads. What earlier tests have left to the garbage
    collector is closed first: it would go while this one counts.
    """
    gc.collect()
    place = "/proc/self/fd"
    return lambda: (len(os.listdir(place)) if os.path.isdir(place) else 0, threading.active_count())


@pytest.fixture
def gone(eventually):
    """Waits until processes are gone."""
    return lambda *pids, limit_s=20.0: eventually(lambda: not any(map(is_there, pids)), limit_s)


@pytest.fixture
def running():
    return is_there
