"""Settings of growth: where, what, when, and how much a seed has to bring (growth.md 4.3, 13, 16).

They stand below the room that reads them: that needs torch, and settings are checked before it is loaded.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys


class Blending(ConfigSection):
    """How a seed enters its host, and the way of its blend weight from 0 to the target."""

    name: Annotated[str, Field(description="What is added of what a seed gives: residual, channel, ...")] = "residual"
    target: Annotated[float, Field(gt=0, le=1, description="The blend weight at the end.")] = 1.0
    steps: Annotated[int, Field(ge=0, le=10_000_000, description="Steps until it is reached; 0: at once.")] = 100
    curve: Annotated[str, Field(description="The way: linear, cosine, sigmoid-6, -12 or -24.")] = "cosine"

    def __str__(self) -> str:
        """As ``blending`` reads it."""
        return f"{self.name}(target={self.target!r}, steps={self.steps}, curve={self.curve!r})"


class Limit(ConfigSection):
    """Two marks of one number, reached from below; null: no mark."""

    outside_identity: ClassVar = frozenset()

    downgrade: float | None = Field(default=None, description="From here on only what changes no structure.")
    pause: float | None = Field(default=None, description="From here on nothing.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.downgrade is not None and self.pause is not None and self.downgrade > self.pause:
            raise ConflictingKeys(
                f"downgrade is {self.downgrade} and pause is {self.pause}; expected the first not above the second. "
                f"Swap them."
            )
        return self


class RiskConfig(ConfigSection):
    """What holds a proposal up. Each limit is of the metric of its name in the reading."""

    outside_identity: ClassVar = frozenset()

    policy_risk: Limit = Field(Limit(downgrade=0.85, pause=0.98), description="1 less the confidence of the policy.")
    held_out_jump: Limit = Field(
        Limit(downgrade=0.075, pause=0.15), description="Nats by which held-out loss rose at the last evaluation."
    )
    isolation_violations: Limit = Field(Limit(pause=1), description="How often a host was moved by a seed on trial.")
    open_breakers: Limit = Field(Limit(pause=1), description="Whether the breaker of the policy is open.")
    loss_volatility: Limit = Field(
        Limit(downgrade=0.25, pause=0.5), description="Spread of the training losses around their line, by their mean."
    )
    gradient_norm: Limit = Field(Limit(downgrade=5, pause=20), description="Before clipping, the median of a span.")
    gradient_variance: Limit = Field(
        Limit(downgrade=1), description="Variance of the gradient norm by its squared mean."
    )
    gradient_conflict: Limit = Field(
        Limit(downgrade=0.5), description="1 less the least cosine of two objectives, where they are separated."
    )
    memory_share: Limit = Field(
        Limit(downgrade=0.8, pause=0.95), description="Of the memory of the accelerator, the most that was in use."
    )
    step_ms: Limit = Field(Limit(), description="Time of a step; with a mark, growth depends on the machine.")
    apply_ms: Limit = Field(Limit(), description="Time of the last change of structure; likewise.")
    quiet_steps: Annotated[int, Field(ge=1)] = Field(
        default=200, description="Steps without a reason to pause, after which a run is no longer conservative."
    )


class GrowPolicyConfig(ConfigSection):
    """What decides when, where and what to grow, and how far it is trusted."""

    outside_identity: ClassVar = frozenset({"normaliser_every"})
    outside_while_null: ClassVar = frozenset({"normaliser"})

    name: str = Field(default="heuristic", description="The policy: see `meristem plugins`.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the policy.", examples=[{"flat_nats": 0.01}]
    )
    inference_budget_ms: Annotated[float, Field(gt=0, le=60_000)] = Field(
        default=50.0, description="How long a policy of a plugin may take to answer; ours are not timed."
    )
    normaliser: str | None = Field(
        default=None,
        examples=["scales.json"],
        description="A file for how the numbers of a policy that observes are scaled: a new run begins with it, and "
        "keeps it. The checkpoints have it too.",
    )
    normaliser_every: Annotated[int, Field(ge=1)] = Field(default=500, description="Steps between two writes of it.")
    is_process_isolated: bool = Field(
        default=False, description="Ask it in another process, which is ended when it does not answer in time."
    )
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=3, description="Failures after which it is left alone for a while."
    )
    breaker_pause_steps: Annotated[int, Field(ge=1, le=10**9)] = Field(
        default=1000, description="Steps for which it is not asked then, and after which a failure is forgotten."
    )


class GatesConfig(ConfigSection):
    """What a seed has to show before it goes on (growth.md 13). Losses are in nats per token."""

    outside_identity: ClassVar = frozenset()

    training_steps: int = Field(
        default=200, ge=1, description="G2: steps for which a seed learns before it is blended in"
    )
    pairs: int = Field(default=32, ge=2, description="held-out sequences that are read with and without a seed")
    margin_nats: float = Field(
        default=0.001, ge=0, description="G2: by how much the loss has to be lower with the seed"
    )
    gradient_least: float = Field(default=1e-3, gt=0, description="G2: least size of a seed's gradient, by its host's")
    gradient_most: float = Field(default=1e2, gt=0, description="G2: its largest size")
    size_least: float = Field(default=0.25, gt=0, description="G3: least size of the output, by that without the seed")
    size_most: float = Field(default=4.0, gt=0, description="G3: its largest size")
    spread_most: float = Field(default=2.0, gt=0, description="G3: spread of training losses, by that before blending")
    holding_steps: int = Field(default=50, ge=0, description="G4: steps for which the blend weight is held")
    quiet_steps: int = Field(default=50, ge=0, description="G4: steps for which the guard has to have been quiet")
    impact_nats: float = Field(default=0.05, ge=0, description="G4: nats above what was expected of held-out text")
    probation_steps: int = Field(default=500, ge=0, description="G6: steps of a seed on probation")
    rent_parameters: float = Field(default=0.05, ge=0, description="G6: nats that twice the parameters have to bring")
    rent_flops: float = Field(default=0.05, ge=0, description="G6: nats that twice the FLOPs have to bring")
    recovery_steps: int = Field(default=50, ge=1, description="G6: steps in which a host alone may catch up")
    recovery: Literal["required", "if_room", "off"] = Field(
        default="required",
        description="G6: whether a seed must be worth half its rent after the host alone was trained on; if_room: not "
        "where the run ends before; off: never",
    )


class GrowConfig(ConfigSection):
    """Growth in a run: `meristem grow` switches it on."""

    outside_identity: ClassVar = frozenset()
    outside_while_null: ClassVar = frozenset({"certify"})

    enabled: bool = Field(default=False, description="whether the run grows")
    slots: tuple[str, ...] = Field(
        default=("blocks.*",), min_length=1, description="modules that get a slot, by name; * is one part of a name"
    )
    reads: Literal["output", "input"] = Field(default="output", description="what a seed reads of its module")
    policy: GrowPolicyConfig = GrowPolicyConfig()
    rate_scale: float = Field(default=1.0, gt=0, description="learning rate of a seed, by that of its host")
    seed_warmup: int = Field(default=100, ge=0, description="steps until the learning rate of a seed has risen to it")
    shadow_every: int = Field(default=8, ge=1, description="steps between two shadow passes")
    boundary_every: int = Field(default=50, ge=1, description="steps between two readings of the run")
    max_open: int = Field(default=4, ge=1, description="seeds on their way at once")
    params_ratio: float = Field(default=4.0, gt=1, description="most parameters after a graft, by those of the host")
    flops_ratio: float = Field(default=4.0, gt=1, description="most FLOPs of a token, by those of the host")
    blend_steps: int = Field(default=100, ge=0, description="steps from the blend weight 0 to its target")
    blend_target: float = Field(default=1.0, gt=0, le=1, description="the blend weight of a seed that was blended in")
    blend_curve: Literal["linear", "cosine", "sigmoid-6", "sigmoid-12", "sigmoid-24"] = Field(
        default="cosine", description="how it gets there; a policy may say otherwise of all three"
    )
    certify: bool | None = Field(
        default=None,
        examples=[True],
        description="G1: whether a seed is probed in a copy of its slot before it learns, in another process",
    )
    embargo_steps: int = Field(default=200, ge=0, description="steps for which a slot is locked after a first cull")
    min_age: int = Field(default=200, ge=0, description="steps before which no seed is kept, or culled by a policy")
    gates: GatesConfig = GatesConfig()
    risk: RiskConfig = RiskConfig()

    @property
    def blending(self) -> Blending:
        """How a seed is blended in where its policy says nothing of it."""
        return Blending(target=self.blend_target, steps=self.blend_steps, curve=self.blend_curve)

    @property
    def is_outside_identity(self) -> bool:
        """A run that does not grow is the same whatever is said of growth."""
        return not self.enabled
