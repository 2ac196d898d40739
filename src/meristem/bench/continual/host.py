"""Hosts: models of ours and of Hugging Face, read alike, and what an arm puts into their slots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import torch
from torch import nn

import meristem.growth as grow
from meristem.bench.continual.settings import SETTINGS, ArmConfig, ContinualConfig, HostConfig
from meristem.bench.evidence import TOLERANCE
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.device.resolve import Device, resolve
from meristem.errors import ConflictingKeys
from meristem.evaluate.likelihood import Reader
from meristem.events import silent
from meristem.extras import needed
from meristem.memory.state import State
from meristem.models.build import build
from meristem.models.init import seeded
from meristem.runs.config import Config, load_config

Make: TypeAlias = Callable[[int], nn.Module]
"""A random seed to a host with first weights."""


_TWO: Final = (2, 4)
"""Values of a sized setting between which parameters are counted; even ones, as rope wants them."""


@dataclass(frozen=True)
class Texts:
    """Both texts in the tokens of the first, how they are read, and where."""

    config: Config
    first: Corpus
    second: Corpus
    device: Device

    @classmethod
    def of(cls, tree: ContinualConfig) -> Self:
        """Prepared, where they were not."""
        config = load_config("default", (*SETTINGS, *tree.settings)).tree
        first, second = (config.data.model_copy(update={"source": source}) for source in tree.texts)
        read = prepare(first, config.tokenizer)
        return cls(config, read, prepare(second, read.tokenizer), resolve(config.device, silent))


@dataclass(frozen=True)
class Part:
    """One seed to come: its slot, the widths there, and what it is."""

    slot: str
    widths: tuple[int, int]
    blueprint: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """What the seeds of an arm take. chosen: the setting that gives it, as ``hidden=50``; empty where none does."""

    n_parameters: int
    flops_per_token: float
    chosen: str


def maker(tree: ContinualConfig, host: HostConfig, vocabulary: int) -> Make:
    """How a host is made. Raises MissingExtra where it needs transformers and there is none."""
    if host.transformers is not None:
        return _foreign(host.transformers, vocabulary)
    config = load_config(host.preset or "", (*SETTINGS, *tree.settings, *host.settings)).tree
    return lambda random_seed: build(config.model, config.memory, vocabulary, random_seed)


def _foreign(settings: Mapping[str, Any], vocabulary: int) -> Make:
    """A causal LM of Hugging Face with drawn weights; nothing is downloaded."""
    with needed("a model of Hugging Face as host"):
        from transformers import AutoConfig, AutoModelForCausalLM

    def make(random_seed: int) -> nn.Module:
        config = AutoConfig.for_model(**settings, vocab_size=vocabulary)
        with seeded(random_seed, "bench.continual"):
            made: nn.Module = AutoModelForCausalLM.from_config(config)
        return made

    return make


def reader(model: nn.Module, host: HostConfig) -> Reader:
    """The host as ``(tokens_bt, state) -> (logits_bto, state)``."""
    if host.transformers is None:
        return model

    def read(tokens_bt: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        return model(input_ids=tokens_bt, use_cache=False).logits, {}

    return read


def slotted(model: nn.Module, arm: ArmConfig, size: int | None) -> list[Part]:
    """Give a host the slots of an arm, in place; what belongs into them. size: the value of the sized setting."""
    found = []
    for group in arm.seeds:
        before = set(grow.slots_in(model))
        grow.attach(model, group.slots, reads=group.reads, width=group.width)
        settings = group.settings if group.sized is None or size is None else group.settings | {group.sized: size}
        new = {name: slot for name, slot in grow.slots_in(model).items() if name not in before}
        found += [Part(name, slot.widths, group.blueprint, settings) for name, slot in new.items()]
    return found


def grow_beside(model: nn.Module, parts: Sequence[Part], *, random_seed: int) -> None:
    """Put the seeds into their slots and freeze all else; without seeds everything goes on learning."""
    model.requires_grad_(not parts)
    for part in parts:
        seed = grow.graft(model, part.slot, part.blueprint, random_seed=random_seed, **part.settings)
        seed.requires_grad_(True)


def sizes(make: Make, host: HostConfig, n_time: int) -> dict[str, tuple[int | None, Size]]:
    """The value of the sized setting of each arm with seeds, and its size: that of ``same_size_as``, within a fiftieth.

    Raises ConflictingKeys with all arms that cannot be given it.
    """
    with torch.device("meta"):
        model = make(0)

    def counted(arm: ArmConfig, size: int | None) -> Size:
        parts = slotted(model, arm, size)
        costs = [grow.cost(part.blueprint, part.widths, n_time=n_time, **part.settings) for part in parts]
        grow.strip(model)
        sized = next((group.sized for group in arm.seeds if group.sized), None)
        chosen = f"{sized}={size}" if sized and size is not None else ""
        return Size(sum(one.n_parameters for one in costs), sum(one.flops_per_token for one in costs), chosen)

    target = counted(host.arms[host.same_size_as], None)
    found: dict[str, tuple[int | None, Size]] = {}
    for name, arm in host.arms.items():
        if name == host.same_size_as or not arm.seeds:
            found[name] = None, target if arm.seeds else Size(0, 0.0, "")
        elif all(group.sized is None for group in arm.seeds):
            found[name] = None, counted(arm, None)
        else:
            one, two = (counted(arm, size).n_parameters for size in _TWO)
            size = max(1, round(_TWO[0] + (target.n_parameters - one) * (_TWO[1] - _TWO[0]) / (two - one)))
            found[name] = size, counted(arm, size)
    wrong = [
        f"{name} has {size.n_parameters:,} with {size.chosen or 'no sized setting'}"
        for name, (_, size) in found.items()
        if size.n_parameters and abs(size.n_parameters / target.n_parameters - 1) > TOLERANCE
    ]
    if wrong:
        raise ConflictingKeys(
            f"'{host.same_size_as}' adds {target.n_parameters:,} parameters, and these cannot add as many: "
            f"{'; '.join(wrong)}. Change their settings, or what is sized.",
            reasons=wrong,
        )
    return found
