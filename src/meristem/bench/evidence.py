"""What ``docs/evidence.yaml`` lists: tables of variants that are of one size and read the same tokens.

A table compares its variants on each of its texts under each of its budgets; one variant on one text under one budget
is a cell, of which every seed is a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Self

import torch
from pydantic import Field, model_validator

from meristem.bench.tuning import Settings, TunedConfig
from meristem.config import ConfigSection, Loaded, load
from meristem.data.prepare import prepare
from meristem.errors import ConflictingKeys, WrongValue
from meristem.models.build import build
from meristem.models.online import Learn
from meristem.runs.config import Config, load_config

TOLERANCE: Final = 0.02
"""How far the sizes of two variants may be apart."""

MULTIPLES: Final = (16, 8, 4, 2, 1)
"""Hidden widths are multiples of the first of these by which a variant gets its size."""

SAME: Final = ("data", "tokenizer", "train")
"""Sections in which variants must not differ: they would read other tokens, or other numbers of them."""


class VariantConfig(ConfigSection):
    """One model: a preset with changes."""

    preset: Annotated[str, Field(description="What it starts from; see `meristem config presets`.")]
    settings: Settings = ()
    published: Annotated[str | None, Field(description="What was found elsewhere, to be printed beside it.")] = None


class ReadingConfig(ConfigSection):
    """Texts that a trained model has not seen, read while it learns."""

    learn: Annotated[tuple[Learn, ...], Field(min_length=1, description="What learns; the first is the baseline.")]
    texts: Annotated[dict[str, str], Field(min_length=1, description="Name to data.source; the first is read again.")]
    marks: Annotated[tuple[int, ...], Field(min_length=1, description="Tokens after which is measured, ascending.")]

    @model_validator(mode="after")
    def _marks_ascend(self) -> Self:
        if list(self.marks) != sorted({mark for mark in self.marks if mark > 0}):
            raise ValueError(f"marks are {list(self.marks)}; give positive numbers of tokens, ascending")
        return self


class TableConfig(ConfigSection):
    """Variants, each trained on each text under each budget from all seeds."""

    question: Annotated[str, Field(description="What the table answers, in one sentence.")]
    variants: Annotated[tuple[str, ...], Field(min_length=1, description="By name.")]
    against: Annotated[tuple[str, ...], Field(description="Those of them that all others are compared with.")] = ()
    texts: Annotated[dict[str, Settings], Field(min_length=1, description="Name to the settings that choose it.")]
    budgets: Annotated[dict[str, Settings], Field(min_length=1, description="Name to the length of training.")]
    settings: Settings = ()
    reading: Annotated[ReadingConfig | None, Field(description="Also measure what is gained while reading.")] = None


class EvidenceConfig(TunedConfig):
    """All tables, and what they share."""

    place: ClassVar = "evidence"

    span: Annotated[int, Field(ge=1, description="Tokens of an attention span; distances of recall are so many.")] = 64
    n_texts: Annotated[int, Field(ge=1, description="Texts of eight facts that are asked after.")] = 16
    n_documents: Annotated[int, Field(ge=1, description="Held-out documents in which recall is measured.")] = 8
    same_size_as: Annotated[str, Field(description="The variant whose number of parameters all others are given.")]
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1, description="Name to what it is.")]
    tables: Annotated[dict[str, TableConfig], Field(min_length=1, description="Name to what it compares.")]

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        asked = {"same_size_as": ({self.same_size_as}, set(self.variants))}
        for table, one in self.tables.items():
            asked[f"tables.{table}.variants"] = (set(one.variants), set(self.variants))
            asked[f"tables.{table}.against"] = (set(one.against), set(one.variants))
        wrong = [f"{key} names '{name}'" for key, (names, known) in asked.items() for name in sorted(names - known)]
        if wrong:
            raise ConflictingKeys(
                f"{'; '.join(wrong)}. Name variants, and compare with those of the same table; there are "
                f"{', '.join(self.variants)}.",
                reasons=wrong,
            )
        return self


@dataclass(frozen=True)
class Group:
    """What is compared with each other: a table's variants on one text under one budget."""

    table: str
    text: str
    budget: str


@dataclass(frozen=True)
class Cell:
    """One variant of a group, with the settings that give it its size."""

    group: Group
    variant: str
    config: Config
    n_parameters: int


def read_evidence(path: Path) -> EvidenceConfig:
    """The tables that a YAML file lists."""
    loaded: Loaded[EvidenceConfig] = load(EvidenceConfig, file=path)
    return loaded.tree


