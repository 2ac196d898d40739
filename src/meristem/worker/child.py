"""The process of a worker: answers one call after the other, and ends with whoever started it.

It imports little, so that it is ready soon; a call imports what it needs, and that stays for the next.
"""

import contextlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, BinaryIO

import orjson

from meristem.worker.message import LENGTHS, Result, message, tensors_of


def serve(messages: int, lifeline: int, imports: Sequence[str]) -> None:
    """Answer calls until the other side says no more.

    messages: descriptor of the socket for calls and answers. lifeline: descriptor of a pipe into which nothing is ever
    written; when its other end closes, the parent is gone and this whole process group ends at once, whatever it does.
    imports: modules that every call will need, imported before the first.
    """
    _end_with_parent(lifeline)
    with contextlib.suppress(OSError):  # what foreign code prints is no part of the answer of a command
        os.dup2(2, 1)
    line = socket.socket(fileno=messages)
    calls = line.makefile("rb")
    _send(line, _answer(lambda: [import_module(name).__name__ for name in imports]))
    while True:
        try:
            call, packed = _next(calls)
        except EOFError:
            return
        _send(line, _answer(lambda call=call, packed=packed: _called(call, packed)))  # type: ignore[misc]


def endpoint(name: str) -> Callable[..., Any]:
    """The function that the text ``package.module:function`` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def echo(payload: object) -> object:
    """Give back what came: the endpoint of a health check."""
    return payload


def _called(call: dict[str, Any], packed: bytes) -> object:
    function = endpoint(call["endpoint"])
    return function(call["payload"], tensors_of(packed)) if packed else function(call["payload"])


def _answer(work: Callable[[], object]) -> list[bytes]:
    """The message that says what ``work`` gave or raised."""
    try:
        value = work()
    except BaseException as cause:  # noqa: BLE001 - foreign code may raise anything, SystemExit too; that is its answer
        return message({"raised": _raised(cause)}, {})
    result = value if isinstance(value, Result) else Result(value)
    try:
        return message({"value": result.value}, result.tensors)
    except Exception as cause:  # noqa: BLE001 - the value came from foreign code and may fail in its own ways
        return message({"wrong": f"{type(result.value).__name__} ({_raised(cause)['cause']})"}, {})


def _raised(cause: BaseException) -> dict[str, str]:
    """An exception as texts that JSON can hold."""
    texts = {
        "type": type(cause).__name__,
        "cause": traceback.format_exception_only(cause)[-1].strip(),
        "traceback": "".join(traceback.format_exception(cause)),
    }
    return {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def _next(calls: BinaryIO) -> tuple[dict[str, Any], bytes]:
    n_body, n_packed = LENGTHS.unpack(_exactly(calls, LENGTHS.size))
    call: dict[str, Any] = orjson.loads(_exactly(calls, n_body))
    return call, _exactly(calls, n_packed)


def _exactly(calls: BinaryIO, n_bytes: int) -> bytes:
    found = calls.read(n_bytes)
    if len(found) < n_bytes:
        raise EOFError
    return found


def _send(line: socket.socket, pieces: list[bytes]) -> None:
    for piece in pieces:
        line.sendall(piece)


def _end_with_parent(lifeline: int) -> None:
    """Have this process group killed when the other end of ``lifeline`` closes.

    On Linux the kernel does it, by the signal of the descriptor: even code that holds the interpreter's lock ends.
    Elsewhere a thread waits for it, and such code ends when it next gives up the lock.
    """
    try:
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):
        threading.Thread(target=_end_at_close, args=(lifeline,), name="lifeline", daemon=True).start()
        return
    os.set_blocking(lifeline, False)
    with contextlib.suppress(BlockingIOError):  # empty and open, as it should be; closed means it was too late to ask
        if not os.read(lifeline, 1):
            os.killpg(0, signal.SIGKILL)


def _end_at_close(lifeline: int) -> None:
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)
