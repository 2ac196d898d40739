"""Settings of the outer optimizer and its schedule."""

import math
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import Part
from meristem.errors import DeadKey, WrongValue

EVERY_KIND: Final = frozenset({"kind", "rate", "weight_decay", "clip", "level_rates"})
ADAMW: Final = frozenset({"beta1", "beta2", "eps", "level_betas"})
READS: Final = {
    "adamw": EVERY_KIND | ADAMW,
    "sgd": EVERY_KIND | {"momentum"},
    "muon": EVERY_KIND | ADAMW | {"momentum"},
    "adamuon": EVERY_KIND | ADAMW | {"momentum"},
    "adamuon_raw": EVERY_KIND | ADAMW | {"momentum"},
    "m3": EVERY_KIND | ADAMW | {"m3_beta1", "m3_beta2", "m3_beta3", "m3_alpha", "m3_every", "m3_ema"},
}
"""The keys that each kind reads. Those for matrices read AdamW's too: embeddings, gates and norms are left to it."""

LONG: Final = 64
"""From this period on moments look back over few updates: a run makes few of them."""


class OptimPart(Part):
    """Which optimizer, and how fast. A key that the chosen kind does not read may stand at its default only.

    The defaults suit matrices of width 128 to 512.
    """

    kind: Literal["adamw", "sgd", "muon", "adamuon", "adamuon_raw", "m3"] = Field(
        default="adamw",
        description="what makes steps of gradients; muon, adamuon and m3 take the matrices of hidden layers and leave "
        "the rest to AdamW",
    )
    rate: float = Field(default=1e-3, gt=0, description="highest learning rate; the schedule scales it")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradients")
    beta2: float = Field(
        default=0.95, ge=0, lt=1, description="AdamW, adamuon: decay of the mean of their, or its steps', squares"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of that mean")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="sgd, muon, adamuon: what is kept of earlier steps")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decay of plain matrices, decoupled; with sgd it is added to the gradient"
    )
    clip: float | None = Field(
        default=1.0, gt=0, description="largest gradient norm, for each period apart; null for none"
    )
    level_rates: dict[int, float] = Field(
        default={},
        description="period to the factor on the rate of its levels; unless given, its root or 8",
    )
    level_betas: dict[int, tuple[float, float]] = Field(
        default={}, description="period to AdamW's two betas there; unless given, 0.8 and 0.95 from period 64 on"
    )
    m3_beta1: float = Field(default=0.9, gt=0, description="m3: weight of a gradient in the fast momentum")
    m3_beta2: float = Field(default=0.999, gt=0, description="m3: weight of its square in the second moment")
    m3_beta3: float = Field(default=0.99, gt=0, description="m3: weight of gathered gradients in the slow momentum")
    m3_alpha: float = Field(default=0.5, ge=0, description="m3: share of the slow momentum in a step")
    m3_every: int = Field(default=8, ge=1, description="m3: steps that the slow momentum gathers")
    m3_ema: bool = Field(default=False, description="m3: the sum of four decaying momenta as the step")

    @property
    def reads(self) -> frozenset[str]:
        """The keys that mean something to this kind."""
        keys = READS[self.kind]
        return frozenset(key for key in keys if not self.m3_ema or key == "m3_ema" or not key.startswith("m3_"))

    def level_rate(self, period: int) -> float:
        """The factor on the rate of levels that step every ``period`` steps: one step stands for so many."""
        return self.level_rates.get(period, min(math.sqrt(period), 8.0))

    def betas(self, period: int) -> tuple[float, float]:
        """AdamW's betas of such levels."""
        return self.level_betas.get(period, (0.8, 0.95) if period >= LONG else (self.beta1, self.beta2))

    @model_validator(mode="after")
    def _levels_are_in_range(self) -> Self:
        wrong = [f"optim.level_rates.{period} is {rate}" for period, rate in self.level_rates.items() if not rate > 0]
        for period, betas in self.level_betas.items():
            if not all(0 <= beta < 1 for beta in betas):
                wrong.append(f"optim.level_betas.{period} is {list(betas)}")
        if wrong:
            raise WrongValue(
                f"{'; '.join(wrong)}. A rate is multiplied by a factor above 0; betas lie in [0, 1).",
                path=wrong[0].split(" is ")[0],
            )
        return self

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        fields = type(self).model_fields
        dead = [key for key in fields if key not in self.reads and getattr(self, key) != fields[key].default]
        if dead:
            found = ", ".join(f"optim.{key} is {getattr(self, key)!r}" for key in dead)
            also = " with m3_ema" if self.m3_ema and self.kind == "m3" else ""
            raise DeadKey(
                f"{found}, but optim.kind '{self.kind}'{also} does not read it; it reads "
                f"{', '.join(sorted(self.reads - {'kind'}))}. Remove the key, or choose another optim.kind.",
                path=f"optim.{dead[0]}",
                value=getattr(self, dead[0]),
            )
        return self


class SchedulePart(Part):
    """How the rate moves over the run."""

    shape: Literal["cosine", "constant"] = Field(default="cosine", description="what follows the warm-up")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the run in which the rate rises")
    floor: float = Field(default=0.1, ge=0, le=1, description="share of the rate that is left at the end")
