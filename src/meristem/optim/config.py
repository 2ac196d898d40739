"""Settings of the outer optimizer and its schedule."""

import math
from typing import ClassVar, Final, Literal, Self, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator

from meristem.config import ConfigSection
from meristem.config.mistakes import nearest_words
from meristem.errors import ConflictingKeys, WrongValue

EVERY_KIND: Final = frozenset({"name", "lr", "weight_decay", "grad_clip", "level_rates"})
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

Shape: TypeAlias = Literal["constant", "cosine", "linear", "step"]
"""How a learning rate falls after the warm-up."""

LONG: Final = 64
"""From this period on moments look back over few updates: a run makes few of them."""


class OptimConfig(ConfigSection):
    """Which optimizer, and how fast. A key that the chosen kind does not read may stand at its default only.

    The defaults suit matrices of width 128 to 512.
    """

    outside_identity: ClassVar = frozenset()

    name: Literal["adamw", "sgd", "muon", "adamuon", "adamuon_raw", "m3"] = Field(
        default="adamw",
        description="what makes steps of gradients; muon, adamuon and m3 take the matrices of hidden layers and leave "
        "the rest to AdamW",
    )
    lr: float = Field(default=1e-3, gt=0, description="highest learning rate; the schedule scales it")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradients")
    beta2: float = Field(
        default=0.95, ge=0, lt=1, description="AdamW, adamuon: decay of the mean of their, or its steps', squares"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of that mean")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="sgd, muon, adamuon: the share of earlier steps")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decay of plain matrices, decoupled; with sgd it is added to the gradient"
    )
    grad_clip: float | None = Field(
        default=1.0, gt=0, description="largest gradient norm, for each period apart; null for none"
    )
    level_rates: dict[int, float] = Field(
        default={},
        description="period to the factor on the learning rate of its levels; unless given, its root or 8",
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
        keys = READS[self.name]
        return frozenset(key for key in keys if not self.m3_ema or key == "m3_ema" or not key.startswith("m3_"))

    def level_rate(self, period: int) -> float:
        """The factor on the learning rate of levels that step every ``period`` steps: one step stands for so many."""
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
        also = " with m3_ema" if self.m3_ema and self.name == "m3" else ""
        self.refuse_dead("optim", self.reads, f"optim.name '{self.name}'{also} does not read it", "optim.name")
        return self


class ScheduleConfig(ConfigSection):
    """How the learning rate moves. A key that nothing reads with the chosen unit and shape may stand at its default
    only."""

    outside_identity: ClassVar = frozenset()

    shape: Shape = Field(
        default="cosine", description="what follows the warm-up: how the learning rate falls to the floor"
    )
    unit: Literal["share", "steps", "tokens"] = Field(
        default="share", description="what the schedule goes by: the share of the whole run that is done, or a count"
    )
    period: int | None = Field(
        default=None, gt=0, description="steps or tokens, as the unit says, in which the shape runs its course"
    )
    after: Literal["hold", "restart", "error"] = Field(
        default="hold",
        description="steps, tokens: what follows a period: its last learning rate, the next period without "
        "warm-up, or an end of the run",
    )
    warmup: float = Field(
        default=0.02, ge=0, lt=1, description="share of the run, or period, in which the learning rate rises"
    )
    warmup_start: float = Field(default=0.01, ge=0, le=1, description="share of the learning rate that it rises from")
    floor: float = Field(default=0.1, ge=0, le=1, description="share of the learning rate that is left at the end")
    stairs: int = Field(default=3, ge=2, description="step: levels of the learning rate, each as long as the others")

    @property
    def reads(self) -> frozenset[str]:
        """The keys that mean something to this schedule."""
        keys = {"shape", "unit", "warmup"}
        keys |= {"warmup_start"} if self.warmup else set()
        keys |= {"floor"} if self.shape != "constant" else set()
        keys |= {"stairs"} if self.shape == "step" else set()
        keys |= {"period", "after"} if self.unit != "share" else set()
        return frozenset(keys)

    @field_validator("shape", mode="before")
    @classmethod
    def _is_known(cls, shape: object) -> object:
        known = get_args(Shape)
        if shape not in known:
            nearest = f"; nearest is {nearest_words(shape, known)[0]}" if isinstance(shape, str) else ""
            raise ValueError(f"one of {', '.join(known)}{nearest}")
        return shape

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        why = f"a schedule of shape '{self.shape}' with unit '{self.unit}' and warmup {self.warmup} does not read it"
        self.refuse_dead("schedule", self.reads, why, "schedule.shape or schedule.unit")
        return self

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.unit != "share" and self.period is None:
            raise ConflictingKeys(
                f"schedule.unit is '{self.unit}', but schedule.period is not set. Set schedule.period to the number "
                f"of {self.unit} in which the learning rate shall fall, or schedule.unit to share.",
                path="schedule.period",
                value=None,
            )
        if self.shape == "step" and self.floor == 0:
            raise ConflictingKeys(
                "schedule.floor is 0, and every stair of schedule.shape 'step' has the same ratio to the one before: "
                "no ratio above 0 leads there. Set schedule.floor above 0, or schedule.shape to linear or cosine.",
                path="schedule.floor",
                value=self.floor,
            )
        return self
