"""What a policy answers with (growth.md 15)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from meristem.growth.observe import Mask, Reading, Record
from meristem.growth.stage import Way

Deepening: TypeAlias = Literal["insert", "stack"]
"""A change that makes the whole stack of blocks twice as deep: with blocks that add nothing yet, or with copies."""

Operation: TypeAlias = Literal["wait", "germinate", "cull", "blend", "fossilize"] | Deepening

DEEPENINGS: Final = frozenset(get_args(Deepening))


@dataclass(frozen=True)
class Proposal(Record):
    """What a policy would do. settings: of the blueprint. blend: as ``growth.blend.blending`` reads it. needs: modules
    of the host without which the seed has no use, by name.

    confidence: in [0, 1]; the risk that the policy sees is 1 less it. random_seed: of the first weights.
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
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoCandidates(Record):
    """It was time for a change, and nothing was there to be proposed."""

    why: str


Policy: TypeAlias = Callable[[Reading, Mask], Proposal | NoCandidates]
"""Proposes and changes nothing. Raises MissingMetric for a number that it needs and the reading lacks."""
