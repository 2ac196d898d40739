"""The values that live between calls: nested dicts of tensors and host integers.

A memory is the flat case, ``{"matrix_bhkv": ..., "matrix_momentum_bhkv": ...}``; the state of a layer or a model
nests such dicts. Everything here is a plain function from value to value, so that saving, forking and moving a memory
need no class.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch

Memory: TypeAlias = dict[str, torch.Tensor]
# A leaf is a tensor or a host integer, everything else a nested state; mypy cannot follow a key to one of them.
State: TypeAlias = dict[str, Any]


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], state: State) -> State:
    """The same state with ``change`` applied to every tensor; integers stay."""
    flat = flatten(state)
    return unflatten({name: change(leaf) if isinstance(leaf, torch.Tensor) else leaf for name, leaf in flat.items()})


def detach(state: State) -> State:
    """The same values, cut from the graph that made them."""
    return map_tensors(torch.Tensor.detach, state)


def clone(state: State) -> State:
    """A copy that shares no storage and no graph with ``state``."""
    return map_tensors(lambda tensor: tensor.detach().clone(), state)


def take_rows(state: State, start: int, stop: int) -> State:
    """The state of some rows of a batch; integers are those of all."""
    rows = {
        name: leaf.narrow(_batch_axis(name), start, stop - start) if isinstance(leaf, torch.Tensor) else leaf
        for name, leaf in flatten(state).items()
    }
    return unflatten(rows)


def join_rows(states: Sequence[State]) -> State:
    """The state of a batch from those of its parts, in their order; the inverse of ``take_rows``."""
    if len(states) == 1:
        return states[0]
    joined: dict[str, torch.Tensor | int] = {}
    flat = [flatten(state) for state in states]
    for name, leaf in flat[0].items():
        leaves = [found for each in flat if isinstance(found := each[name], torch.Tensor)]
        joined[name] = torch.cat(leaves, dim=_batch_axis(name)) if leaves else leaf
    return unflatten(joined)


def _batch_axis(name: str) -> int:
    """Where the batch stands among the axes that a name ends in."""
    return name.rpartition("_")[2].index("b")


def flatten(state: State) -> dict[str, torch.Tensor | int]:
    """One level of names, nested ones joined by a point: ``layer.0.memory.matrix_bhkv``."""
    flat: dict[str, torch.Tensor | int] = {}
    for name, leaf in state.items():
        if isinstance(leaf, dict):
            flat.update({f"{name}.{inner}": value for inner, value in flatten(leaf).items()})
        else:
            flat[name] = leaf
    return flat


def unflatten(flat: Mapping[str, torch.Tensor | int]) -> State:
    """The inverse of ``flatten``."""
    state: State = {}
    for path, leaf in flat.items():
        *outer, last = path.split(".")
        level = state
        for name in outer:
            nested = level.setdefault(name, {})
            if not isinstance(nested, dict):
                raise ValueError(f"'{name}' in '{path}' names a leaf and a group at once")
            level = nested
        level[last] = leaf
    return state


def as_tensors(state: State) -> dict[str, torch.Tensor]:
    """Every leaf by its path, host integers as tensors without axes: what a file can hold."""
    return {
        name: leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf) for name, leaf in flatten(state).items()
    }


def from_tensors(saved: Mapping[str, torch.Tensor]) -> State:
    """The inverse of ``as_tensors``; leaves come before groups, as in a memory that was never saved."""
    flat = sorted(saved.items(), key=lambda item: item[0].count("."))
    return unflatten(
        {name: int(leaf) if leaf.dim() == 0 and leaf.dtype == torch.int64 else leaf for name, leaf in flat}
    )


def size_bytes(state: State) -> int:
    """Bytes that the tensors of a state hold."""
    return sum(leaf.numel() * leaf.element_size() for leaf in flatten(state).values() if isinstance(leaf, torch.Tensor))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Where memories and gates are computed: outside any autocast, whose bfloat16 would drift within a hundred
    tokens."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def beside(weight_name: str, word: str) -> str:
    """The name of what is carried beside a weight: ``matrix_bhkv``, ``momentum`` -> ``matrix_momentum_bhkv``."""
    stem, axes = weight_name.rsplit("_", 1)
    return f"{stem}_{word}_{axes}"
