"""Memories in layers of a model of ``transformers`` that stays: ``x + out(gated(read(norm(x))))`` after a layer.

``out`` is 0 at first, so that the model with fresh memories is the host to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from meristem.adapters.base import rest
from meristem.errors import CapabilityError, WrongValue
from meristem.memory.state import State
from meristem.models.init import seeded
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import MemoryLayer, build_memory
from meristem.nn.norm import RMSNorm
from meristem.shapes import Hidden

READ: Final = "read_bsd"
"""What a memory gave for the tokens that the host reads again: they are not written a second time."""


class HostMemory(nn.Module):
    """What one layer gains: a memory that reads and writes what the layer gives."""

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = MemoryLayer(width, config, build_memory(width, config))
        nn.init.zeros_(self.mixer.out.weight)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        read: tuple[Hidden, State] = self.mixer(self.norm(hidden_btd), state)
        return read


@dataclass
class _Reading:
    """One call of a host: the states of its memories before it, by layer, and those after it."""

    before: Mapping[str, State]
    after: dict[str, State] = field(default_factory=dict)


_reading: Final[ContextVar[_Reading]] = ContextVar("reading")


@contextmanager
def reading(before: Mapping[str, State]) -> Iterator[dict[str, State]]:
    """While the block lasts, a call of the host reads memories from these states; those that it leaves come out."""
    now = _Reading(before)
    token = _reading.set(now)
    try:
        yield now.after
    finally:
        _reading.reset(token)


def _add(name: str, memory: HostMemory, _layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """What a layer gives, with what its memory gives: hidden vectors alone, or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    now = _reading.get()
    state = dict(now.before.get(name, {}))
    before_bsd = state.pop(READ, hidden[:, :0])
    n_before = before_bsd.shape[1]
    new_btd, after = memory(hidden[:, n_before:], state or None)
    read_bsd = torch.cat([before_bsd, new_btd], dim=1)
    now.after[name] = after | {READ: read_bsd}
    added = hidden + read_bsd
    return (added, *output[1:]) if isinstance(output, tuple) else added


def forgotten(states: Mapping[str, State], n_kept: int) -> dict[str, State]:
    """The states where the host reads only the last ``n_kept`` tokens again."""
    return {name: state | {READ: state[READ][:, state[READ].shape[1] - n_kept :]} for name, state in states.items()}


def layers_of(host: nn.Module) -> nn.ModuleList:
    """The layers of a model of transformers. CapabilityError where they are not one list."""
    count = getattr(host.config, "num_hidden_layers", None)
    found = [module for module in host.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise CapabilityError(
            f"{type(host).__name__} has no list of {count} layers, so that a memory cannot be put behind one. Use "
            f"--how full or lora.",
            operation="memory",
            reason="no layers",
        )
    return found[0]


def chosen_layers(host: nn.Module, wanted: Sequence[int] | None) -> list[int]:
    """The layers that get a memory: those named, or the one in the middle."""
    count = len(layers_of(host))
    layers = [count // 2] if wanted is None else list(wanted)
    beyond = [layer for layer in layers if not 0 <= layer < count]
    if beyond:
        raise WrongValue(
            f"finetune.layers names {beyond}, but the host has the layers 0 to {count - 1}. Name some of these.",
            value=beyond,
        )
    return sorted(layers)


def memories(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """The change ``memories``: memories behind layers of a host, which is frozen.

    fields: layers, memory, the settings of all, and random_seed.
    """
    config = MemoryConfig.model_validate(fields["memory"])
    host = model.get_submodule("host")
    settings: Any = host.config
    layers, width = layers_of(host), int(settings.hidden_size)
    kept = {*(name for name, _ in model.named_parameters(remove_duplicate=False)), *model.state_dict()}
    rest(model, frozenset(kept))
    gained = model.get_submodule("memories")
    assert isinstance(gained, nn.ModuleDict)  # noqa: S101 - a host has such a place
    for layer in fields["layers"]:
        with seeded(fields["random_seed"], "adapters.memory", layer):
            memory = HostMemory(width, config)
        gained[str(layer)] = memory
        layers[layer].register_forward_hook(partial(_add, str(layer), memory))
    return model
