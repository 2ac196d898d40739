"""The learning rate as a function of how much of the run is done."""

import math

from meristem.optim.part import SchedulePart

FIRST_SHARE = 0.01
"""Warm-up begins here and not at 0: the first step of a run shall move something."""


def rate_factor(part: SchedulePart, progress: float) -> float:
    """What the rate is multiplied by when ``progress`` of the run, in [0, 1], is done.

    Progress may be counted in steps, tokens or seconds: the schedule does not know.
    """
    if progress < part.warmup:
        return FIRST_SHARE + (1 - FIRST_SHARE) * progress / part.warmup
    return _SHAPES[part.shape](min(1.0, (progress - part.warmup) / (1 - part.warmup)), part.floor)


def _cosine(done: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _constant(done: float, floor: float) -> float:
    return 1.0


_SHAPES = {"cosine": _cosine, "constant": _constant}
