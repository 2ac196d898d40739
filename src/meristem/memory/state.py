"""The values that live between calls: nested dicts of tensors and of integers, which count what was read.

A memory is the flat case, ``{"matrix_bhkv": ..., "matrix_momentum_bhkv": ...}``; the state of a layer or a model
nests such dicts. Everything here is a plain function from value to value, so that saving, forking and moving a memory
need no class.

An integer is a host integer where it is that of all rows, which keeps training free of syncs and graphs whole. Where
rows differ it is a tensor ``(b,)`` of int64 on the host, one for each row. What is longer in one row than in another,
such as the keys of attention, is then filled up with zeros in front, and ``lengths_NAME``, ``(b,)``, says how long the
leaf NAME is in each row; -1 says that a row has no such leaf.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Final, TypeAlias

import torch
from torch.nn.functional import pad

Memory: TypeAlias = dict[str, torch.Tensor]
LENGTHS: Final = "lengths_"
# A leaf is a tensor or a host integer, everything else a nested state; mypy cannot follow a key to one of them.
State: TypeAlias = dict[str, Any]


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], state: State) -> State:
    """The same state with ``change`` applied to every tensor; integers stay."""
    flat = flatten(state)
    return unflatten({name: change(leaf) if isinstance(leaf, torch.Tensor) else leaf for name, leaf in flat.items()})


def detach(state: State) -> State:
    """The same values, cut from the graph that made them."""
    return map_tensors(torch.Tensor.detach, state)


def move(state: State, device: torch.device) -> State:
    """A copy on a device; what counts for each row stays on the host, where it is read."""
    return map_tensors(lambda tensor: tensor.to("cpu" if _is_count(tensor) else device, copy=True), state)


def clone(state: State) -> State:
    """A copy that shares no storage and no graph with ``state``."""
    return map_tensors(lambda tensor: tensor.detach().clone(), state)


def take_rows(state: State, start: int, stop: int) -> State:
    """The state of the rows from ``start`` to ``stop`` of a batch."""
    if is_mixed(state):
        return select_rows(state, range(start, stop))
    rows = {
        name: leaf.narrow(_batch_axis(name), start, stop - start) if isinstance(leaf, torch.Tensor) else leaf
        for name, leaf in flatten(state).items()
    }
    return unflatten(rows)


def put_rows(state: State, start: int, rows: State) -> State:
    """The state of a batch with other rows from ``start`` on; both have the same ``alike_by``.

    Tensors of the batch that nothing else can see are written in place.
    """
    flat, found = flatten(state), flatten(rows)
    seen = Counter(leaf.untyped_storage().data_ptr() for leaf in flat.values() if isinstance(leaf, torch.Tensor))
    after: dict[str, torch.Tensor | int] = {}
    for name, leaf in flat.items():
        row = found[name]
        if isinstance(leaf, torch.Tensor) and isinstance(row, torch.Tensor):
            # A view, an initial value that all rows share, or a copy that is the original still, is not for this row.
            is_own = leaf.is_contiguous() and seen[leaf.untyped_storage().data_ptr()] == 1
            leaf = leaf if is_own else leaf.clone(memory_format=torch.contiguous_format)
            axis = _batch_axis(name)
            leaf.narrow(axis, start, row.shape[axis]).copy_(row)
        after[name] = leaf
    return unflatten(after)


def alike_by(state: State) -> tuple[object, ...]:
    """What two states whose rows do not differ have in common where a batch may hold both: all but the values of their
    tensors and the number of rows."""
    named = sorted(flatten(state).items())
    return tuple((name, leaf if isinstance(leaf, int) else _shape_of_row(name, leaf)) for name, leaf in named)


def select_rows(state: State, rows: Sequence[int]) -> State:
    """The state of some rows of a batch, in the order given."""
    picked = {name: _picked(name, leaf, rows) for name, leaf in flatten(state).items()}
    groups = alike_rows(unflatten(picked))
    if len(groups) == 1:
        return groups[0][1]
    return unflatten(picked)


def join_rows(states: Sequence[State]) -> State:
    """The state of a batch from those of its parts, in their order, whatever each has read; undoes ``take_rows``."""
    if len(states) == 1:
        return states[0]
    flat = [flatten(own) for state in states for _, own in alike_rows(state)]
    order = [at for at, _ in sorted(enumerate(_places(states)), key=lambda place: place[1])]
    joined: dict[str, torch.Tensor | int] = {}
    batches = [_batch(each) for each in flat]
    for name in dict.fromkeys(name for each in flat for name in each):
        joined |= _joined(name, [each.get(name) for each in flat], batches)
    if order != sorted(order):
        joined = {name: _picked(name, leaf, order) for name, leaf in joined.items()}
    return unflatten(joined)


def is_mixed(state: State) -> bool:
    """Whether rows of this state differ in what they have read."""
    for leaf in state.values():
        if is_mixed(leaf) if isinstance(leaf, dict) else isinstance(leaf, torch.Tensor) and _is_count(leaf):
            return True
    return False


def alike_rows(state: State) -> list[tuple[list[int], State]]:
    """Rows that have the same integers and lengths, and their state, in which integers are those of all."""
    flat = flatten(state)
    counts = {name: leaf.tolist() for name, leaf in flat.items() if isinstance(leaf, torch.Tensor) and _is_count(leaf)}
    if not counts:
        return [(list(range(_batch(flat))), state)]
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, found in enumerate(zip(*counts.values(), strict=True)):
        rows_of.setdefault(found, []).append(row)
    groups = []
    for found, rows in rows_of.items():
        own = dict(zip(counts, found, strict=True))
        lengths = {name.replace(LENGTHS, ""): number for name, number in own.items() if LENGTHS in name}
        alike: dict[str, torch.Tensor | int] = {}
        for name, leaf in flat.items():
            length = lengths.get(name)
            if LENGTHS in name or length == -1:
                continue
            alike[name] = own[name] if name in own else _picked(name, leaf, rows)
            if length is not None and name not in own and (axis := _long_axis(name)) is not None:
                whole = alike[name]
                alike[name] = whole.narrow(axis, whole.shape[axis] - length, length)  # type: ignore[union-attr]
        groups.append((rows, unflatten(alike)))
    return groups


def rows_apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``(self, inputs, state) -> (outputs, state)``, also for a state whose rows have read differently.

    Rows that are alike go through it together, group by group.
    """

    @wraps(forward)
    def by_rows(module: Any, inputs: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        if state is None or not is_mixed(state):
            found: tuple[torch.Tensor, State] = forward(module, inputs, state)
            return found
        groups = alike_rows(state)
        reads = [forward(module, inputs[rows], own) for rows, own in groups]
        order = [row for rows, _ in groups for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat([read for read, _ in reads])[back], select_rows(join_rows([x for _, x in reads]), back)

    return by_rows


def _places(states: Sequence[State]) -> list[int]:
    """Where in the batch the rows of ``alike_rows``, state after state, belong."""
    places: list[int] = []
    for state in states:
        first = len(places)
        places += [first + row for rows, _ in alike_rows(state) for row in rows]
    return places


def _joined(
    name: str, leaves: Sequence[torch.Tensor | int | None], batches: Sequence[int]
) -> dict[str, torch.Tensor | int]:
    """One leaf of several parts, and its lengths where these differ."""
    here = [leaf for leaf in leaves if leaf is not None]
    if not isinstance(here[0], torch.Tensor):
        numbers = [leaf for leaf, n in zip(leaves, batches, strict=True) for _ in range(n)]
        if len(set(numbers)) == 1:
            return {name: here[0]}
        after: dict[str, torch.Tensor | int] = {name: torch.tensor([number or 0 for number in numbers])}
        if None in numbers:
            after[_lengths_of(name)] = torch.tensor([-1 if number is None else 0 for number in numbers])
        return after
    batch_axis, axis = _batch_axis(name), _long_axis(name)
    tensors = [leaf for leaf in here if isinstance(leaf, torch.Tensor)]
    lengths = [-1 if not isinstance(x, torch.Tensor) else x.shape[axis] if axis is not None else 0 for x in leaves]
    like, longest, filled = tensors[0], max(lengths), []
    for leaf, length, n_rows in zip(leaves, lengths, batches, strict=True):
        if not isinstance(leaf, torch.Tensor):
            shape = list(like.shape)
            shape[batch_axis] = n_rows
            if axis is not None:
                shape[axis] = longest
            filled.append(like.new_zeros(shape))
            continue
        missing = longest - length if axis is not None else 0
        filled.append(pad(leaf, [0, 0] * (leaf.ndim - 1 - (axis or 0)) + [missing, 0]) if missing else leaf)
    joined: dict[str, torch.Tensor | int] = {name: torch.cat(filled, dim=batch_axis)}
    if len(set(lengths)) > 1:
        per_row = [length for length, n in zip(lengths, batches, strict=True) for _ in range(n)]
        joined[_lengths_of(name)] = torch.tensor(per_row)
    return joined


def _picked(name: str, leaf: torch.Tensor | int, rows: Sequence[int]) -> torch.Tensor | int:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    index = torch.tensor(list(rows), dtype=torch.int64, device=leaf.device)
    return leaf.index_select(0 if _is_count(leaf) else _batch_axis(name), index)


def _batch(flat: Mapping[str, torch.Tensor | int]) -> int:
    """The rows of a state."""
    for name, leaf in flat.items():
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[0 if _is_count(leaf) else _batch_axis(name)]
    return 0


def _shape_of_row(name: str, leaf: torch.Tensor) -> object:
    shape = list(leaf.shape)
    del shape[_batch_axis(name)]
    return (*shape, leaf.dtype)


def _is_count(leaf: torch.Tensor) -> bool:
    """One integer for each row."""
    return leaf.dtype == torch.int64 and leaf.ndim == 1


def _lengths_of(name: str) -> str:
    path, point, last = name.rpartition(".")
    return f"{path}{point}{LENGTHS}{last}"


def _batch_axis(name: str) -> int:
    """Where the batch stands among the axes that a name ends in."""
    return name.rpartition("_")[2].index("b")


def _long_axis(name: str) -> int | None:
    """The axis along which rows may differ in length: tokens (t, s) or memories (n); None where there is none."""
    axes = name.rpartition("_")[2]
    return next((at for at, letter in enumerate(axes) if letter in "tsn"), None)


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
