"""Connections that are watched: whoever sends no request, or does not read an answer, is not waited for.

And the short way into them, for answers that come in many pieces.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

STALL_S: Final = 30.0
"""How long a client may take to send the head of a request, and to read on where an answer waits for it."""


OUTLET: Final = "meristem.outlet"
"""The extension of ASGI with an ``Outlet``, where the server that runs the application has one."""


class Outlet:
    """The way of a piece of an answer straight into its connection. n_bytes: that went it.

    Through generators, middlewares and h11 a piece costs three times as much, of which there are a thousand a second.
    What is written lies between what ``send`` of ASGI wrote before and what it writes next.
    """

    def __init__(self, protocol: H11Protocol, cycle: RequestResponseCycle) -> None:
        self.n_bytes = 0
        self._transport, self._flow, self._cycle = protocol.transport, protocol.flow, cycle
        # Since HTTP/1.1 a body whose length is not known comes in chunks.
        self._is_chunked = protocol.conn.their_http_version != b"1.0"

    @property
    def is_open(self) -> bool:
        """Whether the answer has begun and its reader takes more."""
        cycle = self._cycle
        is_between = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        return is_between and not self._flow.write_paused and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send bytes, some, while it is open."""
        self.n_bytes += len(data)
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)


def outlet_of(scope: Mapping[str, Any]) -> Outlet | None:
    """That of a request; None where its server has none."""
    found = scope.get("extensions", {}).get(OUTLET, {}).get("outlet")
    return found if isinstance(found, Outlet) else None


class WatchedProtocol(H11Protocol):
    """uvicorn's connection, which waits for ever for a head that does not come and a reader that does not read.

    Of an answer that is not read, 64 KiB wait here, and then nothing more is taken for it. uvicorn offers no other
    place for this: a connection closed in the orderly way stays until its last byte was read.
    """

    stall_s = STALL_S

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        elif self._reading:
            self._reading.cancel()
            self._reading = None

    def handle_events(self) -> None:
        super().handle_events()
        # Its task has not begun yet.
        if self.cycle is not None and self.scope is not None and self.cycle.scope is self.scope:
            extensions = self.scope.setdefault("extensions", {})
            extensions.setdefault(OUTLET, {"outlet": Outlet(self, self.cycle)})

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._writing or self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._reading = self._reading or self.loop.call_later(self.stall_s, self.transport.abort)
