"""How far a seed is blended in, step by step (growth.md 7.2)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from torch import Tensor

from meristem.errors import WrongValue


def _sigmoid(sharpness: float) -> Callable[[float], float]:
    """``(s(k (u - 1/2)) - s(-k/2)) / (s(k/2) - s(-k/2))``: a logistic curve that does reach 0 and 1."""

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = logistic(-sharpness / 2), logistic(sharpness / 2)
    return lambda share: (logistic(sharpness * (share - 0.5)) - low) / (high - low)


CURVES: Final[dict[str, Callable[[float], float]]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "sigmoid-6": _sigmoid(6),
    "sigmoid-12": _sigmoid(12),
    "sigmoid-24": _sigmoid(24),
}
"""Ways from 0 to 1, all monotone. Their order is saved with the weights: new ones go to the end."""


@dataclass(frozen=True)
class Course:
    """``start + (target - start) * curve(step / steps)``, exactly ``start`` at step 0 and ``target`` from ``steps`` on.

    steps: 0 holds the target.
    """

    start: float
    target: float
    steps: int = 0
    step: int = 0
    curve: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("start", "target"):
            if not 0 <= getattr(self, name) <= 1:
                raise WrongValue(
                    f"a blend weight of {getattr(self, name)} was found; expected a number from 0 (the host alone) to "
                    f"1 (all that the seed adds).",
                    value=getattr(self, name),
                )
        if self.curve not in CURVES or not 0 <= self.step <= self.steps:
            raise WrongValue(
                f"a course along '{self.curve}', at step {self.step} of {self.steps}, was found; expected a curve out "
                f"of {', '.join(CURVES)}, and 0 steps or more.",
                value=self.curve,
            )

    @property
    def is_done(self) -> bool:
        """Whether the weight is held from here on."""
        return self.step == self.steps

    @property
    def weight(self) -> float:
        """The blend weight at this step."""
        if self.is_done or self.step == 0:
            return self.target if self.is_done else self.start
        return self.start + (self.target - self.start) * CURVES[self.curve](self.step / self.steps)

    def advanced(self) -> Self:
        """The course one step later; once it is done it stays so."""
        return self if self.is_done else replace(self, step=self.step + 1)

    def to_tensor(self) -> Tensor:
        """Five numbers in float32, as a buffer holds them."""
        return torch.tensor([self.start, self.target, self.steps, self.step, list(CURVES).index(self.curve)])

    @classmethod
    def from_tensor(cls, saved: Tensor) -> Self:
        """What ``to_tensor`` gave; weights are those of float32, so that a resumed ramp is the same ramp."""
        start, target, steps, step, curve = saved.tolist()
        return cls(start, target, int(steps), int(step), list(CURVES)[int(curve)])
