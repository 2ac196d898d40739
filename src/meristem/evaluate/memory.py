"""What the gates of a model do and how full its memories are, read off one forward pass."""

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from meristem.memory import Gates
from meristem.memory.value import State, flatten
from meristem.nn.gates import GateMap
from meristem.shapes import Tokens

CARRIED = ("momentum", "anchor", "deep", "span", "reset")
"""In the names of what a memory carries beside its weights."""


@torch.no_grad()
def memory_figures(model: nn.Module, tokens_bt: Tokens) -> dict[str, float]:
    """Figures of the memories of ``model`` after it has read ``tokens_bt`` from a fresh start; none without a memory.

    half_life: tokens after which the mean retain factor leaves one half. write, momentum: means over tokens, heads and
    layers. norm: of the memory of a head, its momentum not counted. Neither parameters nor a run's memory are touched.
    """
    with _uncompiled(), _listening(model) as heard:
        _, state = model(tokens_bt)
    if not heard:
        return {}
    retain = _mean([gates.retain_bth for gates in heard])
    figures = {
        "half_life": math.log(0.5) / math.log(retain) if 0 < retain < 1 else math.inf,
        "write": _mean([gates.write_bth for gates in heard]),
        "norm": _mean([weight.flatten(2).norm(dim=-1) for weight in _weights(state)]),
    }
    momenta = [gates.momentum_bth for gates in heard if gates.momentum_bth is not None]
    return figures | ({"momentum": _mean(momenta)} if momenta else {})


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled blocks pass over hooks; inside this they run as written. Nothing compiled, no compiler is loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[Gates]]:
    """The gates that every gate map gives while this lasts."""
    heard: list[Gates] = []

    def hear(module: nn.Module, inputs: object, gates: Gates) -> None:
        heard.append(gates)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, GateMap):
                hooks.enter_context(module.register_forward_hook(hear))
        yield heard


def _weights(state: State) -> Iterator[torch.Tensor]:
    """The weight tensors of every memory inside a state."""
    for path, leaf in flatten(state).items():
        *groups, name = path.split(".")
        is_weight = "memory" in groups and "unfinished" not in groups and not any(word in name for word in CARRIED)
        if isinstance(leaf, torch.Tensor) and is_weight:
            yield leaf


def _mean(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).mean())
