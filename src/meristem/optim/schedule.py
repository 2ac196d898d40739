"""The learning rate as a function of where a run stands."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from meristem.errors import ConflictingKeys, WrongValue
from meristem.optim.config import ScheduleConfig, Shape
from meristem.optim.kinds import Group
from meristem.optim.multi_period import MultiPeriodOptimizer


@dataclass(frozen=True)
class ScheduleProgress:
    """Where a run stands before a step.

    share: of the whole run, from 0, by the limit that it was given. step, tokens: made and predicted so far.
    """

    share: float
    step: int
    tokens: int


def rate_factor(config: ScheduleConfig, done: ScheduleProgress) -> float:
    """What the learning rate is multiplied by in the step that a run standing at ``done`` makes next.

    With t what is done in the unit of the schedule, P its period, of which W is the warm-up::

        t < W        f0 + (1 - f0) t / W
        t < P        shape((t - W) / (P - W))
        t >= P       hold: shape(1)      restart: shape((t mod P) / P)      error

    The period of a schedule that goes by the share of the run is the run. Only ``done`` is read, so that a run
    that goes on from a checkpoint has the rates that it would have had. Raises ConflictingKeys for ``error``.
    """
    count = {"share": done.share, "steps": done.step, "tokens": done.tokens}[config.unit]
    period = config.period or 1
    progress = count / period
    if progress < config.warmup:
        return config.warmup_start + (1 - config.warmup_start) * progress / config.warmup
    if progress >= 1 and config.after == "error":
        raise ConflictingKeys(
            f"schedule.period is {period} {config.unit}, and the run goes on after {count}; schedule.after is 'error'. "
            f"Raise schedule.period, end the run there, or set schedule.after to hold or restart.",
            path="schedule.period",
            value=period,
        )
    if progress >= 1 and config.after == "restart":
        return SHAPES[config.shape](count % period / period, config)
    return SHAPES[config.shape](min(1.0, (progress - config.warmup) / (1 - config.warmup)), config)


def set_rates(optimizer: MultiPeriodOptimizer, factor: float) -> None:
    """Give every group ``factor`` times its highest learning rate, before the step that it is for.

    The highest rate stands in the group as ``rate``, and what the step reads as ``lr``: ratios between groups stay as
    they are, and setting a factor twice is setting it once. In groups of a seed it is multiplied by the scale of the
    seed and by its warm-up. Raises WrongValue, with nothing changed, where a group has
    no rate.
    """
    rates = [rate_of(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor * optimizer.rate_scale(group)


def _constant(done: float, config: ScheduleConfig) -> float:
    return 1.0


def _cosine(done: float, config: ScheduleConfig) -> float:
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float, config: ScheduleConfig) -> float:
    return config.floor + (1 - config.floor) * (1 - done)


def _step(done: float, config: ScheduleConfig) -> float:
    """γ^k on stair k of n, with γ such that the last stair is the floor."""
    # A division of whole numbers may end a hair below the stair that it stands for.
    stair = min(config.stairs - 1, math.floor(done * config.stairs + 1e-9))
    return float(config.floor ** (stair / (config.stairs - 1)))


SHAPES: Final[dict[Shape, Callable[[float, ScheduleConfig], float]]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
}
"""``schedule.shape`` to the factor where ``done`` of its course, in [0, 1], is run."""


def rate_of(group: Group) -> float:
    """The highest rate of a group, which the schedule scales. Raises WrongValue where it has none."""
    if "rate" not in group:
        name = group.get("name", "without a name")
        raise WrongValue(
            f"group {name} of the optimizer has no rate; found {', '.join(sorted(group))}. Give it the highest rate "
            f"that the schedule shall scale, as group['rate'].",
            group=name,
        )
    return float(group["rate"])
