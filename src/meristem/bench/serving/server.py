"""The server that is measured: `meristem serve`, in a process of its own."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final
from urllib.parse import urlsplit

import psutil

from meristem.bench.serving.client import Address, Connection
from meristem.errors import WorkerDied

READY_S: Final = 600.0
"""How long a server may take until it is ready: it opens every session and finds its batches."""

CLOSED_S: Final = 60.0
DEADLINE_S: Final = 24 * 3600.0
"""Of a reply; those beside a long text on a slow machine take their time."""


@dataclass(frozen=True)
class Server:
    """One that is ready. begun_s: seconds from its start until then, with the imports of Python."""

    address: Address
    pid: int
    begun_s: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        return int(psutil.Process(self.pid).memory_info().rss)


@contextlib.contextmanager
def serving(data: Path, checkpoint: Path | None, max_rows: int = 64, n_threads: int | None = None) -> Iterator[Server]:
    """A server on the sessions of a directory, until the block ends. WorkerDied where it does not become ready.

    checkpoint: None for the model in the box. max_rows: requests at once. n_threads: None for those that it takes
    unasked.
    """
    model = [] if checkpoint is None else [str(checkpoint)]
    words = [sys.executable, "-m", "meristem", "serve", *model, "--port", "0", "--data", str(data), "--json"]
    words += ["--max-rows", str(max_rows), "--deadline", str(DEADLINE_S)]
    words += [] if n_threads is None else ["--threads", str(n_threads)]
    began = time.perf_counter()
    # Whoever ends the measurement ends its server as well, which would outlive it.
    before = signal.signal(signal.SIGTERM, _end)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise WorkerDied(f"`{' '.join(words[1:])}` ended before it listened. Run it by itself to see why.")
        found = urlsplit(json.loads(line)["url"])
        address = Address(found.hostname or "", found.port or 0)
        asyncio.run(_ready(address, process))
        yield Server(address, process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        try:
            process.wait(CLOSED_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


async def _ready(address: Address, process: "subprocess.Popen[str]") -> None:
    """Wait until the model has written a token."""
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        connection = await Connection.to(address)
        try:
            await connection.ask("GET", "/readyz")
            return
        except WorkerDied:
            await asyncio.sleep(0.05)
        finally:
            connection.close()
    raise WorkerDied(f"the server was not ready after {READY_S:.0f} s. Run `meristem serve` by itself to see why.")
