"""Threads that do one piece of work after the other off a bounded queue, from wherever it is handed in.

There is no event loop in them: a plain function, a coroutine and another thread hand work in alike, and wait for the
future that they get, or go on (``asyncio.wrap_future`` makes it one that can be awaited).

Source: growth.md section 22.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from meristem.errors import QueueFull, WorkerError

T = TypeVar("T")

CLOSE_S: Final = 1.0
"""How long ``close`` waits for work that is being done."""


@dataclass(frozen=True)
class Health:
    """What a pool is at: pieces of work that wait and that are done just now, threads that live, whether it is open."""

    n_waiting: int
    n_running: int
    n_threads: int
    is_open: bool


class Pool:
    """``n_threads`` threads, and at most ``capacity`` pieces of work that wait for one. They end with ``close``.

    What may hang belongs into a process, which a piece of work calls (``worker.process``).
    """

    def __init__(self, name: str, n_threads: int, *, capacity: int = 128) -> None:
        self.name, self._capacity, self._is_open = name, capacity, True
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._n_running = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Hand work in: the future of what it gives or raises, which can be cancelled until it begins.

        Never waits. Raises QueueFull where as much waits already as may, and WorkerError after ``close``.
        """
        future: Future[T] = Future()
        with self._changed:
            if not self._is_open:
                raise WorkerError(
                    f"{self.name} was closed. Hand work in before that.", reason="stopped", name=self.name
                )
            if len(self._work) >= self._capacity:
                raise QueueFull(
                    f"{self._capacity} pieces of work wait for {self.name} already. Hand this one in later.",
                    name=self.name,
                    capacity=self._capacity,
                )
            self._work.append((future, work))
            self._changed.notify()
        return future

    @property
    def health(self) -> Health:
        """What it is at now."""
        with self._changed:
            n_threads = sum(thread.is_alive() for thread in self._threads)
            return Health(len(self._work), self._n_running, n_threads, self._is_open)

    def stop(self) -> None:
        """Take no more work, and cancel what waits."""
        with self._changed:
            self._is_open = False
            waiting = [future for future, _ in self._work]
            self._work.clear()
            self._changed.notify_all()
        for future in waiting:  # outside the lock: what was to be done when they end is done here
            future.cancel()
            future.set_running_or_notify_cancel()

    def close(self) -> bool:
        """``stop``, let what runs come to its end, and say whether it did within a second. May be said twice."""
        self.stop()
        until = time.monotonic() + CLOSE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(until - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            future, work = taken
            if future.set_running_or_notify_cancel():
                try:
                    value = work()
                except BaseException as cause:  # noqa: BLE001 - it is raised where the future is waited for
                    future.set_exception(cause)
                else:
                    future.set_result(value)
            with self._changed:
                self._n_running -= 1

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next piece of work; None once the pool is closed."""
        with self._changed:
            while not self._work and self._is_open:
                self._changed.wait()
            if not self._work:
                return None
            self._n_running += 1
            return self._work.popleft()
