"""Batches read ahead by a thread of their own, so that training does not wait for a disk."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Protocol

from meristem.data.stream import Batch, Cursor

MOST: Final = 32
"""Batches read ahead at most, however small they are: what a run that rolls back has read for nothing."""


class Batches(Protocol):
    """What gives batches, as ``data.stream.Stream`` does."""

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at the cursor, and the cursor after it."""


@contextmanager
def prefetched(batches: Batches, most_bytes: int) -> Iterator[Batches]:
    """The same batches, to the bit, read ahead while the block lasts; with 0 bytes they are read when they are needed.

    most_bytes: what waits to be taken holds no more than so many bytes, or is one batch. Where nobody takes any,
    nothing is read. What a reading raises is raised where its batch is taken.
    """
    if not most_bytes:
        yield batches
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        reader = _Ahead(batches, most_bytes, pool)
        try:
            yield reader
        finally:
            reader.drop()


class _Ahead:
    """The batches from a cursor on, of which some wait."""

    def __init__(self, batches: Batches, most_bytes: int, pool: ThreadPoolExecutor) -> None:
        self._batches, self._most_bytes, self._pool = batches, most_bytes, pool
        self._waiting: deque[Future[tuple[Batch, Cursor]]] = deque()
        self._chain: _Chain | None = None
        self._expected: Cursor | None = None

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """The batch at the cursor, and the cursor after it; at another one than the last given, reading begins anew."""
        if self._chain is None or cursor != self._expected:
            self.drop()
            self._chain = _Chain(self._batches, cursor)
            self._waiting.append(self._pool.submit(self._chain.read))
        self._expected = None  # where the reading raises, the next call begins anew
        batch, after = self._waiting.popleft().result()
        n_ahead = min(MOST, max(1, self._most_bytes // batch.size_bytes))
        while len(self._waiting) < n_ahead:
            self._waiting.append(self._pool.submit(self._chain.read))
        self._expected = after
        return batch, after

    def drop(self) -> None:
        """Forget what waits; a reading in progress ends unseen."""
        while self._waiting:
            self._waiting.pop().cancel()


class _Chain:
    """Batches one after the other from a cursor on. Only the thread that reads moves it."""

    def __init__(self, batches: Batches, cursor: Cursor) -> None:
        self._batches, self._cursor = batches, cursor

    def read(self) -> tuple[Batch, Cursor]:
        """The next batch, and the cursor after it; the same one again after a reading that raised."""
        batch, self._cursor = self._batches.next(self._cursor)
        return batch, self._cursor
