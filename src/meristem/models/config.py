"""The settings of a model."""

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys
from meristem.nn.config import CMSConfig

READS: Final = {
    "lm": frozenset(
        {
            *(
                "dim",
                "n_layers",
                "n_heads",
                "mlp_dim",
                "mlp",
                "mixer",
                "sliding_window",
                "rope",
                "n_persistent_tokens",
                "tied",
            ),
            *("combine", "segment", "is_residual", "layers", "aggregate", "levels", "pattern"),
        }
    ),
    "charformer": frozenset({"dim", "n_layers", "n_heads", "mlp_dim", "max_seq_len", "order", "positions", "init"}),
    "charrnn": frozenset({"dim", "n_layers"}),
    "chargru": frozenset({"dim", "n_layers"}),
    "hf": frozenset(),
}
"""The keys that each of our models reads; a plugin's model may read any."""

BY_MIXER: Final = {
    "n_heads": frozenset({"attention", "mag", "mac", "mal"}),
    "sliding_window": frozenset({"attention", "mag", "mal"}),
    "rope": frozenset({"attention", "mag", "mac", "mal"}),
    "n_persistent_tokens": frozenset({"attention", "mag", "mac", "mal"}),
    "combine": frozenset({"mag", "mac"}),
    "segment": frozenset({"mac"}),
    "is_residual": frozenset({"mal"}),
}
"""Keys that only some of our mixers read; a plugin's mixer may read any."""

HOST: Final = "hf"
"""The name of a model of transformers, which its own settings describe; `meristem finetune` brings it."""

OUR_MIXERS: Final = frozenset({"attention", "mag", "mac", "mal", "memory", "self_reference"})


class LayerConfig(ConfigSection):
    """What one layer has of its own; null is what the model or its memory says."""

    outside_identity: ClassVar = frozenset()

    mixer: Annotated[str | None, Field(description="What mixes tokens in this layer.", examples=["attention"])] = None
    rule: Annotated[str | None, Field(description="The rule of its memory.", examples=["delta"])] = None
    retention: Annotated[
        str | None, Field(description="What becomes of its old memory.", examples=["elastic(alpha=5)"])
    ] = None
    periods: Annotated[
        tuple[int, ...] | None,
        Field(description="Periods of its levels: of its chain where model.mlp is `levels`, else of its memory."),
    ] = None
    m3_every: Annotated[
        int | None, Field(ge=1, description="Steps that the slow momentum of m3 gathers for its parameters.")
    ] = None


