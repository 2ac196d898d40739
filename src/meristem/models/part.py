"""The settings of a model."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import Part
from meristem.errors import ConflictingKeys, DeadKey

READS: Final = {
    "lm": frozenset({"width", "n_layers", "heads", "hidden", "mlp", "mixer", "span", "rope", "n_persistent", "tied"}),
    "charformer": frozenset({"width", "n_layers", "heads", "hidden", "window", "order", "positions", "init"}),
    "charrnn": frozenset({"width", "n_layers"}),
    "chargru": frozenset({"width", "n_layers"}),
}
"""The keys that each of our models reads; a plugin's model may read any."""

ATTENTION: Final = frozenset({"heads", "span", "rope", "n_persistent"})
"""The keys that a mixer without attention does not read."""


class ModelPart(Part):
    """Which model, and how large. A key that the chosen model does not read may stand at its default only."""

    name: Annotated[str, Field(description="A registered model: lm, charformer, charrnn, chargru.")] = "lm"
    width: Annotated[int, Field(ge=1, description="Width of the residual stream.")] = 128
    n_layers: Annotated[int, Field(ge=1, description="How many layers stand on each other.")] = 4
    heads: Annotated[int, Field(ge=1, description="Attention heads; they share the width.")] = 4
    hidden: Annotated[int, Field(ge=0, description="Hidden width of the feed-forward layers; 0 derives it.")] = 0
    mlp: Annotated[Literal["swiglu", "gelu"], Field(description="The feed-forward layer.")] = "swiglu"
    mixer: Annotated[str, Field(description="What mixes tokens: attention, mag (memory as gate), memory.")] = "mag"
    span: Annotated[int | None, Field(ge=1, description="Keys that attention sees; null for all before.")] = 64
    rope: Annotated[bool, Field(description="Rotary positions in attention.")] = True
    n_persistent: Annotated[int, Field(ge=0, description="Learned vectors in front of the text, per layer.")] = 0
    tied: Annotated[bool, Field(description="One matrix for embedding and head.")] = False
    window: Annotated[int, Field(ge=1, description="Longest text that a charformer sees.")] = 256
    order: Annotated[Literal["post", "pre"], Field(description="Where a charformer normalises.")] = "post"
    positions: Annotated[Literal["sinusoid", "learned"], Field(description="Positions of a charformer.")] = "sinusoid"
    init: Annotated[Literal["default", "unscaled"], Field(description="First weights of a charformer.")] = "default"

    @property
    def reads(self) -> frozenset[str]:
        """The keys that mean something to this model."""
        keys = READS.get(self.name, frozenset(type(self).model_fields)) - {"name"}
        return keys - ATTENTION if self.name == "lm" and self.mixer == "memory" else keys

    @property
    def _described(self) -> str:
        return f"'{self.name}'" + (f" with mixer '{self.mixer}'" if "mixer" in self.reads else "")

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        for key, field in type(self).model_fields.items():
            if key not in self.reads | {"name"} and getattr(self, key) != field.default:
                raise DeadKey(
                    f"model.{key} is {getattr(self, key)!r}, but this model does not read it; {self._described} reads "
                    f"{', '.join(sorted(self.reads))}. Remove the key, or choose another model.name.",
                    path=f"model.{key}",
                    value=getattr(self, key),
                )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if "heads" in self.reads and self.width % self.heads:
            raise ConflictingKeys(
                f"model.width {self.width} does not divide into {self.heads} heads. "
                f"Set model.heads to a divisor of the width.",
                path="model.heads",
                value=self.heads,
            )
        if {"heads", "rope"} <= self.reads and self.rope and self.width // self.heads % 2:
            raise ConflictingKeys(
                f"model.width {self.width} in {self.heads} heads makes a key width of {self.width // self.heads}, and "
                f"rotary positions turn channels in pairs. Make it even, or set model.rope to false.",
                path="model.rope",
                value=self.rope,
            )
        return self
