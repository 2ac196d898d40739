"""One thread per test process, and none that spins: the workers would wait for each other at every barrier."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

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


def is_outside(family: int, address: Any) -> bool:
    """Whether ``address`` is of another machine: of the internet's families, neither loopback nor unspecified."""
    if family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
        return False
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    try:
        known = ipaddress.ip_address(host.partition("%")[0] or "0.0.0.0")
    except ValueError:
        return host != "localhost"
    return not (known.is_loopback or known.is_unspecified)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A connection to another machine fails the test, at once and with the address. No ``except Exception`` of the
    package swallows it. Processes that a test starts are on their own."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, *arguments: Any) -> Any:
            # The address is the last argument of each of the three.
            if is_outside(self.family, arguments[-1]):
                pytest.fail(f"a test connects to {arguments[-1]}; tests are offline")
            return real(self, *arguments)

        return connect

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host and is_outside(socket.AF_INET, (host,)):
            pytest.fail(f"a test looks up {host}; tests are offline")
        return find(host, *arguments, **options)

    find = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refusing(getattr(socket.socket, name)), raising=True)
        patch.setattr(socket, "getaddrinfo", resolve)
        yield


@pytest.fixture(autouse=True)
def _torch_draws_alike() -> None:
    """What a test draws does not depend on those before it: pytest-randomly seeds Python and NumPy, and not torch."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _compiler_starts_anew() -> Iterator[None]:
    """A test compiles as if it were the first: the compiler counts what others compiled against its limit of eight."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()
