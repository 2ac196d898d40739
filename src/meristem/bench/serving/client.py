"""A client that costs next to nothing: requests of HTTP/1.1 over one connection, and the times at which chunks come.

The machine that is measured runs the client as well. What a general client spends on an event would be counted as the
server's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from meristem.errors import WorkerDied

_IS_TOKEN = b'"finish_reason":null'
_USAGE = b'"choices":[]'


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


@dataclass
class Heard:
    """What has come of a stream: times of its tokens, in seconds of ``time.perf_counter``, and how many there were.

    n_tokens: drawn, known at the end; those that come together have one time, one that completes no character has none.
    """

    asked_at: float = 0.0
    times: list[float] = field(default_factory=list)
    n_tokens: int = 0


class Connection:
    """One connection, for one request after the other; a new one where the server has closed it in between, as servers
    do that hear nothing for some seconds."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address, self._reader, self._writer = address, reader, writer

    @classmethod
    async def to(cls, address: Address) -> "Connection":
        """A connection to a server."""
        return cls(address, *await asyncio.open_connection(*address))

    def close(self) -> None:
        """Leave, also in the middle of an answer."""
        self._writer.close()

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer. WorkerDied where it is an error."""
        await self._send(method, path, body)
        content = b"".join([part async for part in self._parts(path)])
        return orjson.loads(content)

    async def stream(self, path: str, body: Mapping[str, object], heard: Heard) -> None:
        """Write down in ``heard`` what comes, until it has ended."""
        heard.asked_at = time.perf_counter()
        await self._send("POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}})
        async for part in self._parts(path):
            if _IS_TOKEN in part:
                heard.times.append(time.perf_counter())
            if _USAGE in part:
                last = next(event for event in part.split(b"\n\n") if _USAGE in event)
                heard.n_tokens = orjson.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]

    async def _send(self, method: str, path: str, body: object) -> None:
        if self._reader.at_eof():
            self._writer.close()
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        content = b"" if body is None else orjson.dumps(body)
        host = f"{self._address.host}:{self._address.port}"
        head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await self._writer.drain()

    async def _parts(self, path: str) -> AsyncIterator[bytes]:
        """The content, as it comes."""
        status, length = await self._head(path)
        if status >= 300:
            content = await self._reader.read(2000) if length is None else await self._reader.readexactly(length)
            raise WorkerDied(
                f"the server answered {path} with {status}: {content.decode(errors='replace')[:300]}. Read what it "
                f"printed.",
                path=path,
                status=status,
            )
        if length is not None:
            yield await self._reader.readexactly(length)
            return
        while n_bytes := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(n_bytes + 2))[:-2]
        await self._reader.readline()

    async def _head(self, path: str) -> tuple[int, int | None]:
        """Status and length of an answer; no length where it comes in chunks."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        except (asyncio.IncompleteReadError, OSError) as cause:
            raise WorkerDied(f"the server closed the connection at {path}. Read what it printed.", path=path) from cause
        _, found, after = head.partition(b"\r\ncontent-length:")
        return int(head.split(b" ", 2)[1]), int(after.split(b"\r\n", 1)[0]) if found else None
