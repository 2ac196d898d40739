"""What ``docs/continual.yaml`` lists: two texts, hosts that are trained on the first, and ways to learn the second."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, model_validator

from meristem.bench.tuning import Settings, TunedConfig
from meristem.config import ConfigSection, Loaded, load
from meristem.errors import ConflictingKeys
from meristem.nn.slot import Reads

SETTINGS: Final = ("device.threads=1", "device.dtype=fp32")
"""One thread, whose results are the same bits again, in the precision in which a digest means most."""


class SeedsConfig(ConfigSection):
    """Seeds of one blueprint in all slots of a pattern."""

    slots: Annotated[str, Field(description="Modules that get a slot, as of `grow.attach`.")]
    blueprint: Annotated[str, Field(description="See `meristem plugins`.")]
    settings: Annotated[dict[str, Any], Field(description="Of the blueprint.")] = {}
    reads: Annotated[Reads, Field(description="What a seed reads of its module.")] = "output"
    width: Annotated[int | None, Field(ge=1, description="Of a module that does not say it.")] = None
    sized: Annotated[str | None, Field(description="The setting by which the arm is given its size.")] = None


class ArmConfig(ConfigSection):
    """One way to learn the second text: seeds beside a frozen host, or the host itself where there are none."""

    seeds: tuple[SeedsConfig, ...] = ()
    replay_every: Annotated[
        int | None, Field(ge=2, description="Every so many batches one of the first text is read again.")
    ] = None

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if sum(one.sized is not None for one in self.seeds) > 1:
            raise ValueError("more than one group of seeds is sized; an arm has one size to be found")
        return self


class HostConfig(ConfigSection):
    """A model, and the arms that begin with it."""

    preset: Annotated[str | None, Field(description="A model of ours.")] = None
    settings: Annotated[Settings, Field(description="Of it, as model.dim=64.")] = ()
    transformers: Annotated[
        dict[str, Any] | None,
        Field(description="A causal LM of Hugging Face instead: its model_type and the settings of its configuration."),
    ] = None
    rate: Annotated[float, Field(gt=0, description="Learning rate on the first text.")]
    same_size_as: Annotated[str, Field(description="The arm whose number of new parameters all others are given.")]
    arms: Annotated[dict[str, ArmConfig], Field(min_length=1, description="Name to what is done.")]

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        wrong = []
        if (self.preset is None) is (self.transformers is None):
            wrong.append("a host is a preset or a model of transformers; give one of both")
        if self.transformers is not None and "model_type" not in self.transformers:
            wrong.append("transformers has no model_type, as llama")
        if self.same_size_as not in self.arms or not self.arms[self.same_size_as].seeds:
            wrong.append(f"same_size_as names '{self.same_size_as}', which is no arm with seeds")
        if wrong:
            raise ConflictingKeys(f"{'; '.join(wrong)}. Arms are {', '.join(self.arms)}.", reasons=wrong)
        return self


class ContinualConfig(TunedConfig):
    """Both texts, how long each is learned, and every host. settings: of all of them, data and tokenizer."""

    place: ClassVar = "continual"

    first: Annotated[str, Field(description="data.source of the text that hosts are trained on.")]
    second: Annotated[str, Field(description="data.source of the text that comes afterwards.")]
    first_tokens: Annotated[int, Field(ge=1, description="Tokens of the first that a host reads.")]
    second_tokens: Annotated[int, Field(ge=1, description="Tokens of the second that an arm reads.")]
    n_windows: Annotated[int, Field(ge=1, description="Held-out sequences of each text.")] = 64
    hosts: Annotated[dict[str, HostConfig], Field(min_length=1, description="Name to what it is.")]

    @property
    def texts(self) -> tuple[str, str]:
        """Both, in the order in which they are learned."""
        return self.first, self.second


def read_continual(path: Path) -> ContinualConfig:
    """What a YAML file lists."""
    loaded: Loaded[ContinualConfig] = load(ContinualConfig, file=path)
    return loaded.tree
