"""Timing that survives a noisy machine: candidates are interleaved in one run, and medians are compared."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, beside what it has to be. ``target`` is None where there is none.

    figures: what was measured with it, for programs; people read the note.
    """

    name: str
    measured: float | None
    unit: str
    target: float | None = None
    sense: Literal[">=", "<="] = ">="
    note: str = ""
    figures: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """None where nothing was measured or there is no target."""
        if self.measured is None or self.target is None:
            return None
        return self.measured >= self.target if self.sense == ">=" else self.measured <= self.target

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"is_met": self.is_met}


Timed = Callable[[], float]
"""One repetition; gives its own seconds."""


def timed(step: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Timed:
    """A candidate that this process times, by the wall or by another clock in seconds."""

    def once() -> float:
        began = clock()
        step()
        return clock() - began

    return once


def medians(candidates: Mapping[str, Timed], *, n_repeats: int, n_warm: int = 2) -> dict[str, float]:
    """Median seconds of every candidate. They are interleaved, so that what disturbs the machine disturbs all."""
    for once in candidates.values():
        for _ in range(n_warm):
            once()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(n_repeats):
        for name, once in candidates.items():
            seconds[name].append(once())
    return {name: statistics.median(values) for name, values in seconds.items()}
