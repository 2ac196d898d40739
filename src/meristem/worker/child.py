"""The process of a worker: answers one call after the other, and ends with whoever started it.

It imports little, so that it is ready soon; a call imports what it needs, and that stays for the next.
"""

import contextlib
import math
import os
import signal
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, BinaryIO

import orjson

LENGTH = struct.Struct("<Q")
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


def message(head: Mapping[str, Any]) -> bytes:
    """What a worker and its process say to each other: the length of some JSON, and the JSON. No pickle.

    Raises TypeError for what JSON cannot hold: other types, keys that are no text, numbers that are not finite.
    """
    body = orjson.dumps(head, option=_PLAIN)
    # orjson writes null for a number that is not finite; the other side would take it for an answer of None.
    if b"null" in body and not _is_finite(head):
        raise TypeError("a number is infinite or not a number; send it as a text")
    return LENGTH.pack(len(body)) + body


def _is_finite(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)


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
    with contextlib.suppress(ConnectionError):  # the other side is gone: nobody reads the answer
        line.sendall(_answer(lambda: [import_module(name).__name__ for name in imports]))
        while (call := _next(calls)) is not None:
            line.sendall(_answer(partial(_called, call)))


def _called(call: dict[str, Any]) -> object:
    """What the function that the text ``package.module:function`` names gives."""
    module, _, function = call["endpoint"].partition(":")
    return getattr(import_module(module), function)(call["payload"])


def _answer(work: Callable[[], object]) -> bytes:
    """The message that says what ``work`` gave or raised."""
    try:
        value = work()
    except BaseException as cause:  # noqa: BLE001 - foreign code may raise anything, SystemExit too; that is its answer
        return message({"raised": _raised(cause)})
    try:
        return message({"value": value})
    except Exception as cause:  # noqa: BLE001 - the value came from foreign code and may fail in its own ways
        return message({"wrong": f"{type(value).__name__} ({_raised(cause)['cause']})"})


def _raised(cause: BaseException) -> dict[str, str]:
    """An exception as texts that JSON can hold."""
    texts = {
        "type": type(cause).__name__,
        "cause": traceback.format_exception_only(cause)[-1].strip(),
        "traceback": "".join(traceback.format_exception(cause)),
    }
    return {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def _next(calls: BinaryIO) -> dict[str, Any] | None:
    """The next call; None when the other side says no more."""
    head = calls.read(LENGTH.size)
    body = calls.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
    return orjson.loads(body) if body else None


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
