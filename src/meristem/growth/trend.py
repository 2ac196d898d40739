"""The course of a loss against the logarithm of the tokens: a line, and how sure its slope is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from meristem.growth.observe import HeldOut
from meristem.linalg import student_t


@dataclass(frozen=True)
class Trend:
    """The slope of the loss in nats per ``ln tokens``, by least squares, and its standard error, of n evaluations."""

    n: int
    slope: float
    error: float

    @classmethod
    def of(cls, held_out: Sequence[HeldOut]) -> Self | None:
        """The line through these; None where fewer than three of them, or only one number of tokens, have a place."""
        points = [(math.log(each.tokens), each.nats) for each in held_out if each.tokens > 0]
        n = len(points)
        if n < 3:
            return None
        mean_x, mean_y = (math.fsum(column) / n for column in zip(*points, strict=True))
        spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
        if spread == 0:
            return None
        slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        squares = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
        return cls(n, slope, math.sqrt(squares / (n - 2) / spread))

    def gain(self, share: float) -> tuple[float, float]:
        """How far the loss falls over the next ``share`` of the tokens, in nats, and half its 95 % interval."""
        way = math.log1p(share)
        return -self.slope * way, student_t(self.n - 2) * self.error * way