class ModelConfig(ConfigSection):
    """Which model, and how large. A key that the chosen model does not read may stand at its default only."""

    outside_identity: ClassVar = frozenset()

    name: Annotated[
        str, Field(description="A registered model: lm, charformer, charrnn, chargru; hf for what is fine-tuned.")
    ] = "lm"
    dim: Annotated[int, Field(ge=1, description="Width of the residual stream.")] = 128
    n_layers: Annotated[int, Field(ge=1, le=4096, description="How many layers stand on each other.")] = 4
    n_heads: Annotated[int, Field(ge=1, description="Attention heads; they share the width.")] = 4
    mlp_dim: Annotated[int, Field(ge=0, description="Hidden width of the feed-forward layers; 0 derives it.")] = 0
    mlp: Annotated[
        Literal["swiglu", "gelu", "levels"],
        Field(description="The feed-forward layer; `levels` is a chain of gelu layers that learn at different speeds."),
    ] = "swiglu"
    levels: CMSConfig = CMSConfig()
    mixer: Annotated[
        str,
        Field(
            description="What mixes tokens: attention, mag (memory as gate), mac (as context), mal (as layer), memory."
        ),
    ] = "mag"
    layers: Annotated[
        tuple[LayerConfig, ...],
        Field(description="What layers have of their own, used in rotation: [{mixer: memory}, {mixer: attention}]."),
    ] = ()
    pattern: Annotated[
        Literal["basic", "nested", "sequential", "independent", "hybrid"] | None,
        Field(description="A way to deploy levels that the layers have to follow; null for none."),
    ] = None
    aggregate: Annotated[
        Literal["stack", "sum", "concat", "attention"],
        Field(description="Layers on each other, or side by side: their sum, a projection of all, or a learned mix."),
    ] = "stack"
    combine: Annotated[
        Literal["gated", "normalised", "projected", "sigmoid", "additive"],
        Field(description="How mag and mac make one of attention and memory."),
    ] = "gated"
    segment: Annotated[int, Field(ge=1, description="Tokens that attend to each other in mac.")] = 64
    is_residual: Annotated[bool, Field(description="mal: attention reads the memory's output plus its input.")] = True
    sliding_window: Annotated[int | None, Field(ge=1, description="Keys that attention sees; null for all before.")] = (
        64
    )
    rope: Annotated[bool, Field(description="Rotary positions in attention.")] = True
    n_persistent_tokens: Annotated[int, Field(ge=0, description="Learned vectors in front of the text, per layer.")] = 0
    tied: Annotated[bool, Field(description="One matrix for embedding and head.")] = False
    max_seq_len: Annotated[int, Field(ge=1, description="Longest text that a charformer sees.")] = 256
    order: Annotated[Literal["post", "pre"], Field(description="Where a charformer normalises.")] = "post"
    positions: Annotated[Literal["sinusoid", "learned"], Field(description="Positions of a charformer.")] = "sinusoid"
    init: Annotated[Literal["default", "unscaled"], Field(description="First weights of a charformer.")] = "default"

    @property
    def reads(self) -> frozenset[str]:
        """The keys that mean something to this model."""
        keys = READS.get(self.name, frozenset(type(self).model_fields)) - {"name"}
        used = set(self.mixers)
        if self.name != "lm" or used - OUR_MIXERS:
            return keys
        idle = {key for key, readers in BY_MIXER.items() if not used & readers}
        return keys - idle - ({"levels"} if self.mlp != "levels" else set())

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of every layer, the lowest first."""
        return tuple(self.of_layer(layer).mixer or self.mixer for layer in range(self.n_layers))

    def of_layer(self, layer: int) -> LayerConfig:
        """What that layer has of its own."""
        return self.layers[layer % len(self.layers)] if self.layers else LayerConfig()

    @property
    def _described(self) -> str:
        named = "', '".join(dict.fromkeys(self.mixers))
        return f"'{self.name}'" + (f" with mixer '{named}'" if "mixer" in self.reads else "")

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        reads, why = self.reads | {"name"}, "this model does not read it"
        self.refuse_dead("model", reads, why, "model.name", who=self._described)
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if "n_heads" in self.reads and self.dim % self.n_heads:
            raise ConflictingKeys(
                f"model.dim {self.dim} does not divide into {self.n_heads} heads. "
                f"Set model.n_heads to a divisor of the width.",
                path="model.n_heads",
                value=self.n_heads,
            )
        if {"n_heads", "rope"} <= self.reads and self.rope and self.dim // self.n_heads % 2:
            raise ConflictingKeys(
                f"model.dim {self.dim} in {self.n_heads} heads makes a key width of {self.dim // self.n_heads}, and "
                f"rotary positions rotate channels in pairs. Make it even, or set model.rope to false.",
                path="model.rope",
                value=self.rope,
            )
        return self


class LearnConfig(ConfigSection):
    """Which weights learn from the text just read where weights do (``learn=weights``), and how fast."""

    outside_identity: ClassVar = frozenset()

    which: Annotated[
        Literal["mlp", "last_mlp", "head", "low_rank", "all"],
        Field(
            description="What learns: matrices of feed-forward layers, those of the last one, the head, a low-rank "
            "part of feed-forward layers, or all."
        ),
    ] = "mlp"
    lr: Annotated[
        float | None,
        Field(ge=0, description="Learning rate; null for the one found after training, or the usual one."),
    ] = None
    chunk: Annotated[int, Field(ge=2, description="Tokens that are read before each step.")] = 64
    grad_clip: Annotated[float, Field(gt=0, description="Longest gradient of a step; a longer one is scaled down.")] = (
        1.0
    )
