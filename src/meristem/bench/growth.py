"""What ``docs/growth.yaml`` lists: ways to spend a budget of operations, with and without growth (growth.md 29).

One arm under one budget is a cell, of which every seed is a run. An arm is a configuration of `meristem train` or, with
``grow.enabled``, of `meristem grow`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from meristem.bench.tuning import Settings, TunedConfig
from meristem.config import ConfigSection, Loaded, load
from meristem.errors import ConflictingKeys
from meristem.runs.config import Config, load_config

FLOOR_MOST = 0.1
"""How much of the learning rate may be left at the end of a budget (growth.md 29.2, R2)."""


class ArmConfig(ConfigSection):
    """One way to spend a budget."""

    what: Annotated[str, Field(description="What it is, in a few words.")]
    settings: Settings = ()


class GrowthConfig(TunedConfig):
    """All arms, and what they share."""

    place: ClassVar = "growth"

    preset: Annotated[str, Field(description="What every arm starts from; see `meristem config presets`.")]
    small: Annotated[str, Field(description="The arm that never grows.")] = "small"
    large: Annotated[str, Field(description="The arm that has its last size from the beginning.")] = "large"
    arms: Annotated[dict[str, ArmConfig], Field(min_length=3, description="Name to what it is.")]
    budgets: Annotated[
        dict[str, Settings], Field(min_length=1, description="Name to settings, train.flops among them, ascending.")
    ]

    @model_validator(mode="after")
    def _baselines_are_arms(self) -> Self:
        wrong = [f"{key} is '{name}'" for key in ("small", "large") if (name := getattr(self, key)) not in self.arms]
        if not wrong and self.small == self.large:
            wrong = [f"small and large are both '{self.small}'"]
        if wrong:
            raise ConflictingKeys(
                f"{'; '.join(wrong)}. Name two of the arms; there are {', '.join(self.arms)}.", reasons=wrong
            )
        return self


@dataclass(frozen=True)
class ArmCell:
    """One arm under one budget."""

    budget: str
    variant: str
    config: Config

    @property
    def flops(self) -> float:
        """The budget."""
        return self.config.train.flops or 0.0


def read_growth(path: Path) -> GrowthConfig:
    """The arms and budgets that a YAML file lists."""
    loaded: Loaded[GrowthConfig] = load(GrowthConfig, file=path)
    return loaded.tree


def arm_cells(config: GrowthConfig) -> list[ArmCell]:
    """Every arm under every budget, the smallest first.

    Raises ConflictingKeys with all reasons where they cannot be compared at equal cost.
    """
    found = [ArmCell(budget, name, _tree(config, budget, name)) for budget in config.budgets for name in config.arms]
    wrong = [*_unequal(config, found), *_undecayed(found), *_unordered(config, found)]
    if wrong:
        raise ConflictingKeys(
            f"these arms cannot be compared: {'; '.join(wrong)}. Each budget sets train.flops and no other length; "
            f"text, tokenizer and batches are shared; schedule.unit is share, and its floor at most {FLOOR_MOST:g}.",
            reasons=wrong,
        )
    return found


def _tree(config: GrowthConfig, budget: str, name: str) -> Config:
    # One thread each: seconds compare, whatever runs beside.
    settings = ("device.threads=1", *config.settings, *config.budgets[budget], *config.arms[name].settings)
    return load_config(config.preset, settings).tree


def _unequal(config: GrowthConfig, found: list[ArmCell]) -> Iterator[str]:
    first = {cell.budget: cell for cell in found if cell.variant == config.small}
    for cell in found:
        other, own = first[cell.budget], cell.config
        for section in ("data", "tokenizer", "train", "schedule"):
            if getattr(own, section) != getattr(other.config, section):
                yield f"{cell.variant} differs from {config.small} in {section} under {cell.budget}"
        if own.train.flops is None or own.train.steps or own.train.tokens or own.train.max_time:
            yield f"{cell.variant} has another length than train.flops under {cell.budget}"
    for name in (config.small, config.large):
        if any(cell.config.grow.enabled for cell in found if cell.variant == name):
            yield f"{name} has grow.enabled=true"


def _undecayed(found: list[ArmCell]) -> Iterator[str]:
    for cell in found:
        part = cell.config.schedule
        if part.unit != "share" or part.shape == "constant" or part.floor > FLOOR_MOST:
            yield f"the learning rate of {cell.variant} does not end low with its budget {cell.budget}"


def _unordered(config: GrowthConfig, found: list[ArmCell]) -> Iterator[str]:
    own = [cell for cell in found if cell.variant == config.small]
    for one, other in pairwise(own):
        if one.flops >= other.flops:
            yield f"the budget {other.budget} is not above {one.budget}"
