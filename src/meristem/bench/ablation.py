"""What each component of a model is worth: variants of one size read the same tokens from several starts.

``docs/ablation.yaml`` lists them. Every run is one of ``recipes.pretrain`` in a directory of its own, so that none is
lost; what was measured of it goes into a file beside the page, and a run that stands there is not made again.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Final, Self

import torch
from pydantic import Field, model_validator

from meristem.bench.trial import Outcome, Trial, run_trial
from meristem.config import ConfigSection, Loaded, fingerprint, load
from meristem.data.prepare import prepare
from meristem.errors import ConflictingKeys
from meristem.models.build import build
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
    against: Annotated[tuple[str, ...], Field(description="The variants that it is compared with, by name.")] = ()
    settings: Annotated[
        tuple[str, ...], Field(description="Settings as on the command line, as memory.rule=delta.")
    ] = ()
    published: Annotated[str | None, Field(description="What was found elsewhere, to be printed beside it.")] = None


class AblationConfig(ConfigSection):
    """Which variants are trained, from how many starts, and what is measured of them."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1, description="Random seeds, one run of a variant for each.")]
    same_size_as: Annotated[str, Field(description="The variant whose number of parameters all others are given.")]
    settings: Annotated[tuple[str, ...], Field(description="Settings of all variants, below their own.")] = ()
    n_recall: Annotated[int, Field(ge=1, description="Sequences of each task of recall.")] = 32
    n_documents: Annotated[int, Field(ge=1, description="Documents read for adaptation.")] = 32
    variants: Annotated[dict[str, VariantConfig], Field(min_length=1, description="Name to what it is.")]

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        asked: dict[str, tuple[str, ...]] = {"same_size_as": (self.same_size_as,)}
        asked |= {f"variants.{name}.against": variant.against for name, variant in self.variants.items()}
        wrong = [f"{path} names '{n}'" for path, names in asked.items() for n in names if n not in self.variants]
        wrong += [f"variants.{name} is compared with itself" for name, v in self.variants.items() if name in v.against]
        if wrong:
            raise ConflictingKeys(
                f"{'; '.join(wrong)}. Name other variants; there are {', '.join(self.variants)}.", reasons=wrong
            )
        return self


def read_ablation(path: Path) -> AblationConfig:
    """The variants that a YAML file lists."""
    loaded: Loaded[AblationConfig] = load(AblationConfig, file=path)
    return loaded.tree


def trials(config: AblationConfig) -> list[Trial]:
    """Every run, seed after seed, so that all variants have one result early; all of one size and on one text.

    Raises ConflictingKeys with all reasons where the variants cannot be compared.
    """
    trees = {name: _tree(config, name) for name in config.variants}
    _require_comparable(trees)
    first = next(iter(trees.values()))
    vocabulary = prepare(first.data, first.tokenizer).tokenizer.vocab_size
    target = n_parameters(trees[config.same_size_as], vocabulary)
    sized, wrong = {}, []
    for name in config.variants:
        tree, n_found = _of_size(config, name, target, vocabulary)
        sized[name] = tree, n_found
        if abs(n_found / target - 1) > TOLERANCE:
            wrong.append(f"{name} has {n_found:,} with model.mlp_dim={tree.model.mlp_dim}")
    if wrong:
        raise ConflictingKeys(
            f"'{config.same_size_as}' has {target:,} parameters, and these cannot be given as many by their "
            f"feed-forward layers: {'; '.join(wrong)}. Change their width or layers, or choose another same_size_as.",
            reasons=wrong,
        )
    return [_trial(config, name, seed, *sized[name]) for seed in config.seeds for name in config.variants]


def n_parameters(config: Config, vocabulary: int) -> int:
    """How many a model has, found without allocating it."""
    with torch.device("meta"):
        model = build(config.model, config.memory, vocabulary, random_seed=0)
    return sum(parameter.numel() for parameter in model.parameters())


def finished(planned: Sequence[Trial], known: Sequence[Outcome]) -> dict[str, Outcome]:
    """Of what was measured before, by name of the trial, that which these very settings gave."""
    wanted = {trial.name: trial.fingerprint for trial in planned}
    return {outcome.name: outcome for outcome in known if wanted.get(outcome.name) == outcome.fingerprint}


def run_trials(planned: Sequence[Trial], *, jobs: int) -> Iterator[Outcome]:
    """The outcomes of all trials as they end: one after the other in this process, or in so many at once.

    Raises KeyboardInterrupt once a trial was interrupted; it has left a checkpoint and goes on from there next time.
    """
    if jobs == 1:
        for trial in planned:
            yield run_trial(trial)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes:
        try:
            for done in as_completed([processes.submit(run_trial, trial) for trial in planned]):
                yield done.result()
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            raise


def _tree(config: AblationConfig, name: str, *more: str) -> Config:
    variant = config.variants[name]
    # One thread each: tokens a second compare, whatever runs beside.
    settings = (f"run.name={name}", "device.threads=1", *config.settings, *variant.settings, *more)
    return load_config(variant.preset, settings).tree


def _require_comparable(trees: Mapping[str, Config]) -> None:
    first_name, first = next(iter(trees.items()))
    wrong = [
        f"{name} differs from {first_name} in {section}"
        for name, tree in trees.items()
        for section in SAME
        if getattr(tree, section) != getattr(first, section)
    ]
    if first.train.max_time is not None:
        wrong.append(f"train.max_time is {first.train.max_time:g} s, in which a slow variant reads fewer tokens")
    if wrong:
        raise ConflictingKeys(
            f"these variants would not read the same tokens: {'; '.join(wrong)}. Put {', '.join(SAME)} into the "
            f"settings of all, with train.max_time=null and train.tokens or train.steps.",
            reasons=wrong,
        )


def _of_size(config: AblationConfig, name: str, target: int, vocabulary: int) -> tuple[Config, int]:
    """The variant with the hidden width that brings it nearest to ``target`` parameters, and how many it then has."""
    tree = _tree(config, name)
    if name == config.same_size_as or "mlp_dim" not in tree.model.reads:
        return tree, n_parameters(tree, vocabulary)
    one, two = (n_parameters(_tree(config, name, f"model.mlp_dim={hidden}"), vocabulary) for hidden in (1, 2))
    for multiple in MULTIPLES:
        hidden = max(multiple, multiple * round((target - one + two - one) / (two - one) / multiple))
        tree = _tree(config, name, f"model.mlp_dim={hidden}")
        n_found = n_parameters(tree, vocabulary)
        if abs(n_found / target - 1) <= TOLERANCE:
            break
    return tree, n_found


def _trial(part: AblationConfig, name: str, seed: int, tree: Config, n_found: int) -> Trial:
    config = tree.model_copy(update={"run": tree.run.model_copy(update={"seed": seed})})
    asked = {"n_recall": part.n_recall, "n_documents": part.n_documents}
    return Trial(
        variant=name,
        random_seed=seed,
        config=config,
        n_parameters=n_found,
        fingerprint=fingerprint({"config": config.model_dump(mode="json"), **asked}),
        **asked,
    )
