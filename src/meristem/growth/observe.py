"""What is known of a run at a boundary, as frozen records (growth.md 14).

What was not measured is None, and never 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json as encoded

from meristem.errors import WrongValue
from meristem.growth.stage import Stage

VERSION: Final = 1
"""Of what ``to_json`` gives."""

STRICT: Final = ConfigDict(extra="forbid", allow_inf_nan=False)


class Record:
    """A frozen dataclass that becomes JSON values and comes back from them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        found: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return {"version": VERSION} | found

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave. Raises WrongValue for another version, and fields that are unknown, missing or of
        another type."""
        body = dict(saved)
        if (version := body.pop("version", None)) != VERSION:
            raise WrongValue(
                f"a {cls.__name__} of version {version} was found; this meristem reads version {VERSION}. Use the "
                f"version that wrote it.",
                value=version,
            )
        try:
            made: Self = _adapter(cls).validate_json(encoded(body, inf_nan_mode="constants"), strict=True)
        except ValidationError as cause:
            first = cause.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise WrongValue(
                f"'{place}' of a {cls.__name__}: {first['msg']}. Give every field, of its own type, and no other.",
                value=first["input"],
                path=place,
            ) from cause
        except (ValueError, TypeError) as cause:
            raise WrongValue(f"a {cls.__name__} that is no JSON was found: {cause}. Use plain values.") from cause
        return made

    def checked(self) -> Self:
        """The same, of plain values. Raises WrongValue where a field is of another type than it should be."""
        return self.from_json({"version": VERSION, **vars(self)})


def _adapter(cls: type) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


_ADAPTERS: Final[dict[type, TypeAdapter[Any]]] = {}
"""One for each class of records, made when it is first needed."""


class HeldOut(NamedTuple):
    """One evaluation on held-out text: where the run stood, and the loss in nats per token."""

    step: int
    tokens: int
    flops: float
    nats: float


@dataclass(frozen=True)
class SlotReading(Record):
    """One slot, and the seed in it if there is one.

    age_steps: since the graft. score: of ``slot_scores``. gradient_rms: size of one number of the seed's gradient, in
    the square mean. embargo_until: the first step at which the slot is free again.
    """

    slot: str
    stage: Stage = Stage.DORMANT
    seed: str | None = None
    blueprint: str | None = None
    blend_weight: float | None = None
    age_steps: int | None = None
    score: float | None = None
    gradient_rms: float | None = None
    embargo_until: int | None = None


@dataclass(frozen=True)
class Trial(Record):
    """What became of one seed. ended: the step of its removal or fuse, None while it is there.

    gain_nats: loss without it less loss with it on held-out text, when that was last measured. flops_ratio: FLOPs per
    token that it adds, by those of its host.
    """

    slot: str
    blueprint: str
    born: int
    ended: int | None = None
    is_kept: bool = False
    gain_nats: float | None = None
    flops_ratio: float | None = None


class Feature(NamedTuple):
    """A number, and whether it was measured: where it was not, the number is 0 and says nothing."""

    value: float
    is_present: bool

    @classmethod
    def of(cls, value: float | None) -> Self:
        return cls(0.0, False) if value is None else cls(float(value), True)


@dataclass(frozen=True)
class Observation(Record):
    """A reading as numbers, for policies that ask for it (``growth.features``).

    features: by name, those of a slot as ``blocks.1/age_steps``. slots: those that are in it, in the order of the host.
    edges: pairs of places in ``slots``, each slot and the next. coverage: the share of all slots that is in it.
    """

    features: Mapping[str, Feature]
    slots: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    coverage: float


@dataclass(frozen=True)
class Reading(Record):
    """What was measured of a run up to one boundary. A number that is not finite was not measured: it is None here,
    and an evaluation that gave one is left out.

    flops: spent so far, probes included. held_out: all evaluations, oldest first. trials: all seeds that the run has
    had, oldest first. metrics: whatever else was measured, by name. observation: all of it as numbers, for a policy
    that observes.
    """

    run_id: str
    step: int
    tokens: int
    flops: float
    training_loss_nats: float | None
    held_out: tuple[HeldOut, ...] = ()
    slots: tuple[SlotReading, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    observation: Observation | None = None

    def __post_init__(self) -> None:
        own = object.__setattr__
        own(self, "training_loss_nats", _measured(self.training_loss_nats))
        own(self, "held_out", tuple(HeldOut(*each) for each in self.held_out if math.isfinite(each[3])))
        own(self, "metrics", {name: _measured(value) for name, value in self.metrics.items()})


def _measured(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Mask(Record):
    """What may be proposed at this boundary. slots: those that may get a seed; may_cull: those whose seed may go.

    free_parameters: how many a new seed may have at most. why: what stands against germination, if anything.
    can_deepen: whether the whole stack may be made deeper.
    """

    slots: frozenset[str] = frozenset()
    can_germinate: bool = False
    may_cull: frozenset[str] = frozenset()
    blocked_blueprints: frozenset[str] = frozenset()
    free_parameters: int = 0
    why: str = ""
    can_deepen: bool = False
