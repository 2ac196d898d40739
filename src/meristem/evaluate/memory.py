"""What the gates of a model do and how full its memories are, read off one forward pass."""

import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meristem.memory import Gates
from meristem.memory.forms.frozen_chunk import overshoot
from meristem.memory.state import State, flatten
from meristem.models.online import LEARNED
from meristem.nn.gates import GateMap
from meristem.nn.memory_cache import MemoryCache
from meristem.nn.neural_memory import NeuralMemory
from meristem.shapes import Hidden, Tokens

CARRIED = ("momentum", "anchor", "deep", "span", "reset")
"""In the names of what a memory carries beside its weights."""

COPIES = frozenset({"start", "kept", LEARNED})
"""Under these names a state holds memories a second time, as they were."""

FROZEN = ("frozen_chunk", "refined", "tnt")
"""Forms whose chunks may overshoot."""


@torch.no_grad()
def memory_figures(model: nn.Module, tokens_bt: Tokens) -> dict[str, float]:
    """Figures of the memories of ``model`` after it has read ``tokens_bt`` from a fresh start; none without a memory.

    half_life: tokens after which the mean retain factor of a head leaves one half: the median of all heads and layers;
    half_life_least, half_life_most: of the head that forgets first, and last. write, momentum: means over tokens, heads
    and layers. norm: of the memory of a head, its momentum not counted. summed_rate: write over 1 - momentum, by which
    a key that returns is corrected in all. overshoot: of frozen chunks, the worst (``frozen_chunk.overshoot``). Neither
    parameters nor a run's memory are touched.
    """
    with uncompiled(), _listening(model) as (heard, asked):
        _, state = model(tokens_bt)
    if not heard:
        return {}
    half_lives = sorted(chain(*(half_lives_of(gates.retain_bth) for gates in heard)))
    figures = {
        "half_life": statistics.median(half_lives),
        "half_life_least": half_lives[0],
        "half_life_most": half_lives[-1],
        "write": mean([gates.write_bth for gates in heard]),
        "norm": mean([weight.flatten(2).norm(dim=-1) for weight in weights_in(state)]),
    }
    momenta = [gates.momentum_bth for gates in heard if gates.momentum_bth is not None]
    if momenta:
        figures["momentum"] = mean(momenta)
        figures["summed_rate"] = figures["write"] / max(1 - figures["momentum"], 1e-6)
    worst = [_overshoot(recall, *inputs) for recall, inputs in asked if recall.form in FROZEN]
    return figures | ({"overshoot": max(worst)} if any(worst) else {})


def half_lives_of(retain: Float[Tensor, "... h"]) -> list[float]:
    """Tokens after which the retain factors of each head, in the mean over all else, leave one half; inf for never."""
    means_h = retain.double().reshape(-1, retain.shape[-1]).mean(dim=0)
    return (-math.log(2) / means_h.log().clamp_max(-torch.finfo(torch.float64).tiny)).tolist()


def _overshoot(recall: NeuralMemory | MemoryCache, hidden_btd: Hidden, state: State | None = None) -> float:
    """The worst of one layer; 0 where it has no whole chunk, or its recall is no one matrix."""
    if not recall.rule.is_linear or hidden_btd.shape[1] < recall.chunk:
        return 0.0
    _, keys_bthk, _, _ = recall.project(hidden_btd, None)
    return float(overshoot(recall.rule, keys_bthk, recall.gates(hidden_btd), recall.chunk).max())


def uncompiled() -> AbstractContextManager[object]:
    """Compiled blocks pass over hooks; inside this they run as written. Nothing compiled, no compiler is loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


Heard = tuple[list[Gates], list[tuple[NeuralMemory | MemoryCache, tuple[Any, ...]]]]


@contextmanager
def _listening(model: nn.Module) -> Iterator[Heard]:
    """The gates that every gate map gives while this lasts, and what every memory is given."""
    heard: list[Gates] = []
    asked: list[tuple[NeuralMemory | MemoryCache, tuple[Any, ...]]] = []

    def hear(module: nn.Module, inputs: object, gates: Gates) -> None:
        heard.append(gates)

    def ask(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, NeuralMemory | MemoryCache):
            asked.append((module, given))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, GateMap):
                hooks.enter_context(module.register_forward_hook(hear))
            if isinstance(module, NeuralMemory | MemoryCache):
                hooks.enter_context(module.register_forward_pre_hook(ask))
        yield heard, asked


def weights_in(state: State) -> Iterator[torch.Tensor]:
    """The weight tensors of every memory inside a state; copies of earlier moments do not count."""
    for path, leaf in flatten(state).items():
        *groups, name = path.split(".")
        is_now = "memory" in groups and not (COPIES | {"unfinished"}) & set(groups)
        is_weight = is_now and not any(word in name for word in CARRIED)
        if isinstance(leaf, torch.Tensor) and is_weight:
            yield leaf


def mean(tensors: list[torch.Tensor]) -> float:
    """Of all their numbers together."""
    return float(torch.cat([tensor.flatten() for tensor in tensors]).mean())
