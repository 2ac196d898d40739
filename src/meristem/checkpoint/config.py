"""When a run is saved, and which of its checkpoints stay."""

from typing import Literal

from pydantic import Field

from meristem.config import ConfigSection


class CheckpointConfig(ConfigSection):
    """Save by steps and by the clock; keep the last, the best, the pinned, and one in so many steps for ever."""

    every: int = Field(500, ge=1, description="steps between two checkpoints")
    every_s: float | None = Field(60.0, gt=0, description="seconds between two saves whatever the step; null: off")
    last: int = Field(3, ge=1, description="how many of the newest stay")
    best: int = Field(2, ge=0, description="how many of the best by the metric stay")
    metric: str = Field("val/bits_per_byte", description="name of the metric that ranks them")
    direction: Literal["min", "max"] = Field("min", description="whether small or large is good")
    keep_every: int = Field(0, ge=0, description="steps at whose multiples one stays for ever; 0: none")
