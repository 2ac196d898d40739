"""Levels that are added to a trained module: a fresh fast one below, or a fresh slow one on top (memory.md 6.7).

Nothing is changed: a new module comes back, with the names under which the old parameters are found in it, so that an
optimizer can keep its moments. What a level is given afresh, and vectors with one number per level, are not named. The
fresh level draws from torch's generator; call inside a named stream.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from meristem.errors import ConflictingKeys
from meristem.memory.forms.by_chunk import finished
from meristem.memory.state import State
from meristem.nn.auxiliary import AUXILIARY
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.cms_mlp import CMSMLP, CMSMLPLevel
from meristem.nn.config import PERIODS, CMSConfig, LevelsConfig, MemoryConfig
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.shapes import Hidden

Levels = TypeVar("Levels", CMSMemory, CMSMLP)
Settings = TypeVar("Settings", LevelsConfig, CMSConfig)


@dataclass(frozen=True)
class Grown(Generic[Levels]):
    """A module with one level more.

    names: of a parameter before, to its name now, for all that were taken over as they were.
    moved: of a level before, to its number now.
    """

    module: Levels
    names: Mapping[str, str]
    moved: Mapping[int, int]

    @property
    def fresh(self) -> int:
        """The number of the new level."""
        (fresh,) = set(range(len(self.module.level))) - set(self.moved.values())
        return fresh


def push_up(
    memory: NeuralMemory | CMSMemory, config: MemoryConfig, *, gates: Literal["carry", "default"] = "carry"
) -> Grown[CMSMemory]:
    """Level i becomes level i + 1, and takes its period; a fresh level 0 begins to learn.

    config: the settings that ``memory`` was made with. gates: whether promoted levels keep their gates or begin with
    those of their new place.
    """
    n_levels = config.levels.count
    return _with_memories(memory, config, {level: level + 1 for level in range(n_levels)}, gates)


def stack_up(memory: NeuralMemory | CMSMemory, config: MemoryConfig) -> Grown[CMSMemory]:
    """All levels stay as they are; a fresh one, slower than all, comes on top."""
    return _with_memories(memory, config, {level: level for level in range(config.levels.count)}, "carry")


def push_up_chain(chain: CMSMLP) -> Grown[CMSMLP]:
    """Level i becomes level i + 1, and takes its period; a fresh level 0, which adds nothing yet, begins to learn."""
    return _with_chain_level(chain, {level: level + 1 for level in range(chain.config.count)})


def stack_up_chain(chain: CMSMLP) -> Grown[CMSMLP]:
    """All levels stay as they are; a fresh one, slower than all, which adds nothing yet, comes on top."""
    return _with_chain_level(chain, {level: level for level in range(chain.config.count)})


def carry_state(grown: Grown[CMSMemory] | Grown[CMSMLP], state: State, hidden_btd: Hidden) -> State:
    """A reader's state for the grown module: memories move with their levels, and the fresh one begins.

    What is read of a promoted level stays; a group of tokens that had begun goes on in the longer one.
    hidden_btd: gives batch, dtype and device.
    """
    begun = grown.module.init_state(hidden_btd)
    if not begun:
        return {}
    before: State = state if "level" in state else {"count": 0, "level": {"0": state}}
    level = {**begun["level"]}
    for old, new in grown.moved.items():
        # A level of a chain that reads every token carries nothing.
        if str(old) in before["level"] and str(new) in level:
            level[str(new)] = _moved_level(before["level"][str(old)], begun["level"][str(new)])
    after: State = {"count": before["count"], "level": level}
    if "n_frozen" in begun:
        after["n_frozen"] = before.get("n_frozen", 0)
    if "frequency" in begun:
        after["frequency"] = {**begun["frequency"]}
        for name in ("seen_bl", "rate_bl"):
            carried = after["frequency"][name].clone()
            for old, new in grown.moved.items():
                if old > 0 and "frequency" in before:
                    carried[:, new - 1] = before["frequency"][name][:, old - 1]
            after["frequency"][name] = carried
        after["frequency"][AUXILIARY] = begun["frequency"][AUXILIARY]
    return after


def _moved_level(before: State, begun: State) -> State:
    kept = {name: value for name, value in before.items() if name in begun}
    if "read" in begun and "read" not in before:
        kept["read"] = finished(before["memory"])
    return begun | kept


def _with_memories(
    memory: NeuralMemory | CMSMemory, config: MemoryConfig, moved: Mapping[int, int], gates: Literal["carry", "default"]
) -> Grown[CMSMemory]:
    width = memory.width if isinstance(memory, CMSMemory) else memory.qkv.in_features
    is_queried = isinstance(memory, CMSMemory) and memory.is_queried
    grown_part = config.model_copy(update={"levels": _with_one_more(config.levels)})
    module = CMSMemory(width, grown_part, is_queried=is_queried)
    like = next(memory.parameters())
    module = module.to(device=like.device, dtype=like.dtype)
    old: Mapping[str, Tensor] = memory.state_dict()
    if isinstance(memory, NeuralMemory):
        old = {f"level.0.recall.{name}": value for name, value in old.items()}
    new = module.state_dict()
    renamed = {name: _renamed(name, moved) for name in old if name.startswith("level.")}
    taken = {a: b for a, b in renamed.items() if b in new and not (gates == "default" and ".gates." in b)}
    for name in new:
        if name.endswith("qkv.weight") and name not in taken.values():
            nn.init.normal_(new[name], std=1 / math.sqrt(width))
    for a, b in taken.items():
        new[b].copy_(old[a])
    for name in ("mix_l", "look_mix_l"):
        if name in new and name in old:
            new[name][list(moved.values())] = old[name][list(moved)]
    _move_frequency(old, new, moved, (config.levels.all_periods, grown_part.levels.all_periods))
    prefix = "level.0.recall." if isinstance(memory, NeuralMemory) else ""
    return Grown(module, {a.removeprefix(prefix): b for a, b in taken.items()}, moved)


def _move_frequency(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    moved: Mapping[int, int],
    periods: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """A learned frequency keeps its target, and how far it is above or below its budget."""
    if "frequency.bias_l" not in old:
        return
    for a, b in moved.items():
        if a > 0:
            new["frequency.weight_ld"][b - 1] = old["frequency.weight_ld"][a - 1]
            shift = math.log(periods[0][a] - 1) - math.log(periods[1][b] - 1)
            new["frequency.bias_l"][b - 1] = old["frequency.bias_l"][a - 1] + shift


def _with_chain_level(chain: CMSMLP, moved: Mapping[int, int]) -> Grown[CMSMLP]:
    part = _with_one_more(chain.config)
    fresh = copy.deepcopy(chain.level[0])
    _begin_afresh(fresh)
    level_of = {new: chain.level[old] for old, new in moved.items()}
    levels = [cast(CMSMLPLevel, level_of.get(number, fresh)) for number in range(part.count)]
    module = CMSMLP([copy.deepcopy((level.norm, level.feedforward)) for level in levels], part)
    like = next(chain.parameters())
    module = module.to(device=like.device, dtype=like.dtype)
    if module.mix_l is not None and chain.mix_l is not None:
        with torch.no_grad():
            module.mix_l[list(moved.values())] = chain.mix_l[list(moved)]
    names = {name: _renamed(name, moved) for name, _ in chain.named_parameters() if name.startswith("level.")}
    return Grown(module, names, moved)


def _begin_afresh(level: nn.Module) -> None:
    """First weights; the last projection is zero, so that the level adds nothing until it has learned."""
    for name, module in level.named_modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.gain_d)
        if isinstance(module, nn.Linear):
            is_last = name.rpartition(".")[2] == "out"
            nn.init.normal_(module.weight, std=0.0 if is_last else 1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _renamed(name: str, moved: Mapping[int, int]) -> str:
    _, level, rest = name.split(".", 2)
    return f"level.{moved[int(level)]}.{rest}"


def _with_one_more(part: Settings) -> Settings:
    """The settings of one level more, each period after the last ``PERIODS`` times as long."""
    changes: dict[str, object] = {"count": part.count + 1}
    if part.periods is not None:
        changes["periods"] = [*part.all_periods, part.all_periods[-1] * PERIODS]
    resets: list[int] = list(getattr(part, "reset_after", None) or ())
    if resets:
        changes["reset_after"] = [*resets, resets[-1]]
    return type(part).model_validate(part.model_dump() | changes)


def cms_mlp_from(layers: Sequence[tuple[nn.Module, nn.Module]], config: CMSConfig) -> CMSMLP:
    """A chain that adds to a hidden vector exactly what these trained layers added one after the other.

    layers: norm and feed-forward of each, in the order in which a transformer runs ``x + feedforward(norm(x))``. They
    are copied, norms included. While no level is stepped, the chain returns what that transformer returned (Nested
    Learning, section 7.3). Raises ConflictingKeys where the settings mean another function of x.
    """
    reasons = {
        f"there are {len(layers)} layers for a count of {config.count}": len(layers) == config.count,
        "the variant 'independent' gives all levels the same vector": config.variant == "chained",
        "pooled tokens give slow levels a mean": config.tokens == "each",
    }
    found = [reason for reason, is_met in reasons.items() if not is_met]
    if found:
        raise ConflictingKeys(
            f"these settings of model.levels cannot return what the given layers return: {'; '.join(found)}. "
            f"Set count={len(layers)}, variant=chained and tokens=each.",
            reasons=found,
        )
    copied = [copy.deepcopy(layer) for layer in layers]
    return CMSMLP(copied if config.order == "fastest" else copied[::-1], config)
