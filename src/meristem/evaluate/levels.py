"""What each level of a memory does by itself: how much it writes, how long it keeps, and whether it moves at all."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from meristem.evaluate.memory import COPIES, mean, uncompiled
from meristem.events import Event
from meristem.memory import Gates
from meristem.memory.state import State, flatten
from meristem.nn.cms_memory import CMSMemory, Level, PooledTokens
from meristem.shapes import Tokens


@torch.no_grad()
def level_figures(model: nn.Module, tokens_bt: Tokens) -> dict[str, dict[str, float]]:
    """Figures of every level of ``model`` after it has read ``tokens_bt`` from a fresh start; none without levels.

    Keyed by where the level stands in the state, as ``layer.0.recall.level.1``. share: of its output in the sum.
    write_budget: what it writes per token, the mean write rate over the tokens from one write to the next. half_life:
    tokens after which the mean retain factor leaves one half. rate: share of tokens at which a learned frequency
    switches it on. memory_change: how far its memory moves in one fire of the second half of the text, relative to its
    size; left out where it does not fire there. n_fires: in that half.
    """
    modules = [module for module in model.modules() if isinstance(module, CMSMemory)]
    half = tokens_bt.shape[1] // 2
    if not modules or half < 1:
        return {}
    levels = [level for module in modules for _, level in module.named_levels()]
    heard: dict[int, list[Gates]] = {index: [] for index in range(len(levels))}
    with uncompiled(), ExitStack() as hooks:
        for index, level in enumerate(levels):
            hooks.enter_context(level.recall.gates.register_forward_hook(_listener(heard[index])))
        _, before = model(tokens_bt[:, :half])
        _, after = model(tokens_bt[:, half:], before)
    figures: dict[str, dict[str, float]] = {}
    for module, (path, then), (_, now) in zip(modules, _states(before), _states(after), strict=True):
        for index, level in module.named_levels():
            gates = heard[len(figures)]
            own = _of_gates(level, gates) | _of_memory(level, index, then, now)
            own["share"] = float(module.shares()[index])
            if "frequency" in now:
                own["rate"] = float(now["frequency"]["rate_bl"][:, index - 1].mean()) if index else 1.0
            figures[f"{path}.level.{index}"] = own
    return figures


@dataclass(frozen=True)
class Dormancy:
    """A level sleeps when its memory has moved by less than ``limit`` of its size in ``patience`` fires in a row."""

    limit: float = 1e-6
    patience: int = 20
    n_still: int = 0

    @property
    def is_dormant(self) -> bool:
        return self.n_still >= self.patience

    def fed(self, figures: dict[str, float]) -> Self:
        """With the figures of one more measurement of the level."""
        n_fires = int(figures["n_fires"])
        if "memory_change" not in figures:
            return self
        return replace(self, n_still=self.n_still + n_fires if figures["memory_change"] < self.limit else 0)

    def event(self, path: str, step: int) -> Event:
        """What a run says of it."""
        advice = "raise memory.write_rate, give its level a shorter period, or train with fewer levels"
        return Event("level.dormant", {"step": step, "level": path, "fires": self.n_still, "advice": advice}, "warning")


def _listener(heard: list[Gates]) -> Callable[[nn.Module, object, Gates], None]:
    def hear(module: nn.Module, inputs: object, gates: Gates) -> None:
        heard.append(gates)

    return hear


def _states(state: State, path: str = "") -> Iterator[tuple[str, State]]:
    """The states of all memories with levels inside a state, and where they stand, in the order of the modules."""
    for name, inner in state.items():
        here = f"{path}.{name}".removeprefix(".")
        if not isinstance(inner, dict) or name in COPIES:
            continue
        if "level" in inner and "memory" in inner["level"].get("0", {}):
            yield here, inner
        else:
            yield from _states(inner, here)


def _of_gates(level: Level, heard: list[Gates]) -> dict[str, float]:
    """Of gates that may have been heard of no token: a slow level writes seldom."""
    if not heard:
        return {}
    n_apart = level.n_apart if isinstance(level, PooledTokens) else 1
    retain = mean([gates.retain_bth for gates in heard])
    return {
        "write_budget": mean([gates.write_bth for gates in heard]) / n_apart,
        "half_life": n_apart * math.log(0.5) / math.log(retain) if 0 < retain < 1 else math.inf,
    }


def _of_memory(level: Level, index: int, before: State, after: State) -> dict[str, float]:
    n_fires = after["count"] // level.n_apart - before["count"] // level.n_apart
    if not n_fires:
        return {"n_fires": 0.0}
    then, now = (_weights(level, state["level"][str(index)]["memory"]) for state in (before, after))
    change = float((now - then).norm() / then.norm().clamp_min(torch.finfo(then.dtype).tiny))
    return {"n_fires": float(n_fires), "memory_change": change / n_fires}


def _weights(level: Level, memory: State) -> Tensor:
    names = level.recall.rule.structure.weights
    return torch.cat(
        [leaf.flatten() for name, leaf in flatten(memory).items() if name in names and isinstance(leaf, Tensor)]
    )
