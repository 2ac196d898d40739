"""From a few short sequences to a long one: numbers that are polynomials of the length, extrapolated."""

from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def extrapolate(samples: Mapping[int, Mapping[K, int]], length: int) -> dict[K, int]:
    """Each number as the polynomial through its samples, at ``length``; one that a sample lacks is 0 there.

    samples: length to numbers. Two give a line, one a constant.
    """
    weights = {here: _weight(here, list(samples), length) for here in samples}
    names = {name for numbers in samples.values() for name in numbers}
    return {name: round(sum(weights[here] * samples[here].get(name, 0) for here in samples)) for name in names}


def _weight(here: int, places: list[int], length: int) -> Fraction:
    """How much the sample at ``here`` counts: Lagrange's polynomial that is 1 here and 0 at the other places."""
    weight = Fraction(1)
    for other in places:
        if other != here:
            weight *= Fraction(length - other, here - other)
    return weight
