"""Settings of growth: where, what, when, and how much a seed has to bring."""

from typing import Any, Literal

from pydantic import Field

from meristem.config import ConfigSection
from meristem.growth.stage import Way


class GatesConfig(ConfigSection):
    """What a seed has to show before it goes on (growth.md 13). Losses are in nats per token."""

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

    enabled: bool = Field(default=False, description="whether the run grows")
    slots: tuple[str, ...] = Field(
        default=("blocks.*",), min_length=1, description="modules that get a slot, by name; * is one part of a name"
    )
    reads: Literal["output", "input"] = Field(default="output", description="what a seed reads of its module")
    policy: str = Field(default="heuristic", description="what decides when, where and what: see `meristem plugins`")
    policy_settings: dict[str, Any] = Field(default_factory=dict, description="settings of the policy")
    blueprint: str = Field(default="bottleneck", description="what seeds are built from")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the blueprint")
    blend: str = Field(default="residual", description="how what a seed adds enters its host")
    way: Way = Field(default="shadow", description="how a seed on trial gets its gradients")
    shadow_every: int = Field(default=8, ge=1, description="steps between two shadow passes")
    boundary_every: int = Field(default=50, ge=1, description="steps between two looks at the run")
    max_open: int = Field(default=4, ge=1, description="seeds on their way at once")
    params_ratio: float = Field(default=4.0, gt=1, description="most parameters after a graft, by those of the host")
    flops_ratio: float = Field(default=4.0, gt=1, description="most FLOPs of a token, by those of the host")
    blend_steps: int = Field(default=100, ge=1, description="steps from the blend weight 0 to its target")
    blend_target: float = Field(default=1.0, gt=0, le=1, description="the blend weight of a seed that was blended in")
    blend_curve: Literal["linear", "cosine", "sigmoid-6", "sigmoid-12", "sigmoid-24"] = Field(
        default="cosine", description="how it gets there"
    )
    embargo_steps: int = Field(default=200, ge=0, description="steps for which a slot is locked after a first cull")
    min_age: int = Field(default=200, ge=0, description="steps before which no seed is kept, or culled by a policy")
    gates: GatesConfig = GatesConfig()

    @property
    def is_outside_identity(self) -> bool:
        """A run that does not grow is the same whatever is said of growth."""
        return not self.enabled
