"""Whose a parameter is, the host's or that of a seed, and how what came later is moved (growth.md 10.1, 10.2)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final, Self

import torch
from torch import Tensor

from meristem.errors import WrongValue

HOST: Final = "host"
SEED: Final = ".slot.seed."
"""What stands between the name of a slot and that of a parameter of its seed."""


def origin_of(name: str) -> str:
    """``seed:<slot>`` of a parameter of a seed, by its name; of every other, ``host``."""
    slot, found, _ = name.partition(SEED)
    return f"seed:{slot}" if found else HOST


def origins(names: Iterable[str]) -> list[str]:
    """Every origin among these names, the host first."""
    found = dict.fromkeys(map(origin_of, names))
    return [HOST] * (HOST in found) + [each for each in found if each != HOST]


@dataclass(frozen=True)
class SeedSettings:
    """How the parameters of one seed, or of blocks that came later, are moved, beside what their host is set to.

    At the t-th step of the optimizer the learning rate is ``rate_scale * warm((t - since) / warmup_steps)`` times what
    it would be in the host, with ``warm(u) = f0 + (1 - f0) min(1, u)`` and f0 = ``warmup_start``.

    since: the step at which the seed joined. grad_clip: the largest norm of its gradient, None for any.
    """

    rate_scale: float = 1.0
    warmup_steps: int = 100
    warmup_start: float = 0.0
    grad_clip: float | None = 1.0
    since: int = 0

    def __post_init__(self) -> None:
        wrong = [
            *([] if 0 < self.rate_scale < math.inf else [f"rate_scale is {self.rate_scale}; expected more than 0"]),
            *([] if self.warmup_steps >= 0 else [f"warmup_steps is {self.warmup_steps}; expected 0 or more"]),
            *([] if 0 <= self.warmup_start <= 1 else [f"warmup_start is {self.warmup_start}; expected 0 to 1"]),
            *([] if self.grad_clip is None or self.grad_clip > 0 else [f"grad_clip is {self.grad_clip}; expected > 0"]),
        ]
        if wrong:
            raise WrongValue(f"a seed cannot be moved like this: {'; '.join(wrong)}.", value=wrong)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at that step of the optimizer."""
        share = min(1.0, (step - self.since) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.rate_scale * (self.warmup_start + (1 - self.warmup_start) * share)

    def to_tensor(self) -> Tensor:
        """Five numbers, as a checkpoint holds them."""
        fields = asdict(self) | {"grad_clip": math.inf if self.grad_clip is None else self.grad_clip}
        return torch.tensor(list(fields.values()), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, saved: Tensor) -> Self:
        """What ``to_tensor`` gave."""
        scale, steps, start, clip, since = saved.tolist()
        return cls(scale, int(steps), start, None if clip == math.inf else clip, int(since))


FROM_THE_START: Final = SeedSettings(warmup_steps=0)
"""Of a seed that an optimizer is made with: the warm-up of the run is its own."""
