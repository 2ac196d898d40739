"""What was fetched lately, kept for the next who needs it: one fetch at a time for each key (growth.md 23)."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from meristem.events import Emit, Event, silent

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class Counts:
    """What came of lookups: found; fetched anew; waited for a fetch that was under way; fetches that failed.

    n_evicted: entries that left, since others were used later, since they were too old, or since they were dropped.
    """

    n_hits: int = 0
    n_misses: int = 0
    n_joined: int = 0
    n_failed: int = 0
    n_evicted: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits among hits and misses; None before the first."""
        n = self.n_hits + self.n_misses
        return self.n_hits / n if n else None

    def less(self, earlier: Self) -> "Counts":
        """What was counted since."""
        return Counts(*(now - then for now, then in zip(vars(self).values(), vars(earlier).values(), strict=True)))


@dataclass(frozen=True)
class Statistics:
    """Counts since the last reset and of the whole life, and how many entries are held."""

    interval: Counts
    lifetime: Counts
    n_held: int


class Cache(Generic[K, V]):
    """At most ``capacity`` values, each for ``ttl_s`` seconds; those used longest ago leave first. Threads share it.

    A fetch runs outside of the lock. clock: seconds, which only grow.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        emit: Emit = silent,
    ) -> None:
        self.name, self._capacity, self._ttl_s, self._clock, self._emit = name, capacity, ttl_s, clock, emit
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, tuple[V, float]] = OrderedDict()
        self._flights: dict[K, Future[V]] = {}
        self._counted: Counter[str] = Counter()
        self._reset = Counts()

    def ask(
        self,
        key: K,
        fetch: Callable[[], V],
        run: Callable[[Callable[[], None]], Future[None] | None] = lambda fly: fly(),
    ) -> Future[V]:
        """The future of the value of a key: what is held, what another is fetching, or what ``fetch`` will give.

        run: calls what it is given, at once by default, or hands it to a pool. What it raises is raised here, and a
        fetch that a pool cancels fails. What ``fetch`` raises is in the future, and not kept.
        """
        with self._lock:
            held = self._entries.get(key)
            if held is not None and self._clock() - held[1] < self._ttl_s:
                self._counted["n_hits"] += 1
                self._entries.move_to_end(key)
                found: Future[V] = Future()
                found.set_result(held[0])
                return found
            if key in self._flights:
                self._counted["n_joined"] += 1
                return self._flights[key]
            self._counted["n_misses"] += 1
            flight: Future[V] = Future()
            self._flights[key] = flight
        try:
            work = run(lambda: self._fly(key, fetch, flight))
        except BaseException as cause:
            self._land(key, flight, cause)
            raise
        if work is not None:
            work.add_done_callback(lambda done: self._cancelled(key, flight, done))
        return flight

    def drop(self, key: K) -> None:
        """Forget a key: the next lookup fetches it, whatever is being fetched now."""
        with self._lock:
            self._flights.pop(key, None)
            self._counted["n_evicted"] += self._entries.pop(key, None) is not None

    def sweep(self) -> int:
        """Let go of what is too old; how many entries that were. Where there are some, the event ``cache.evicted``."""
        with self._lock:
            until = self._clock() - self._ttl_s
            old = [key for key, (_, at) in self._entries.items() if at <= until]
            for key in old:
                del self._entries[key]
            self._counted["n_evicted"] += len(old)
            n_held = len(self._entries)
        if old:
            self._emit(Event("cache.evicted", {"cache": self.name, "n_evicted": len(old), "n_held": n_held}))
        return len(old)

    def snapshot(self, *, reset: bool = False) -> Statistics:
        """What was counted. reset: from here on the interval begins anew; the lifetime goes on."""
        with self._lock:
            lifetime = Counts(**self._counted)
            interval = lifetime.less(self._reset)
            if reset:
                self._reset = lifetime
            return Statistics(interval, lifetime, len(self._entries))

    def _fly(self, key: K, fetch: Callable[[], V], flight: Future[V]) -> None:
        try:
            value = fetch()
        except BaseException as cause:  # noqa: BLE001 - it is raised where the future is waited for
            self._land(key, flight, cause)
            return
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
                self._counted["n_evicted"] += self._entries.pop(key, None) is not None  # it was too old
                while len(self._entries) >= self._capacity:
                    self._entries.popitem(last=False)
                    self._counted["n_evicted"] += 1
                self._entries[key] = (value, self._clock())
        flight.set_result(value)

    def _land(self, key: K, flight: Future[V], cause: BaseException) -> None:
        """Say to all who wait that the fetch failed."""
        with self._lock:
            self._counted["n_failed"] += 1
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.set_exception(cause)

    def _cancelled(self, key: K, flight: Future[V], done: Future[None]) -> None:
        if done.cancelled() and not flight.done():
            self._land(key, flight, InterruptedError("it was cancelled before it began"))
