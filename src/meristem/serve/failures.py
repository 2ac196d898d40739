"""Errors as the OpenAI API says them, and a bound on what a request may send."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meristem.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskFull,
    MeristemError,
    NoSession,
    QueueFull,
    SessionBusy,
    ShapeError,
    WorkerError,
    WorkerTimeout,
    WrongValue,
)

MOST_BYTES: Final = 64 << 20
"""What a request may send: a text of megabytes, or a session."""

RETRY_AFTER_S: Final = 1


class NoModel(WrongValue):
    """A request for a model that is not served here."""


STATUS: Final[Mapping[type[Exception], tuple[int, str, str]]] = {
    NoModel: (404, "invalid_request_error", "model_not_found"),
    NoSession: (404, "invalid_request_error", "session_not_found"),
    SessionBusy: (409, "invalid_request_error", "session_busy"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    DiskFull: (507, "server_error", "disk_full"),
    WorkerTimeout: (504, "server_error", "timeout"),
    WorkerError: (503, "server_error", "unavailable"),
    CheckpointError: (400, "invalid_request_error", "bad_session_file"),
    CapabilityError: (400, "invalid_request_error", "unsupported"),
    ConfigError: (400, "invalid_request_error", "invalid_value"),
    ShapeError: (400, "invalid_request_error", "invalid_value"),
    DataError: (400, "invalid_request_error", "invalid_value"),
    ClientDisconnect: (499, "invalid_request_error", "client_closed_request"),
}
"""Status, type and code of an error, by the first of its classes that is here; 500 for all others."""


def failure(status: int, message: str, kind: str, *, param: object = None, code: str | None = None) -> JSONResponse:
    """An error in the shape of the OpenAI API."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    error = {"message": message, "type": kind, "param": None if param is None else str(param), "code": code}
    return JSONResponse({"error": error}, status, headers)


def failure_of(error: Exception) -> JSONResponse:
    """What is said of an error; of one that nobody foresaw, no more than its name."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            status, name, code = STATUS[kind]
            return failure(status, str(error), name, param=getattr(error, "fields", {}).get("key"), code=code)
    message = (
        str(error) if isinstance(error, MeristemError) else f"{type(error).__name__}. This is a fault of meristem."
    )
    return failure(500, message, "server_error", code="internal_error")


def answer_failures(app: FastAPI) -> None:
    """Have every error of an application answered so."""

    async def invalid(request: Request, error: Exception) -> Response:
        return _invalid(error) if isinstance(error, RequestValidationError) else failure_of(error)

    async def refused(request: Request, error: Exception) -> Response:
        status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return failure(status, str(detail), "invalid_request_error")

    async def failed(request: Request, error: Exception) -> Response:
        return failure_of(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (MeristemError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, failed)


def _invalid(error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return failure(400, f"the body is not JSON: {first['ctx']['error']}.", "invalid_request_error", code="bad_json")
    param = ".".join(place) or None
    message = f"{param or 'the body'}: {first['msg']}"
    return failure(400, message, "invalid_request_error", param=param, code=str(first["type"]))


class LimitBody:
    """Reads the body of a request before anything else sees it, and refuses one that is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        portions: list[bytes] = []
        n_bytes, is_whole = _declared(scope), False
        while not is_whole and n_bytes <= MOST_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            portions.append(message.get("body", b""))
            n_bytes = max(n_bytes, sum(map(len, portions)))
            is_whole = not message.get("more_body", False)
        if n_bytes > MOST_BYTES:
            text = f"the body is longer than {MOST_BYTES} bytes, the most that a request may send."
            await failure(413, text, "invalid_request_error", code="too_long")(scope, receive, send)
            return
        body = b"".join(portions)
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)


def _declared(scope: Mapping[str, Any]) -> int:
    """The length that a request names; 0 where it names none."""
    named = dict(scope["headers"]).get(b"content-length", b"0")
    return int(named) if named.isdigit() and len(named) < 20 else 0
