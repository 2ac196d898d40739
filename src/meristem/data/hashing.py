"""Hashes on a thread beside the one that reads and writes: hashlib lets go of the interpreter for long inputs."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, ParamSpec, Self, TypeVar

MOST_BEHIND_BYTES: Final = 1 << 25
"""What may wait to be hashed, and is held in memory until then."""

LEAST_BYTES: Final = 1 << 15
"""Below this a hash costs less than handing it over."""

P = ParamSpec("P")
R = TypeVar("R")


class HashThread:
    """Makes calls one after the other on a thread of its own, a bounded number of bytes behind."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._waiting: deque[tuple[int, Future[object]]] = deque()
        self._waiting_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=raised is not None)

    def submit(self, size_bytes: int, call: Callable[P, R], *given: P.args, **named: P.kwargs) -> "Future[R]":
        """Have a call made that holds on to so many bytes; waits for earlier ones while too many are waiting."""
        future = self._pool.submit(call, *given, **named)
        self._waiting.append((size_bytes, future))  # type: ignore[arg-type]
        self._waiting_bytes += size_bytes
        while self._waiting and (self._waiting_bytes > MOST_BEHIND_BYTES or self._waiting[0][1].done()):
            size, earliest = self._waiting.popleft()
            self._waiting_bytes -= size
            earliest.result()
        return future