def groups(config: EvidenceConfig, only: Sequence[str] = ()) -> Iterator[Group]:
    """All groups in the order of the file, or those of some tables. Raises WrongValue where there is no such table."""
    for name in only:
        if name not in config.tables:
            raise WrongValue(f"there is no table '{name}'; there are {', '.join(config.tables)}.", value=name)
    for name, table in config.tables.items():
        if not only or name in only:
            yield from (Group(name, text, budget) for text in table.texts for budget in table.budgets)


def cells(config: EvidenceConfig, group: Group) -> list[Cell]:
    """The variants of a group, all of one size and on one text, which is prepared if it was not.

    Raises ConflictingKeys with all reasons where they cannot be compared.
    """
    first = _tree(config, group, config.tables[group.table].variants[0])
    return of_one_size(config, group, prepare(first.data, first.tokenizer).tokenizer.vocab_size)


def of_one_size(config: EvidenceConfig, group: Group, vocabulary: int) -> list[Cell]:
    """The variants of a group, each with as many parameters as ``same_size_as`` has."""
    names = config.tables[group.table].variants
    _require_comparable(group, {name: _tree(config, group, name) for name in names})
    target = n_parameters(_tree(config, group, config.same_size_as), vocabulary)
    found = [Cell(group, name, *_of_size(config, group, name, target, vocabulary)) for name in names]
    wrong = [
        f"{cell.variant} has {cell.n_parameters:,} with model.mlp_dim={cell.config.model.mlp_dim}"
        for cell in found
        if abs(cell.n_parameters / target - 1) > TOLERANCE
    ]
    if wrong:
        raise ConflictingKeys(
            f"table {group.table}: '{config.same_size_as}' has {target:,} parameters, and these cannot be given as "
            f"many by their feed-forward layers: {'; '.join(wrong)}. Change their width or layers, or choose another "
            f"same_size_as.",
            reasons=wrong,
        )
    return found


def n_parameters(config: Config, vocabulary: int) -> int:
    """How many a model has, found without allocating it."""
    with torch.device("meta"):
        model = build(config.model, config.memory, vocabulary, random_seed=0)
    return sum(parameter.numel() for parameter in model.parameters())


def _tree(config: EvidenceConfig, group: Group, name: str, *more: str) -> Config:
    table, variant = config.tables[group.table], config.variants[name]
    shared = (*config.settings, *table.settings, *table.texts[group.text], *table.budgets[group.budget])
    # One thread each: tokens a second compare, whatever runs beside.
    return load_config(variant.preset, ("device.threads=1", *shared, *variant.settings, *more)).tree


def _require_comparable(group: Group, trees: Mapping[str, Config]) -> None:
    first_name, first = next(iter(trees.items()))
    wrong = [
        f"{name} differs from {first_name} in {section}"
        for name, tree in trees.items()
        for section in SAME
        if getattr(tree, section) != getattr(first, section)
    ]
    if first.train.max_time is not None and (first.train.tokens or first.train.steps):
        wrong.append(
            f"train.max_time is {first.train.max_time:g} s beside a length, which a slow variant may not reach"
        )
    if wrong:
        raise ConflictingKeys(
            f"table {group.table}: these variants would not read the same: {'; '.join(wrong)}. Put {', '.join(SAME)} "
            f"into the settings of the table, its texts and its budgets, of which each gives either a length "
            f"(train.tokens, train.steps) or a time (train.max_time).",
            reasons=wrong,
        )


def _of_size(config: EvidenceConfig, group: Group, name: str, target: int, vocabulary: int) -> tuple[Config, int]:
    """The variant with the hidden width that brings it nearest to ``target`` parameters, and how many it then has."""
    tree = _tree(config, group, name)
    if name == config.same_size_as or "mlp_dim" not in tree.model.reads:
        return tree, n_parameters(tree, vocabulary)
    one, two = (n_parameters(_tree(config, group, name, f"model.mlp_dim={hidden}"), vocabulary) for hidden in (1, 2))
    for multiple in MULTIPLES:
        hidden = max(multiple, multiple * round((target - one + two - one) / (two - one) / multiple))
        tree = _tree(config, group, name, f"model.mlp_dim={hidden}")
        n_found = n_parameters(tree, vocabulary)
        if abs(n_found / target - 1) <= TOLERANCE:
            break
    return tree, n_found
