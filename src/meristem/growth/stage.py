"""Where a seed stands between being put in and being kept or removed, and how it came there (growth.md 6).

life = move(life, Stage.BLENDING, step=1200, reason="it helps", gate="G2")

A life is a value: nothing is changed in place, and what the table does not name raises.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final, Literal, Self, TypeAlias

from meristem.errors import IllegalTransition
from meristem.events import Emit, Event, silent
from meristem.growth.seed import Origin

Way: TypeAlias = Literal["joint", "shadow", "frozen_host", "capped"]
"""How a seed gets its gradients while it is TRAINING (growth.md 9).

joint: it is live, and host and seed learn together. shadow: the host is trained without it, and it learns from a second
pass whose gradients are the seed's alone. frozen_host: it is live, and nothing else learns. capped: the model computes
what its host does, and the seed learns from the gradient at its slot, as if it added a little.
"""

RECENT: Final = 256
"""How many of the last paired differences are kept one by one."""


class Stage(IntEnum):
    """A stage of a life. Numbers are saved: new stages get new ones.

    DORMANT: the slot is empty. GERMINATED: a seed is in it and does not learn yet. TRAINING: it learns, and the model
    computes what its host does. BLENDING: its blend weight is on its way to the target, and host and seed learn.
    SHADOWING: the weight is held and the effect measured; no structure changes. PROBATIONARY: fully live, watched and
    ablated. FOSSILIZED: it is part of the model for good, and the slot is free. CULLED: it is removed. EMBARGOED: the
    slot is locked for a while. RESETTING: what was left of it is cleared. TERMINATED: the end.
    """

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10
    TERMINATED = 11


TRANSITIONS: Final[Mapping[Stage, frozenset[Stage]]] = {
    Stage.UNKNOWN: frozenset({Stage.DORMANT}),
    Stage.DORMANT: frozenset({Stage.GERMINATED, Stage.TERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CULLED}),
    Stage.TRAINING: frozenset({Stage.BLENDING, Stage.CULLED}),
    Stage.BLENDING: frozenset({Stage.SHADOWING, Stage.CULLED}),
    Stage.SHADOWING: frozenset({Stage.BLENDING, Stage.PROBATIONARY, Stage.CULLED}),
    Stage.PROBATIONARY: frozenset({Stage.FOSSILIZED, Stage.CULLED}),
    Stage.FOSSILIZED: frozenset({Stage.TERMINATED}),
    Stage.CULLED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.RESETTING}),
    Stage.RESETTING: frozenset({Stage.DORMANT}),
    Stage.TERMINATED: frozenset(),
}
"""Where each stage may go. From SHADOWING back to BLENDING it has a new target; FOSSILIZED ends by compaction alone."""


def require_whole(stages: type[IntEnum], table: Mapping[Any, frozenset[Any]]) -> None:
    """Raise IllegalTransition unless every stage is a key of the table, and every target a stage."""
    missing = [stage.name for stage in stages if stage not in table]
    strange = [str(to) for targets in table.values() for to in targets if to not in list(stages)]
    if missing or strange:
        raise IllegalTransition(
            f"the table of transitions has no row for {', '.join(missing) or 'none'} and names "
            f"{', '.join(strange) or 'nothing'} that is no stage. Give every stage a row.",
            missing=missing,
            strange=strange,
        )


require_whole(Stage, TRANSITIONS)

LIVE: Final = frozenset({Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY})
"""Stages in which the model computes something other than its host."""

OPEN: Final = LIVE | {Stage.GERMINATED, Stage.TRAINING}
"""Stages in which a slot holds a seed."""


@dataclass(frozen=True)
class Transition:
    """One step of a life. gate: the number of the gate result that let it through, or None where no gate guards it."""

    step: int
    before: Stage
    after: Stage
    reason: str
    gate: str | None = None


@dataclass(frozen=True)
class Paired:
    """Differences of two losses on the same targets, in nats per target: how many, their mean and their spread.

    squares: the sum of squared distances from the mean, kept as they come (Welford 1962). recent: the last of them.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0
    recent: tuple[float, ...] = ()

    def add(self, difference: float) -> Self:
        """One more. Raises IllegalTransition for a number that is not finite: it was not measured."""
        if not math.isfinite(difference):
            raise IllegalTransition(
                f"a difference of losses of {difference} was found; expected a finite one. Leave out what could not be "
                f"measured."
            )
        n, away = self.n + 1, difference - self.mean
        mean = self.mean + away / n
        squares = self.squares + away * (difference - mean)
        return replace(self, n=n, mean=mean, squares=squares, recent=(*self.recent, difference)[-RECENT:])

    def upper(self, z: float = 1.65) -> float | None:
        """``mean + z s / sqrt(n)``, the upper bound of the mean; None of fewer than two."""
        return None if self.n < 2 else self.mean + z * math.sqrt(self.squares / (self.n - 1) / self.n)

    def lower(self, z: float = 1.65) -> float | None:
        """``mean - z s / sqrt(n)``; None of fewer than two."""
        upper = self.upper(z)
        return None if upper is None else 2 * self.mean - upper


