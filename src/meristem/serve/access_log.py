"""One JSON line for each request: who, what, how it ended and how long it took. No text of anybody, and no key."""

import re
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meristem.errors import DiskFull, RunError
from meristem.events import Emit, Event, silent
from meristem.serve.access import Caller
from meristem.serve.connection import outlet_of
from meristem.serve.metrics import Metrics
from meristem.sinks.jsonl import JsonLines

STDERR: Final = "-"
ROTATE_BYTES: Final = 64 << 20
GONE: Final = 499
"""Status of a request whose client left before there was an answer."""

_METHODS: Final = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS".split())
_SESSION: Final = re.compile("[0-9a-f]{32}")


class AccessLog:
    """Lines to a file, or to stderr for "-"; at 64 MiB the file is set aside as ``name.0001`` and a new one begun.

    A line that the disk does not take is lost, and requests go on: ``degraded`` says so once.
    """

    def __init__(self, place: str, emit: Emit = silent) -> None:
        self.place, self.n_lost, self._emit = place, 0, emit
        self._lines: JsonLines | None = None
        if place != STDERR:
            try:
                self._lines = JsonLines(Path(place), ROTATE_BYTES)
            except OSError as cause:
                raise RunError(f"{place} cannot be written: {cause.strerror}. Choose another --access-log.") from cause

    def append(self, line: dict[str, Any]) -> bool:
        """Write a line; False where it was lost."""
        try:
            if self._lines:
                self._lines.append(line)
            else:
                sys.stderr.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE).decode())
        except (DiskFull, OSError) as error:
            if not self.n_lost:
                self._emit(Event("degraded", {"what": "access log", "reason": str(error)}, "warning"))
            self.n_lost += 1
            return False
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._lines:
            self._lines.close()


class Journal:
    """Counts every request and writes its line; stands before everything else. ``X-Request-Id`` names the line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: AccessLog | None) -> None:
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, begun, status, n_in, n_out = uuid.uuid4().hex, time.monotonic(), 0, 0, 0

        async def took() -> Message:
            nonlocal n_in
            message = await receive()
            n_in += len(message.get("body", b""))
            return message

        async def gave(message: Message) -> None:
            nonlocal status, n_out
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            n_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, took, gave)
        except Exception:
            status = status or 500
            raise
        finally:
            seconds = time.monotonic() - begun
            outlet = outlet_of(scope)
            n_out += outlet.n_bytes if outlet else 0
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request": request_id,
                **_asked(scope),
            }
            line |= {"status": status or GONE, "seconds": round(seconds, 6), "bytes_in": n_in, "bytes_out": n_out}
            self.metrics.answered(line["method"], line["route"], line["status"], seconds)
            if self.log and not self.log.append(line):
                self.metrics.lost_lines.inc()


def _asked(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What a request was for: its route, not its path, in which anything may stand."""
    caller = scope.get("state", {}).get("caller")
    session = scope.get("path_params", {}).get("session_id", "")
    return {
        "address": (scope.get("client") or ("", 0))[0],
        "key": caller.owner if isinstance(caller, Caller) else "",
        "method": scope["method"] if scope["method"] in _METHODS else "other",
        "route": getattr(scope.get("route"), "path", ""),
        "session": session if _SESSION.fullmatch(session) else "",
    }
