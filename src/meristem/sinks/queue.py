"""A queue and a thread between a run and one listener: however slow or broken it is, the run does not wait for it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from meristem.events import Emit, Event, silent

Call = Callable[[], None]
Status = Literal["ok", "failed", "hung"]


@dataclass(frozen=True)
class RateLimit:
    """How a listener is served; times in seconds.

    n_waiting: calls that may wait. What comes beyond that is dropped and counted.
    rest_s, longest_rest_s: how long a listener that failed is left alone, doubled at every further failure.
    n_retries: further tries of a call that failed, before it is dropped and counted.
    close_s: how long the end of a run waits for one listener.
    """

    n_waiting: int = 10_000
    rest_s: float = 1.0
    longest_rest_s: float = 600.0
    n_retries: int = 3
    close_s: float = 2.0


class SinkQueue:
    """Makes the calls to one listener on a thread of its own: critical ones first, each kind in its order.

    Critical calls are never dropped, and do not wait for the rest after a failure. The first failure is the warning
    ``sink.failed``; what was lost by failures and by a full queue is counted alike.
    close: called on that thread after the last call.
    """

    def __init__(self, name: str, tell: Emit, pace: RateLimit, close: Call | None = None) -> None:
        self.name = name
        self.status: Status = "ok"
        self.n_dropped = 0
        self._tell, self._pace, self._end = tell, pace, close
        self._changed = threading.Condition()
        self._critical: deque[Call] = deque()
        self._normal: deque[Call] = deque()
        self._rest_until_s, self._rest_s = 0.0, 0.0
        self._n_tries = 0
        self._has_failed = self._is_closing = False
        self._thread = threading.Thread(target=self._serve, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Call, *, is_critical: bool = False) -> None:
        """Have the call made later: when it is its turn, or before all others.

        What comes after ``close`` is no loss, and not counted.
        """
        with self._changed:
            if self._is_closing:
                return
            if not is_critical and len(self._normal) >= self._pace.n_waiting:
                self.n_dropped += 1
                return
            (self._critical if is_critical else self._normal).append(call)
            self._changed.notify()

    def close(self) -> None:
        """Make the calls that wait, and end; a listener that hangs is left behind after ``close_s``, as a warning."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(self._pace.close_s)
        if not self._thread.is_alive():
            return
        with self._changed:
            self.status = "hung"
            self._drop_all()
        cause = f"it did not end within {self._pace.close_s:g} s"
        self._tell(Event("sink.failed", {"sink": self.name, "cause": cause}, "warning"))
        self._tell = silent  # should the listener come back one day, the files of records may be closed

    def _serve(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: no listener may end a run
                self._rest(call, error)
            else:
                self._n_tries, self._rest_s = 0, 0.0
                self.status = "ok"
        try:
            if self._end is not None:
                self._end()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
            self.status = "failed"
            self._tell(Event("sink.failed", {"sink": self.name, "cause": f"at its end: {error!r}"}, "warning"))

    def _next(self) -> Call | None:
        """The next call, when it is time for it; None when there will be no more."""
        with self._changed:
            while True:
                if self._critical:
                    return self._critical.popleft()
                wait_s = self._rest_until_s - time.monotonic()
                if self._normal and (self._is_closing or wait_s <= 0):
                    return self._normal.popleft()
                if self._is_closing:
                    return None
                self._changed.wait(wait_s if self._normal else None)

    def _rest(self, call: Call, error: BaseException) -> None:
        """Leave the listener alone for a while, and the call for its next turn if it may have one."""
        with self._changed:
            self.status = "failed"
            self._n_tries += 1
            if self._n_tries > self._pace.n_retries:
                self.n_dropped, self._n_tries = self.n_dropped + 1, 0
            else:
                self._normal.appendleft(call)
            if self._is_closing:
                self._drop_all()
            self._rest_s = min(2 * self._rest_s or self._pace.rest_s, self._pace.longest_rest_s)
            self._rest_until_s = time.monotonic() + self._rest_s
        if not self._has_failed:
            self._has_failed = True
            payload = {"sink": self.name, "cause": repr(error), "next_try_s": self._rest_s}
            self._tell(Event("sink.failed", payload, "warning"))

    def _drop_all(self) -> None:
        self.n_dropped += len(self._critical) + len(self._normal)
        self._critical.clear()
        self._normal.clear()
