"""Errors as the OpenAI API says them, and a bound on what a request may send."""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meristem.config import ConfigSection
from meristem.errors import (
    AccessError,
    Blocked,
    CapabilityError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskFull,
    HostRefused,
    KeyRefused,
    MeristemError,
    NoSession,
    QueueFull,
    RateExceeded,
    SessionBusy,
    ShapeError,
    TooManySessions,
    WorkerError,
    WorkerTimeout,
    WrongValue,
)

MOST_BYTES: Final = 64 << 20
"""What a request may send: a text of megabytes, or a session."""

MOST_BODY_S: Final = 300.0
"""How long a request may take to send it."""

RETRY_AFTER_S: Final = 1
LONGEST_PLACE: Final = 200
"""Characters of a path that an error repeats."""


class NoModel(WrongValue):
    """A request for a model that is not served here."""


class _Error(ConfigSection):
    """param: the field that is wrong. code: what is wrong, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(ConfigSection):
    """An error in the shape of the OpenAI API."""

    error: _Error


FAILURES: Final[dict[int | str, dict[str, Any]]] = {"4XX": {"model": Failure}, "5XX": {"model": Failure}}
"""How the published description names the errors of every route."""

STATUS: Final[Mapping[type[Exception], tuple[int, str, str]]] = {
    NoModel: (404, "invalid_request_error", "model_not_found"),
    NoSession: (404, "invalid_request_error", "session_not_found"),
    KeyRefused: (401, "authentication_error", "invalid_api_key"),
    RateExceeded: (429, "rate_limit_error", "rate_limit_exceeded"),
    TooManySessions: (403, "insufficient_quota", "too_many_sessions"),
    HostRefused: (421, "invalid_request_error", "host_refused"),
    AccessError: (403, "permission_error", "not_allowed"),
    SessionBusy: (409, "invalid_request_error", "session_busy"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    DiskFull: (507, "server_error", "disk_full"),
    WorkerTimeout: (504, "server_error", "timeout"),
    WorkerError: (503, "server_error", "unavailable"),
    CheckpointError: (400, "invalid_request_error", "bad_session_file"),
    CapabilityError: (400, "invalid_request_error", "unsupported"),
    ConfigError: (400, "invalid_request_error", "invalid_value"),
    ShapeError: (400, "invalid_request_error", "invalid_value"),
    Blocked: (400, "invalid_request_error", "content_filter"),
    DataError: (400, "invalid_request_error", "invalid_value"),
    ClientDisconnect: (499, "invalid_request_error", "client_closed_request"),
}
"""Status, type and code of an error, by the first of its classes that is here; 500 for all others."""


def failure(
    status: int,
    message: str,
    kind: str,
    *,
    param: object = None,
    code: str | None = None,
    retry_after_s: object = RETRY_AFTER_S,
) -> JSONResponse:
    """An error in the shape of the OpenAI API. retry_after_s: where to try again later may help."""
    headers = {"Retry-After": str(retry_after_s)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    error = _Error(message=message, type=kind, param=None if param is None else str(param), code=code)
    return JSONResponse(Failure(error=error).model_dump(), status, headers)


def failure_of(error: Exception) -> JSONResponse:
    """What is said of an error; of one that nobody foresaw, no more than its name."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            status, name, code = STATUS[kind]
            fields = getattr(error, "fields", {})
            later = fields.get("retry_after_s", RETRY_AFTER_S)
            return failure(status, str(error), name, param=fields.get("key"), code=code, retry_after_s=later)
    message = (
        str(error) if isinstance(error, MeristemError) else f"{type(error).__name__}. This is a fault of meristem."
    )
    return failure(500, message, "server_error", code="internal_error")


def answer_failures(app: FastAPI) -> None:
    """Have every error of an application answered so."""

    async def invalid(request: Request, error: Exception) -> Response:
        return _invalid(error) if isinstance(error, RequestValidationError) else failure_of(error)

    async def refused(request: Request, error: Exception) -> Response:
        status, detail = (error.status_code, str(error.detail)) if isinstance(error, HTTPException) else (500, "")
        asked = f"{request.method} {request.url.path[:LONGEST_PLACE]}"
        said = f"{asked}: {detail}. /openapi.json lists what there is." if status in (404, 405) else detail
        return failure(status, said, "invalid_request_error")

    async def failed(request: Request, error: Exception) -> Response:
        return failure_of(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (MeristemError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, failed)


def _invalid(error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a request."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return failure(400, f"the body is not JSON: {first['ctx']['error']}.", "invalid_request_error", code="bad_json")
    param = _field(first["loc"])
    wrong = dict.fromkeys(each["msg"] for each in (first, *others) if _field(each["loc"]) == param)
    if first["type"] == "extra_forbidden":
        wrong = {"there is no such field here; leave it out": None}
    message = f"{param or 'the body'}: {', or '.join(wrong)}."
    return failure(400, message, "invalid_request_error", param=param, code=str(first["type"]))


def _field(place: Sequence[str | int]) -> str | None:
    """The name of a field, without the types that were tried where it takes several."""
    names = takewhile(lambda part: part not in ("str", "constrained-str") and "[" not in part, map(str, place[1:]))
    return ".".join(names) or None


class LimitBody:
    """Reads the body of a request before anything else sees it, and refuses one that is too long."""

    def __init__(self, app: ASGIApp, most_bytes: int = MOST_BYTES) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(MOST_BODY_S):
                body = await self._body(scope, receive)
        except TimeoutError:
            text = f"the body was not there after {MOST_BODY_S:.0f} s. Send it faster, or in several requests."
            await failure(408, text, "invalid_request_error", code="too_slow")(scope, receive, send)
            return
        except _TooLong:
            text = f"the body is longer than {self.most_bytes} bytes, the most that a request may send."
            await failure(413, text, "invalid_request_error", code="too_long")(scope, receive, send)
            return
        except ClientDisconnect:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body; no more of it than may be sent is ever held."""
        portions: list[bytes] = []
        n_bytes, is_whole = 0, False
        if _declared(scope) > self.most_bytes:
            raise _TooLong
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            portions.append(message.get("body", b""))
            n_bytes += len(portions[-1])
            if n_bytes > self.most_bytes:
                raise _TooLong
            is_whole = not message.get("more_body", False)
        return b"".join(portions)


class _TooLong(Exception):
    pass


def _declared(scope: Mapping[str, Any]) -> int:
    """The length that a request names; 0 where it names none."""
    named = dict(scope["headers"]).get(b"content-length", b"0")
    return int(named) if named.isdigit() and len(named) < 20 else 0