@dataclass(frozen=True)
class Life:
    """All that is known of one seed in one slot; plain values, saved with the run.

    seed: the number of the seed in this run, as ``blocks.1#3``. origin: what it is built from. born: the step of its
    graft. paired: loss with the seed less loss without it. n_violations: how often the host was found not to be
    isolated from it. since: the step at which it came to its stage.
    """

    seed: str
    slot: str
    origin: Origin
    born: int
    way: Way = "shadow"
    stage: Stage = Stage.DORMANT
    since: int = 0
    history: tuple[Transition, ...] = ()
    paired: Paired = field(default_factory=Paired)
    n_violations: int = 0

    @property
    def is_open(self) -> bool:
        """Whether its slot holds it."""
        return self.stage in OPEN

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` makes the same of them."""
        own = {name: getattr(self, name) for name in ("seed", "slot", "born", "way", "since", "n_violations")}
        history = [{**vars(each), "before": int(each.before), "after": int(each.after)} for each in self.history]
        return own | {
            "stage": int(self.stage),
            "origin": {**vars(self.origin), "settings": dict(self.origin.settings)},
            "history": history,
            "paired": {**vars(self.paired), "recent": list(self.paired.recent)},
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave."""
        history = tuple(
            Transition(**{**each, "before": Stage(each["before"]), "after": Stage(each["after"])})
            for each in saved["history"]
        )
        paired = Paired(**{**saved["paired"], "recent": tuple(saved["paired"]["recent"])})
        changed = {"stage": Stage(saved["stage"]), "origin": Origin(**saved["origin"]), "history": history}
        return cls(**{**saved, **changed, "paired": paired})


def move(life: Life, to: Stage, *, step: int, reason: str, gate: str | None = None, emit: Emit = silent) -> Life:
    """The life one stage further; the event is ``slot.stage_changed``.

    Raises IllegalTransition for a stage that the table does not allow, and a second transition at one step, after the
    event ``slot.stage_refused``: between two stages the model is trained.
    """
    allowed = TRANSITIONS.get(life.stage, frozenset())
    payload = {"slot": life.slot, "seed": life.seed, "step": step, "from": life.stage.name, "reason": reason}
    is_second = bool(life.history) and life.history[-1].step >= step and to in OPEN
    if to not in allowed or is_second:
        emit(Event("slot.stage_refused", payload | {"to": str(getattr(to, "name", to))}, "error"))
        why = f"it came there at step {life.history[-1].step}" if to in allowed else "the table does not allow it"
        raise IllegalTransition(
            f"seed '{life.seed}' is {life.stage.name}, and {getattr(to, 'name', to)} was requested at step {step}: "
            f"{why}. From {life.stage.name} it may go to "
            f"{', '.join(sorted(each.name for each in allowed)) or 'nowhere'}, one stage at a step.",
            found=life.stage.name,
            expected=sorted(each.name for each in allowed),
        )
    emit(Event("slot.stage_changed", payload | {"to": to.name}))
    moved = Transition(step, life.stage, to, reason, gate)
    return replace(life, stage=to, since=step, history=(*life.history, moved))
