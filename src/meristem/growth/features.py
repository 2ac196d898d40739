"""A reading as numbers for a policy that learns, each with whether it was measured (growth.md 14.2).

A policy that has an attribute ``observes`` finds them in ``reading.observation``:

class Learned:
    observes = Observes(metrics=("gradient_norm",))

    def __call__(self, reading, mask):
        reading.observation.features["blocks.1/blend_weight"]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from meristem.errors import MissingDependency, MissingMetric
from meristem.events import Emit, Event, Severity, silent
from meristem.growth.observe import Feature, Observation, Reading, Record, SlotReading
from meristem.growth.stage import OPEN, Stage

FEW, HARDLY_ANY = 0.3, 0.1
"""Shares of what was declared from which on it is a warning, and critical, that no more was measured."""

KEEP: Final = 0.1
"""Weight of the newest value in a moving mean."""


@dataclass(frozen=True)
class Observes(Record):
    """What a policy wants to see as numbers. metrics: of the reading, by name. is_strict: it is not asked where one of
    them was not measured. most_slots: of more, the first are seen. is_log: numbers go through ``symlog`` first.
    """

    metrics: tuple[str, ...] = ()
    is_strict: bool = True
    most_slots: int = 100
    is_log: bool = False


def observed(
    reading: Reading, observes: Observes, normaliser: "Normaliser", *, emit: Emit = silent
) -> tuple["Normaliser", Reading]:
    """The normaliser that has seen a reading, and the reading with all that a policy observes, scaled by it.

    Raises MissingMetric and MissingDependency as ``features`` does.
    """
    seen = replace(reading, slots=reading.slots[: observes.most_slots])
    given = features(seen, observes.metrics, is_strict=observes.is_strict, emit=emit)
    if observes.is_log:
        given = {name: Feature(symlog(value), is_present) for name, (value, is_present) in given.items()}
    after, scaled = normaliser.scale(given)
    slots = tuple(each.slot for each in seen.slots)
    n_all = len(reading.slots)
    found = Observation(scaled, slots, tuple(pairwise(range(len(slots)))), len(slots) / n_all if n_all else 1.0)
    return after, replace(reading, observation=found)


def features(
    reading: Reading, metrics: Sequence[str] = (), *, is_strict: bool = True, emit: Emit = silent
) -> dict[str, Feature]:
    """The losses and these metrics of a reading, and of every slot its stage, one of all, and its numbers.

    Strict, it raises MissingMetric where a loss or a metric was not measured. Otherwise its presence is False, and the
    event ``feature.missing`` says what is missing and how much there is; it is critical where that is hardly anything.
    Raises MissingDependency for a slot with a seed that does not say which, or of which blueprint.
    """
    last = reading.held_out[-1].nats if reading.held_out else None
    values = {"training_loss_nats": reading.training_loss_nats, "held_out_loss_nats": last}
    values |= {name: reading.metrics.get(name) for name in metrics}
    missing = [name for name, value in values.items() if value is None]
    if missing and is_strict:
        raise MissingMetric(
            f"the reading of step {reading.step} lacks {', '.join(missing)}; expected numbers. Measure them, or read "
            f"with is_strict=False.",
            name=missing[0],
        )
    if missing:
        coverage = 1 - len(missing) / len(values)
        payload = {"step": reading.step, "names": missing, "coverage": coverage}
        severity: Severity = "critical" if coverage <= HARDLY_ANY else "warning" if coverage < FEW else "info"
        emit(Event("feature.missing", payload, severity))
    found = {"step": Feature.of(reading.step), "tokens": Feature.of(reading.tokens), "flops": Feature.of(reading.flops)}
    found |= {name: Feature.of(value) for name, value in values.items()}
    for slot in reading.slots:
        _require_named(slot)
        found |= {f"{slot.slot}/stage/{each.name}": Feature(float(slot.stage is each), True) for each in Stage}
        own = ("blend_weight", "age_steps", "score", "gradient_rms")
        found |= {f"{slot.slot}/{name}": Feature.of(getattr(slot, name)) for name in own}
    return found


def _require_named(slot: SlotReading) -> None:
    missing = [name for name in ("seed", "blueprint") if slot.stage in OPEN and not getattr(slot, name)]
    if missing:
        raise MissingDependency(
            f"slot '{slot.slot}' is {slot.stage.name} and its reading names no {' and no '.join(missing)}. Name it.",
            missing=missing,
        )


def symlog(value: float) -> float:
    """``sign(x) ln(1 + |x|)``: large numbers made small, small ones left."""
    return math.copysign(math.log1p(abs(value)), value)


@dataclass(frozen=True)
class Normaliser(Record):
    """Moving means and variances by name, as a value; a number that was not measured moves none of them.

    With d = 0.1 and ``e = x - mean``: ``mean <- mean + d e``, ``variance <- (1 - d) (variance + d e^2)``. The first
    value of a name is its mean.
    """

    moments: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def scale(self, found: Mapping[str, Feature]) -> tuple["Normaliser", dict[str, Feature]]:
        """The normaliser that has seen these, and ``(x - mean) / sqrt(variance + 1e-8)`` of each by it."""
        moments, scaled = dict(self.moments), dict(found)
        for name, (value, is_present) in found.items():
            if not is_present:
                continue
            mean, variance = moments.get(name, (value, 0.0))
            error = value - mean
            mean, variance = mean + KEEP * error, (1 - KEEP) * (variance + KEEP * error**2)
            moments[name] = (mean, variance)
            scaled[name] = Feature((value - mean) / math.sqrt(variance + 1e-8), True)
        return Normaliser(moments), scaled
