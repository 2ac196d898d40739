"""When, where and what to grow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meristem.growth.observe import Reading
from meristem.plugins import Registry


@dataclass(frozen=True)
class Mask:
    slots: frozenset[str]
    can_germinate: bool
    may_cull: frozenset[str]
    blocked_blueprints: frozenset[str]
    free_parameters: int
    why: str = ""


@dataclass(frozen=True)
class Proposal:
    operation: str
    slot: str = ""
    blueprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    blend: str = "residual"
    way: str = "shadow"
    random_seed: int = 0
    confidence: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class NoCandidates:
    why: str


def schedule(settings: Mapping[str, Any]) -> Callable[[Reading, Mask], Proposal | NoCandidates]:
    steps = settings.get("at_steps", ())

    def propose(reading: Reading, mask: Mask) -> Proposal | NoCandidates:
        if reading.step not in steps or not mask.can_germinate:
            return Proposal("wait")
        return Proposal(
            "germinate",
            min(mask.slots),
            settings["blueprint"],
            settings.get("settings", {}),
            way=settings.get("way", "joint"),
            why="scheduled",
        )

    return propose


policies: Registry[Any] = Registry("policy", {"schedule": schedule, "heuristic": schedule})


def decide(policy: Any, reading: Reading, mask: Mask, *, budget_ms: float | None, emit: Any) -> Any:
    return policy(reading, mask)
