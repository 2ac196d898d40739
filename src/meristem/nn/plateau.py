"""When levels should be promoted: values that are fed with gradient norms and say when it is time (memory.md 6.7).
A part for growth: nothing calls it yet.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Plateau:
    """The gradient norm of the fastest level, smoothed, over its running peak, has stopped moving.

    ``smoothed <- smoothed + weight (norm - smoothed)``; it is flat when the deviation of the last ``window`` of these
    over the peak, the tenth at either end left out, is below ``limit``; it is time after ``patience`` flat values in a
    row. After a promotion all begins afresh, and ``cooldown`` samples go by first.
    """

    weight: float = 0.1
    window: int = 50
    limit: float = 0.025
    patience: int = 50
    cooldown: int = 2000
    smoothed: tuple[float, ...] = ()
    peak: float = 0.0
    n_still: int = 0
    n_waiting: int = 0

    @property
    def is_due(self) -> bool:
        return self.n_still >= self.patience and self.n_waiting == 0

    def fed(self, norm: float) -> Self:
        """With one more gradient norm."""
        before = self.smoothed[-1] if self.smoothed else norm
        smoothed = (*self.smoothed, before + self.weight * (norm - before))[-self.window :]
        peak = max(self.peak, smoothed[-1])
        is_still = len(smoothed) == self.window and _trimmed_deviation(smoothed) < self.limit * peak
        return replace(
            self,
            smoothed=smoothed,
            peak=peak,
            n_still=self.n_still + 1 if is_still else 0,
            n_waiting=max(0, self.n_waiting - 1),
        )

    def promoted(self) -> Self:
        """After a promotion."""
        return replace(self, smoothed=(), peak=0.0, n_still=0, n_waiting=self.cooldown)


@dataclass(frozen=True)
class Quiet:
    """A level hardly learns: in ``patience`` windows in a row the median gradient norm at its fires is below ``limit``.

    window: fires, not steps.
    """

    window: int = 20
    limit: float = 0.05
    patience: int = 2
    norms: tuple[float, ...] = ()
    n_quiet: int = 0

    @property
    def is_due(self) -> bool:
        return self.n_quiet >= self.patience

    def fed(self, norm: float) -> Self:
        """With the gradient norm at one more fire."""
        norms = (*self.norms, norm)
        if len(norms) < self.window:
            return replace(self, norms=norms)
        is_quiet = statistics.median(norms) < self.limit
        return replace(self, norms=(), n_quiet=self.n_quiet + 1 if is_quiet else 0)

    def promoted(self) -> Self:
        """After a promotion."""
        return replace(self, norms=(), n_quiet=0)


def _trimmed_deviation(values: tuple[float, ...]) -> float:
    n_left_out = len(values) // 10
    return statistics.pstdev(sorted(values)[n_left_out : len(values) - n_left_out])
