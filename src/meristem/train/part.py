"""Settings of the training loop."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from meristem.config import Part

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """Seconds from ``180``, ``180s``, ``3m``, ``1.5h`` or ``2d``."""
    if not isinstance(value, str):
        return value
    matched = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smhd]?)\s*", value)
    if matched is None:
        raise ValueError(f"'{value}' is no duration; write 180s, 3m, 1.5h or 2d")
    return float(matched[1]) * _UNITS_S[matched[2]]


Duration = Annotated[float, BeforeValidator(_seconds)]
"""A length of time in seconds; text with a unit is accepted."""


class TrainPart(Part):
    """How long to train, and how a step is made. Of several limits the one reached first ends the run."""

    steps: int | None = Field(default=None, gt=0, description="optimizer steps; the schedule goes by these when set")
    tokens: int | None = Field(
        default=None, gt=0, description="predicted tokens; the schedule goes by these if steps are not set"
    )
    budget: Duration | None = Field(default=180.0, gt=0, description="seconds of training steps, as 180s or 3m")
    accumulate: int = Field(default=1, ge=1, description="batches per step")
    log_every: int = Field(default=10, ge=1, description="steps between two records")
    max_nonfinite: int = Field(default=10, ge=1, description="steps in a row that may be skipped as non-finite")

    @model_validator(mode="after")
    def _ends(self) -> "TrainPart":
        if self.steps is None and self.tokens is None and self.budget is None:
            raise ValueError("a run needs an end: set train.steps, train.tokens or train.budget")
        return self
