"""Settings of the training loop."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from meristem.config import ConfigSection
from meristem.config.kinds import NUMBER
from meristem.errors import DeadKey

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """Seconds from ``180``, ``180s``, ``3m``, ``1.5h`` or ``2d``."""
    if not isinstance(value, str):
        return value
    matched = re.fullmatch(rf"\s*(?![-+])({NUMBER})\s*([smhd]?)\s*", value)
    if matched is None:
        raise ValueError(f"'{value}' is no duration; write 180s, 3m, 1.5h or 2d")
    return float(matched[1]) * _UNITS_S[matched[2]]


Duration = Annotated[float, BeforeValidator(_seconds)]
"""A length of time in seconds; text with a unit is accepted."""


class TrainConfig(ConfigSection):
    """How long to train, and how a step is made. Of several limits the one reached first ends the run.

    A length, in steps, tokens or FLOPs, is the length: it replaces every limit that a lower layer sets, and where one
    is given there is no budget unless that is given beside it.
    """

    replaces: ClassVar = {
        "steps": ("tokens", "flops", "max_time"),
        "tokens": ("steps", "flops", "max_time"),
        "flops": ("steps", "tokens", "max_time"),
    }

    outside_identity: ClassVar = frozenset({"log_every", "measure_updates_every", "max_nonfinite"})
    outside_while_null: ClassVar = frozenset({"flops"})

    steps: int | None = Field(default=None, gt=0, description="optimizer steps; the schedule goes by these when set")
    tokens: int | None = Field(
        default=None, gt=0, description="predicted tokens; the schedule goes by these if steps are not set"
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        description="floating-point operations of all passes, those that growth needs included; the schedule goes by "
        "these if neither steps nor tokens are set",
    )
    max_time: Duration | None = Field(
        default=None, gt=0, description="seconds of training steps, as 180s or 3m; 180s where no length is given"
    )
    grad_accum_steps: int = Field(default=1, ge=1, description="batches per step")
    log_every: int = Field(default=10, ge=1, description="steps between two records")
    measure_updates_every: int = Field(
        default=100, ge=1, description="steps between two measurements of how far weights move"
    )
    max_nonfinite: int = Field(default=10, ge=1, description="steps in a row that may be skipped as non-finite")

    @model_validator(mode="before")
    @classmethod
    def _has_a_budget(cls, given: object) -> object:
        if isinstance(given, dict) and all(given.get(length) is None for length in ("steps", "tokens", "flops")):
            return {"max_time": 180.0} | given
        return given

    @model_validator(mode="after")
    def _ends(self) -> "TrainConfig":
        if self.steps is None and self.tokens is None and self.flops is None and self.max_time is None:
            raise ValueError("a run needs an end: set train.steps, train.tokens, train.flops or train.max_time")
        return self


class RollbackConfig(ConfigSection):
    """How a run rolls back to an earlier state of itself after the guard panics, and what is different afterwards."""

    outside_identity: ClassVar = frozenset({"snapshots", "max_bytes", "snapshot_every"})

    snapshots: int | None = Field(
        default=None,
        ge=0,
        description="states held in memory; 0: only those on disk; null: 3, or fewer where bytes lack",
    )
    max_bytes: int | None = Field(
        default=None, gt=0, description="bytes that they may take; null: a quarter of what is free at the start"
    )
    snapshot_every: int = Field(default=100, ge=1, description="steps between two of them; one more at every save")
    change: Literal["skip", "ease", "both"] = Field(
        default="skip",
        description="what is different afterwards: the text that was read since is skipped, the rate is lower for "
        "snapshot_every steps, or both; a second time in a row it is both",
    )

    @model_validator(mode="after")
    def _can_turn(self) -> "RollbackConfig":
        if self.snapshots == 1:
            raise ValueError("a single snapshot would be lost while the next is taken; give 0, or 2 and more")
        return self


class GuardConfig(ConfigSection):
    """When a step, or what is measured on held-out text, counts as a sign that the run is going wrong.

    The baseline is the median over the last ``span`` sound steps, and the median distance from it. The limits of the
    single detectors are constants beside them (``train/guard.py``).
    """

    outside_identity: ClassVar = frozenset()

    enabled: bool = Field(default=True, description="whether steps are checked")
    span: int = Field(default=50, ge=5, description="sound steps of the baseline")
    nonfinite_steps: int = Field(default=3, ge=1, description="skipped steps in a row, not finite, that are a panic")
    z: float = Field(
        default=6.0, gt=0, description="divergence: robust distances that the loss lies above the baseline"
    )


class SourceWeights(ConfigSection):
    """The weight of each objective of training."""

    outside_identity: ClassVar = frozenset()

    text: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="weight of the loss on the text")
    layers: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="weight of the losses that layers have of their own"
    )


class AggregateConfig(ConfigSection):
    """How the gradients of several objectives become one."""

    outside_identity: ClassVar = frozenset()

    how: Literal["mean", "pcgrad"] = Field(
        default="mean",
        description="mean: of the weighted sum; pcgrad: what points against another objective is left out, at the cost "
        "of a backward pass for each",
    )
    per: Literal["all", "layer"] = Field(
        default="all", description="with pcgrad: look for conflicts over all weights together, or in each tensor"
    )
    weights: SourceWeights = Field(default=SourceWeights(), description="the weight of each objective")

    @model_validator(mode="after")
    def _is_read(self) -> "AggregateConfig":
        if self.how == "mean" and self.per != "all":
            raise DeadKey(
                f"aggregate.per is '{self.per}', but aggregate.how=mean looks for no conflicts. Set "
                "aggregate.how=pcgrad, or remove aggregate.per.",
                path="aggregate.per",
                value=self.per,
            )
        return self


class ProfileConfig(ConfigSection):
    """Which steps are traced, counted from the first that this process makes: wait, warm-up, steps, and again."""

    steps: int = Field(default=0, ge=0, description="steps that are traced in one go; 0 traces none")
    wait: int = Field(default=3, ge=0, description="steps that go by before, as the first are slower than the rest")
    warmup: int = Field(default=1, ge=1, description="steps that are traced and thrown away: tracing has to start too")
    repeat: int = Field(default=1, ge=1, description="how often to wait, warm up and trace")
    directory: Path | None = Field(
        default=None, description="where traces go; by default profile/ in the run directory"
    )

    @model_validator(mode="after")
    def _is_on(self) -> "ProfileConfig":
        given = [name for name, field in ProfileConfig.model_fields.items() if getattr(self, name) != field.default]
        if given and not self.steps:
            raise DeadKey(
                f"profile.{', profile.'.join(given)} given, but profile.steps is 0, so that nothing is traced. Set "
                "profile.steps=3 or so, or remove the key.",
                path=f"profile.{given[0]}",
                value=getattr(self, given[0]),
            )
        return self
