"""Ctrl-C, SIGTERM and SIGHUP as a flag that the loop reads between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, and a terminal that is closed."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While this lasts, the first signal only sets the given flag; the second does what it always did.

    So the step in progress can end and be saved, and a run that hangs can still be stopped. Outside the main thread,
    where Python takes no signals, the flag stays unset.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    every = {number: signal.getsignal(number) for number in SIGNALS}
    # A run under nohup is to outlive its terminal.
    outlives = every[signal.SIGHUP] == signal.SIG_IGN
    usual: dict[signal.Signals, Any] = {
        number: each for number, each in every.items() if not (outlives and number == signal.SIGHUP)
    }

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        _restore(usual)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        _restore(usual)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # A handler that was not set from Python cannot be set again from here.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
