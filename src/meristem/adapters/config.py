"""Settings of what begins from weights that are there already (`meristem finetune`)."""

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys

How = Literal["full", "lora", "memory", "levels"]

_ALWAYS: Final = frozenset({"base", "how", "remote_code"})
READS: Final[dict[How, frozenset[str]]] = {
    "full": _ALWAYS,
    "lora": _ALWAYS | {"rank", "alpha", "dropout", "targets"},
    "memory": _ALWAYS | {"layers"},
    "levels": _ALWAYS,
}
"""The keys that each way reads."""


class FinetuneConfig(ConfigSection):
    """What is trained on, and what of it."""

    outside_identity: ClassVar = frozenset({"remote_code"})

    base: Annotated[
        str | None,
        Field(
            description="A checkpoint, a run, a folder of transformers, or name@commit of the hub; null begins anew. "
            "`meristem finetune` sets it.",
            examples=["models/llama"],
        ),
    ] = None
    how: Annotated[
        How,
        Field(
            description="full: all weights; lora: matrices of low rank beside weights that stay; memory: memories in "
            "layers of a model of transformers that stays; levels: feed-forward layers become levels."
        ),
    ] = "full"
    rank: Annotated[int, Field(ge=1, description="Rank of the matrices of lora.")] = 8
    alpha: Annotated[float, Field(gt=0, description="What they give is scaled by this over their rank.")] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="Share of their input that is dropped in training.")] = 0.0
    targets: Annotated[
        tuple[str, ...] | None,
        Field(description="Ends of the names of the layers that get such matrices; null: those of the architecture."),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None, Field(description="Layers that get a memory, from 0; null: the one in the middle.")
    ] = None
    remote_code: Annotated[
        tuple[str, ...],
        Field(description="Models whose own code may run, each as name@commit; MERISTEM_ALLOW_REMOTE_CODE adds more."),
    ] = ()

    @property
    def is_outside_identity(self) -> bool:
        """A run that begins anew reads none of it."""
        return self.base is None

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        reads = READS[self.how] if self.base is not None else frozenset({"base"})
        self.refuse_dead("finetune", reads, f"finetune.how is '{self.how}', from {self.base}", "finetune.how")
        return self

    @model_validator(mode="after")
    def _layers_are_some(self) -> Self:
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConflictingKeys(
                f"finetune.layers is {list(self.layers)}; expected numbers of layers, each once. Leave it out for the "
                f"layer in the middle.",
                path="finetune.layers",
                value=list(self.layers),
            )
        return self
