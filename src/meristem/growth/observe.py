"""What is known of a run at a boundary."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meristem.growth.stage import Stage


@dataclass(frozen=True)
class SlotReading:
    slot: str
    stage: Stage
    seed: str | None
    blueprint: str | None
    blend_weight: float
    age_steps: int
    score: float | None = None
    gradient_rms: float | None = None
    embargo_until: int | None = None


@dataclass(frozen=True)
class Reading:
    run_id: str
    step: int
    tokens: int
    flops: float
    training_loss_nats: float | None
    held_out: tuple[tuple[int, int, float, float], ...]
    slots: tuple[SlotReading, ...]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
