"""Connections that are watched: whoever sends no request, or does not read an answer, is not waited for."""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

STALL_S: Final = 30.0
"""How long a client may take to send the head of a request, and to read on where an answer waits for it."""


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
