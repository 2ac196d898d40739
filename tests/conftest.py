"""One thread per test process, and none that spins: the workers would wait for each other at every barrier."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a shell starts with & or nohup ignores these, and so do its children: they would reach no process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# On a busy machine any example may take long, whatever is tested.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# What a shell runs in its background ignores Ctrl-C, and so would all processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=1200, help="how many steps test_soak.py makes; 50,000 are a soak")
    parser.addoption("--kills", type=int, default=12, help="at how many moments test_kill.py kills a run; 200 are all")


@pytest.fixture(autouse=True)
def _compiler_starts_anew() -> Iterator[None]:
    """A test compiles as if it were the first: the compiler counts what others compiled against its limit of eight."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
