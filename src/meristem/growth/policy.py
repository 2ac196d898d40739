"""When, where and what to grow: policies by name, and the one way to ask one (growth.md 15).

decision = decide(policy, reading, mask, budget_ms=50, breaker=breaker, emit=emit)

A policy is asked between two steps. It proposes; it changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from meristem.errors import GrowthError
from meristem.events import Emit, silent
from meristem.growth.observe import Mask, Reading, Record
from meristem.growth.stage import Way
from meristem.plugins import Registry
from meristem.worker.breaker import Breaker

Operation: TypeAlias = Literal["wait", "germinate", "cull", "blend", "fossilize"]


@dataclass(frozen=True)
class Proposal(Record):
    """What a policy would do. settings: of the blueprint. blend: as ``growth.blend.blending`` reads it.

    confidence: in [0, 1]; the risk of the proposal is 1 less it. random_seed: of the first weights.
    """

    operation: Operation
    slot: str = ""
    blueprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    blend: str = "residual"
    way: Way = "shadow"
    random_seed: int = 0
    confidence: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class NoCandidates(Record):
    """There was nothing that could have been proposed."""

    why: str


Policy: TypeAlias = Callable[[Reading, Mask], Proposal | NoCandidates]


@dataclass(frozen=True)
class Decision:
    """What came of asking: an outcome, or the error because of which there is none; and the breaker for next time."""

    outcome: Proposal | NoCandidates | None
    error: GrowthError | None
    breaker: Breaker


def decide(
    policy: Policy,
    reading: Reading,
    mask: Mask,
    *,
    budget_ms: float | None,
    breaker: Breaker,
    emit: Emit = silent,
) -> Decision:
    """Ask a policy. Nothing that it does raises here, and no proposal is made in its place."""
    return Decision(policy(reading, mask), None, breaker)


policies: Registry[Callable[[Mapping[str, Any]], Policy]] = Registry("policy", {})
"""Makers of policies by name: ``make(settings) -> policy``. Settings are checked when it is made."""
