"""One spawned process as its worker sees it: what it is asked, what it answers, how it ended.

Everything here happens on the event loop of the worker.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from meristem.worker.message import LENGTHS

PROGRAM = """
import json, sys
sys.path[:], messages, lifeline, imports = json.loads(sys.argv[1])
from meristem.worker.child import serve
serve(messages, lifeline, imports)
"""
"""It looks for modules where its parent does, and never runs the parent's main program again."""
LOOK_S = 0.002
"""How often a process that ends is looked after."""
READ_BYTES = 1 << 20
"""How much of an answer is taken at once."""

Answer = tuple[dict[str, Any], bytes]


class Gone(Exception):
    """The process has ended; the text says how. Never leaves the room."""


class Spawned:
    """A process with a line to it. ``listener`` is done when the process is gone; ``end`` says how it ended.

    late: told of an answer that nobody waited for.
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        lifeline: int,
        line: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        late: Callable[["Spawned"], None],
    ) -> None:
        self.pid = popen.pid
        self.is_open = True
        self.end = ""
        self._popen, self._lifeline, self._late = popen, lifeline, late
        self._reader, self._writer = line
        self._waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.listener = asyncio.create_task(self._listen())

    async def ready(self) -> Answer:
        """The first answer, which comes without a question. Raises Gone when it cannot come any more."""
        return await self._waiting

    async def ask(self, pieces: Sequence[bytes]) -> Answer:
        """Send a message and wait for its answer. Raises Gone when none can come."""
        if not self.is_open:
            raise Gone(self.end)
        self._waiting = asyncio.get_running_loop().create_future()
        for piece in pieces:
            self._writer.write(piece)
        with suppress(ConnectionError):  # the listener knows how it ended, and says so
            await self._writer.drain()
        return await self._waiting

    def release(self) -> None:
        """Let an idle process end by itself."""
        with suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def kill(self, why: str) -> None:
        """End the process and whatever it started, at once."""
        self.is_open = False
        self.end = self.end or why
        self._waiting.cancel()
        self._kill_group()

    def _kill_group(self) -> None:
        if not self.listener.done():  # it is not reaped yet, so nobody else can have its number
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    async def _listen(self) -> None:
        """Hand on each answer until no more can come, then see the process off."""
        with suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):  # the last for what is no message
            while True:
                n_body, n_packed = LENGTHS.unpack(await self._reader.readexactly(LENGTHS.size))
                body, packed = await self._reader.readexactly(n_body), await self._reader.readexactly(n_packed)
                if self._waiting.done():
                    self._late(self)
                else:
                    self._waiting.set_result((orjson.loads(body), packed))
        self.is_open = False
        self._kill_group()  # what it started goes with it
        while self._popen.poll() is None:
            await asyncio.sleep(LOOK_S)
        self.end = self.end or _end(self._popen.returncode)
        self._writer.close()
        os.close(self._lifeline)
        if not self._waiting.done():
            self._waiting.set_exception(Gone(self.end))


async def spawn(imports: Sequence[str], late: Callable[[Spawned], None]) -> Spawned:
    """A new process in a session of its own; its first answer says that it is ready. Raises OSError."""
    ours, theirs = socket.socketpair()
    try:
        line = await asyncio.open_connection(sock=ours, limit=READ_BYTES)
    except asyncio.CancelledError:
        ours.close()
        theirs.close()
        raise
    their_end, our_end = os.pipe()
    try:
        start = json.dumps([[str(place) for place in sys.path], theirs.fileno(), their_end, list(imports)])
        popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, start],
            pass_fds=(theirs.fileno(), their_end),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        line[1].close()
        os.close(our_end)
        raise
    finally:
        theirs.close()
        os.close(their_end)
    return Spawned(popen, our_end, line, late)


def _end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it left with exit code {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"
