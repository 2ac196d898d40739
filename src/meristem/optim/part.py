"""Settings of the outer optimizer and its schedule."""

from typing import Literal

from pydantic import Field

from meristem.config import Part


class OptimPart(Part):
    """AdamW. The defaults suit matrices of width 128 to 512."""

    rate: float = Field(default=1e-3, gt=0, description="highest learning rate; the schedule scales it")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of the gradients")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of that mean")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled decay of plain matrices")
    clip: float | None = Field(default=1.0, gt=0, description="largest global gradient norm; null for none")


class SchedulePart(Part):
    """How the rate moves over the run."""

    shape: Literal["cosine", "constant"] = Field(default="cosine", description="what follows the warm-up")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the run in which the rate rises")
    floor: float = Field(default=0.1, ge=0, le=1, description="share of the rate that is left at the end")
