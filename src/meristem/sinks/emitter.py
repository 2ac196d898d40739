"""The one way from a run to everything that listens to it: files of records first, then the screen and trackers."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from meristem.errors import SinkError
from meristem.events import Event
from meristem.sinks.queue import Call, RateLimit, SinkQueue, Status
from meristem.sinks.records import Records

Sink = Callable[[Mapping[str, Any]], None]
"""Takes records, on a thread of its own.

It may have a ``close``, which is called there after the last of them, ``close_s``, how long that may take, and ``id``,
that of the run there.
"""

SCREEN = "console"

MINOR_PER_MINUTE = 60
"""Events of one name and of severity debug or info that sinks get within a minute, and at once."""

TELL_EVERY_S = 60.0
"""Seconds between two events that tell what sinks did not get."""


@dataclass(frozen=True)
class SinkRecord:
    """What became of one sink. ``dropped``: records that it did not get, those of a limited name not among them."""

    name: str
    status: Status
    dropped: int
    id: str | None = None


class Limit:
    """Lets so many events of each name pass within a minute, and counts the others. Threads may share it.

    Allowance grows with the time that passes by ``clock``, which is monotonic, up to what a minute is worth.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def passes(self, name: str) -> bool:
        """Whether one more of that name may pass now."""
        with self._lock:
            now = self._clock()
            left, then = self._left.get(name, (self._per_minute, now))
            left = min(left + (now - then) * self._per_minute / 60, self._per_minute)
            is_passing = left >= 1
            self._left[name] = left - is_passing, now
            if not is_passing:
                self._counts[name] = self._counts.get(name, 0) + 1
            return is_passing

    def take_counts(self) -> dict[str, int]:
        """How many of each name did not pass since this was last asked."""
        with self._lock:
            counts, self._counts = self._counts, {}
            return counts


class Emitter:
    """Writes the events of a run, and shows every record of the run to its sinks.

    The files are complete whatever the sinks do, and every record in them carries run, step, ``seq`` and rank. Each
    sink has a bounded queue and a thread; what it did not get is counted and reported at most once in ``TELL_EVERY_S``,
    as ``sink.dropped`` and, where a name came too often, ``events.limited``. A critical event is on the disk when
    ``emit`` returns and passes every queue and limit (growth.md 26, 27).

    sinks: by name, in the order in which they are closed.
    screen: one more sink, ``SCREEN``, which is shown only what is more than information and is closed last.
    clock: monotonic seconds; the system's time may jump.
    """

    def __init__(
        self,
        records: Records,
        sinks: Mapping[str, Sink] | None = None,
        *,
        screen: Sink | None = None,
        pace: RateLimit | None = None,
        minor_per_minute: int = MINOR_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if SCREEN in (sinks or {}):
            raise SinkError(f"a sink is called '{SCREEN}', which is the name of the screen. Give it another name.")
        self.records = records
        self._clock = clock
        self._limit = Limit(minor_per_minute, clock)
        self._sinks = {**(sinks or {}), **({SCREEN: screen} if screen else {})}
        self._boxes = {
            name: SinkQueue(name, self.emit, _pace(pace or RateLimit(), sink), getattr(sink, "close", None))
            for name, sink in self._sinks.items()
        }
        self._n_told = dict.fromkeys(self._sinks, 0)
        self._telling = threading.Lock()
        self._tell_at_s = clock() + TELL_EVERY_S
        records.listen(self._show)

    def emit(self, event: Event) -> None:
        """Record an event at the step that was last recorded, and show it to the sinks."""
        self.records.event(event)
        if self._clock() >= self._tell_at_s:
            self._tell_losses()

    def later(self, name: str, call: Call) -> None:
        """Have a call made on the thread of that sink, after the records that it was shown before."""
        self._boxes[name].put(call)

    def close(self) -> tuple[SinkRecord, ...]:
        """End the sinks one after the other, each within its time, and say what became of them.

        What is emitted here still goes to the sinks that are closed later.
        """
        with contextlib.ExitStack() as ends:  # each has its turn, also where a full disk takes no word about another
            for box in reversed(self._boxes.values()):
                ends.callback(self._tell_losses)
                ends.callback(box.close)
            ends.callback(self._tell_losses)
        return tuple(
            SinkRecord(name, box.status, box.n_dropped, getattr(self._sinks[name], "id", None))
            for name, box in self._boxes.items()
        )

    def _show(self, record: Mapping[str, Any]) -> None:
        """Put a record before every sink."""
        severity = record.get("severity")
        if not self._boxes or (severity in ("debug", "info") and not self._limit.passes(record["name"])):
            return
        for name, box in self._boxes.items():
            if name != SCREEN or severity in ("warning", "error", "critical"):
                box.put(partial(self._sinks[name], record), is_critical=severity == "critical")

    def _tell_losses(self) -> None:
        for event in self._losses():
            self.records.event(event)

    def _losses(self) -> list[Event]:
        """One event for what was limited, and one for each sink that missed something since the last one."""
        with self._telling:
            self._tell_at_s = self._clock() + TELL_EVERY_S
            counts = self._limit.take_counts()
            events = [Event("events.limited", {"n": sum(counts.values()), "by_name": counts})] if counts else []
            for name, box in self._boxes.items():
                in_all = box.n_dropped
                n_new, self._n_told[name] = in_all - self._n_told[name], in_all
                if n_new:
                    payload = {"sink": name, "dropped": n_new, "in_all": in_all}
                    events.append(Event("sink.dropped", payload, "warning"))
        return events


def _pace(pace: RateLimit, sink: Sink) -> RateLimit:
    return replace(pace, close_s=getattr(sink, "close_s", pace.close_s))
