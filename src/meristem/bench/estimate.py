"""Means over seeds with 95 % intervals, differences of pairs, and how both are said."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meristem.linalg import student_p, student_t


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval, t s / sqrt(n); no interval is known of one seed.

    p: how often a mean of 0 would give one as far from it, by Student's t.
    """

    mean: float
    half: float | None
    p: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 4, sign: str = "") -> str:
        """As ``2.4100 ± 0.0071``."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Of independent seeds."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, None)
    error = statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, student_t(n - 1) * error, student_p(mean / error, n - 1) if error else float(mean == 0))


def holm(ps: Sequence[float]) -> list[float]:
    """Each of several p as it counts beside the others (Holm 1979): at most 0.05 are false with one in twenty."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    found, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        found[place] = least
    return found


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours less theirs, seed by seed: two runs of one seed read the same batches. None without a common seed."""
    apart = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return estimate(apart) if apart else None


def said(difference: Estimate, unit: str, *, less_is_better: bool = True) -> str:
    """In words: better, worse, no effect, or that one seed says nothing."""
    if difference.half is None:
        return f"{difference.text(sign='+')} {unit} (a single seed, so no interval)"
    if not difference.is_clear:
        return f"**no effect** ({difference.text(sign='+')} {unit})"
    is_better = (difference.mean < 0) is less_is_better
    return f"{'better' if is_better else 'worse'} by {abs(difference.mean):.4f} ± {difference.half:.4f} {unit}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows)]
